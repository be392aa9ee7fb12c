"""`disabled`: a block in which an adapted model is its base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import is_adapted
from onelora_compile.adapting.adapter import unwrap, vectors
from onelora_compile.adapting.adapter_state import state_of
from onelora_compile.adapting.stand_ins import stand_in
from onelora_compile.adapting.trained_besides import all_saved_tensors


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is the base, exactly; no recompilation.

    Gradients are those of the forward that they come from: a forward from inside gives the vectors none, one from
    outside may run its backward inside or afterwards.  A `state_dict` that is taken inside holds the vectors, and an
    optimizer's step changes them.  The backward of a checkpointed forward runs that again, and is refused where that
    would be the other model.  The switch holds for every thread that uses the model.

    Raises:
        StateError: the model is not adapted; or, inside, the model is copied, pickled, saved, exported, or loaded into.
    """
    root = unwrap(model)
    state = state_of(root, "disable", allow_disabled=True)
    if not state.disabled:
        values: dict[Tensor, Tensor | None] = dict.fromkeys(vectors(root).values())
        trained = all_saved_tensors(root, state)
        values |= {trained[name]: own for name, own in state.originals.items()}
        state.enable = stand_in(root, values)
        state.pool.block.off = True
        state.pool.changes.follow(module for module in root.modules() if is_adapted(module))
        state.pool.changes.disable(True)
    state.disabled += 1
    try:
        yield
    finally:
        state.disabled -= 1
        if not state.disabled and state.enable is not None:
            state.enable()
            state.enable = None
            state.pool.block.off = False
            state.pool.changes.disable(False)
