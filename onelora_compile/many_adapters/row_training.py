"""Training several adapters in one batch: `row_parameters`.

Each waiting adapter is one flat parameter, a view of its row of the pool, so that any optimizer of PyTorch has a state
for each adapter, and leaves those alone that had no row in the batch: their gradient is None.

The linears choose from tables of their own, which autograd knows; when a backward is over, the rows of their gradients
go to the adapters.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapter import is_replicated, unwrap
from onelora_compile.adapting.adapter_state import state_of
from onelora_compile.adapting.batch_rows import ROWS
from onelora_compile.adapting.pool import Pool
from onelora_compile.errors import StateError
from onelora_compile.many_adapters.values import live_vectors, pool_of


def row_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The waiting adapters as parameters, by name: what an optimizer gets to train them in `rows` blocks.

        optimizer = torch.optim.AdamW(onelora.row_parameters(model).values(), lr=1e-3)
        with onelora.rows(model, users):
            loss(model(x)).backward()
        optimizer.step()

    A gradient is that of the rows of one adapter, on the linears that it is on; None for an adapter that had no row
    since `zero_grad`, and for one of which all gradients are zero. The active adapter is none of them: it is trained as
    always (`trainable_parameters`). Ask again after `set_adapter`, `add_adapter` and `delete_adapter`; where the model
    got vectors on further linears, take a new optimizer, as all parameters are longer then. A backward costs memory for
    all adapters of the model.

    Shapes: [numbers], all vectors of the model one after another; between them may be numbers that stay zero.

    Raises:
        StateError: the model is not adapted; a `disabled` or a `rows` block is open; it is in
            DistributedDataParallel, which would leave each process with gradients of its own.
    """
    refuse_reduced(model)
    root = unwrap(model)
    pool = pool_of(root, state_of(root, "train rows"))
    with pool.lock, torch.inference_mode(False):
        vectors = live_vectors(root, pool)
        device = next(iter(vectors.values())).device
        pool.reserve(vectors, device)
        pool.trained = True
        pool.give_to(pool.places)
        follow_tables(pool)
        assert pool.values is not None
        for name, held in pool.held.items():
            if name != pool.active and held.parameter is None:
                held.parameter = nn.Parameter(pool.values[held.row])
    waiting = {name: held.parameter for name, held in pool.held.items() if name != pool.active}
    return {name: parameter for name, parameter in waiting.items() if parameter is not None}


def refuse_reduced(model: nn.Module) -> None:
    """Check that no process would train the waiting adapters by gradients of its own.

    Raises:
        StateError: the model is given inside DistributedDataParallel.
    """
    if is_replicated(model):
        raise StateError(
            "can't train rows in DistributedDataParallel: it reduces the gradients of the model's vectors alone, and "
            "each process would train the waiting adapters by itself. Train them one after another (set_adapter), or "
            "other adapters in each process, without it"
        )


def follow_tables(pool: Pool) -> None:
    """Let autograd know what the linears choose from, and bring its gradients to the adapters."""
    for name, (module, _) in pool.places.items():
        own = getattr(module, ROWS, None)
        if own is not None and not own.table.requires_grad:
            own.table.requires_grad_(True).register_post_accumulate_grad_hook(functools.partial(_arrived, pool, name))


def _arrived(pool: Pool, name: str, table: Tensor) -> None:
    """Keep the gradient of a table until its backward is over; of a backward that fails it is forgotten.

    The table may be an older one: another adapter came between the forward and the backward.
    """
    gradient, table.grad = table.grad, None
    assert gradient is not None
    number = torch._C._current_graph_task_id()
    if pool.arriving is None or pool.arriving[0] != number:
        pool.arriving = number, []
        # Runs when this backward is over. torch/autograd/variable.py
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_spread, pool, pool.arriving[1]))
    pool.arriving[1].append((name, gradient))


def _spread(pool: Pool, gradients: list[tuple[str, Tensor]]) -> None:
    """The gradients of the tables, as those of the adapters, each on the linears that it is on."""
    with pool.lock:  # other threads may add adapters
        assert pool.values is not None
        flat = torch.zeros_like(pool.values)
        for name, gradient in gradients:
            rows = [held.row for held in pool.held.values() if name in held.vectors and held.row < len(gradient)]
            start = pool.columns[name]
            flat[rows, start : start + gradient.shape[1]] += gradient[rows].to(flat)
        touched = flat.any(1).tolist()
        for held in pool.held.values():
            if held.parameter is not None and touched[held.row]:
                known, new = held.parameter.grad, flat[held.row]
                held.parameter.grad = new.clone() if known is None else known + new
