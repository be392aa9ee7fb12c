"""What an adapter trained besides its vectors: base parameters and batch-norm statistics, found in the model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from onelora_compile.adapting.adapter_state import AdapterState
from onelora_compile.adapting.module_names import clean_name, named_tensors
from onelora_compile.errors import StateError
from onelora_compile.printable import shortened


def saved_tensors(root: nn.Module, state: AdapterState) -> dict[str, Tensor]:
    """What travels with the vectors: trained base parameters and batch-norm statistics, by name."""
    return {name: tensor for name, tensor in named_tensors(root).items() if name in state.originals}


def places_of_saved(root: nn.Module, state: AdapterState) -> dict[str, tuple[nn.Module, str]]:
    """The module and the attribute of each of `saved_tensors`, by name."""
    found = {}
    for name, module in root.named_modules(remove_duplicate=False):
        for own in (*module._parameters, *module._buffers):
            if (key := clean_name(f"{name}.{own}".removeprefix("."))) in state.originals:
                found[key] = (module, own)
    return found


def all_saved_tensors(root: nn.Module, state: AdapterState) -> dict[str, Tensor]:
    """`saved_tensors`, none of which may be missing.

    Raises:
        StateError: as `check_saved`.
    """
    tensors = saved_tensors(root, state)
    check_saved(state, tensors)
    return tensors


def check_saved(state: AdapterState, tensors: Mapping[str, Tensor]) -> None:
    """Check that the model has all that its adapter trained besides vectors, and that the base's values are known.

    Raises:
        StateError: a layer that held one was removed or replaced after `adapt`, or what it held before is not known.
    """
    gone = [name for name, one in state.originals.items() if name not in tensors or tensors[name].shape != one.shape]
    if gone:
        raise StateError(
            f"the adapter holds {shortened(gone)}, which the model has no more, or of another shape: a layer was "
            "removed or replaced after adapt. Put it back; merge and the exporters need it not"
        )
    if unknown := [name for name, one in state.originals.items() if one.is_meta and not tensors[name].is_meta]:
        raise StateError(
            f"what {shortened(unknown)} were before training is not known: the model was on the meta device at adapt, "
            "and got trained values since. Load the base's weights (load_state_dict), then the trained ones"
        )
