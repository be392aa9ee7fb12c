"""Training several adapters in one batch: `row_parameters`.

Each waiting adapter is one flat parameter, a view of its row of the pool, so that any optimizer of PyTorch has a state
for each adapter, and leaves those alone that had no row in the batch: their gradient is None.

The linears choose from tables of their own, which autograd knows; when a backward is over, the rows of their gradients
go to the adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapter import state_of, unwrap
from onelora_compile.adapting.batch_rows import ROWS
from onelora_compile.adapting.pool import Pool
from onelora_compile.many_adapters.names import live_vectors, pool_of


def row_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The waiting adapters as parameters, by name: what an optimizer gets to train them in `rows` blocks.

        optimizer = torch.optim.AdamW(onelora.row_parameters(model).values(), lr=1e-3)
        with onelora.rows(model, users):
            loss(model(x)).backward()
        optimizer.step()

    A gradient is that of the rows of one adapter; None for an adapter that had no row since `zero_grad`. The active
    adapter is none of them: it is trained as always (`trainable_parameters`). Ask again after `set_adapter`,
    `add_adapter` and `delete_adapter`. A backward costs memory for all adapters of the model.

    Shapes: [numbers], all vectors of an adapter one after another; between them may be numbers that stay zero.

    Raises:
        StateError: the model is not adapted; a `disabled` or a `rows` block is open.
    """
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


def follow_tables(pool: Pool) -> None:
    """Let autograd know what the linears choose from, and bring its gradients to the adapters."""
    pending: list[bool] = []

    def arrived(table: Tensor) -> None:
        del table
        if not pending:
            pending.append(True)
            # Runs when this backward is over. torch/autograd/variable.py
            torch.autograd.Variable._execution_engine.queue_callback(spread)

    def spread() -> None:
        pending.clear()
        _spread(pool)

    for module, _ in pool.places.values():
        own = getattr(module, ROWS, None)
        if own is not None and not own.table.requires_grad:
            own.table.requires_grad_(True).register_post_accumulate_grad_hook(arrived)


def _spread(pool: Pool) -> None:
    """The gradients of the tables, as those of the adapters."""
    assert pool.values is not None
    flat = torch.zeros_like(pool.values)
    for name, (module, _) in pool.places.items():
        own = getattr(module, ROWS, None)
        if own is not None and own.table.grad is not None:
            start = pool.columns[name]
            flat[:, start : start + own.table.shape[1]] = own.table.grad
            own.table.grad = None
    touched = flat.any(1).tolist()
    for held in pool.held.values():
        if held.parameter is not None and touched[held.row]:
            known, new = held.parameter.grad, flat[held.row]
            held.parameter.grad = new.clone() if known is None else known + new
