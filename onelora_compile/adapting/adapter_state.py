"""What an adapted model knows besides its vectors, and what must not be done to it in that state."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import is_adapted
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.dispatched import is_in_files, is_offloaded
from onelora_compile.adapting.module_names import named_modules
from onelora_compile.adapting.pool import Pool
from onelora_compile.adapting.weight_target import Target, targets_of
from onelora_compile.errors import OneLoRAWarning, StateError
from onelora_compile.printable import shortened
from onelora_compile.sharded import is_piece

STATE = "_onelora_state"
PART = False  # what the modules inside of a model that was given to `adapt` have there: no state of their own


class Arriving(NamedTuple):
    """What `load_state_dict` is about to load.

    Attributes:
        prefix: of the model's names in it.
        errors: what goes wrong on the way; the load raises it at its end.
        brought: names of the model for which it has other tensors than the model's own.
    """

    prefix: str
    errors: list[str]
    brought: set[str]


@dataclasses.dataclass
class AdapterState:
    """What an adapted model knows besides its vectors; an attribute of the module given to `adapt`.

    Attributes:
        config: the configuration in force.
        requires_grad: of every base parameter, as it was before, by name.
        originals: values before training of what is trained besides the vectors, by name: parameters of
            modules_to_save and norms, and the running statistics of batch norms, which move without a gradient; those
            of the last checkpoint of the base that was loaded.
        fast_paths: attributes that were switched off, with their values; see `fastpath`.
        disabled: how many `disabled` blocks are open; `enable` ends the last of them.
        pool: its adapters by name, of which one is active.
        skipped: linear ops without a vector, by name, with the reason.
        not_linear: convolutions and embeddings, with what they are.
        constant: names of vectors whose input a compiled graph showed to sum to one number; see `watch`.
        uses: as in `AdapterFile`.
        made: names of the vectors that the model was given.
        told: those of which somebody was told that they are gone.
        arriving: of the state_dict that is being loaded, before it is; see base_checkpoints.py.
    """

    config: OneLoRAConfig
    requires_grad: dict[str, bool]
    originals: dict[str, Tensor]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    not_linear: dict[str, str] = dataclasses.field(default_factory=dict)
    constant: set[str] = dataclasses.field(default_factory=set)
    uses: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    made: list[str] = dataclasses.field(default_factory=list)
    told: list[str] = dataclasses.field(default_factory=list)
    arriving: Arriving | None = None
    fast_paths: list[tuple[nn.Module, str, Any]] = dataclasses.field(default_factory=list)
    disabled: int = 0
    pool: Pool = dataclasses.field(default_factory=Pool)
    enable: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle of the model inside a block would hold the base's values for good.

        Raises:
            StateError: a `disabled` block is open.
        """
        if self.disabled:
            raise StateError("can't copy or pickle the model inside a onelora.disabled block: do it outside")
        return dict(self.__dict__)


def adapted_weights(root: nn.Module) -> dict[str, Target]:
    """The weights that have a vector, by its name."""
    return {target.key(name): target for name, module in named_modules(root) for target in targets_of(module)}


def adapted_part(root: nn.Module) -> tuple[str, nn.Module]:
    """The module that was given to `adapt`, with its name in the model: the part of a wrapper whose names files have.

    The model itself, named "", where it was given to `adapt`, or where several parts of it were.
    """
    parts = [(name, module) for name, module in named_modules(root) if vars(module).get(STATE)]
    return parts[0] if len(parts) == 1 else ("", root)


def was_adapted(root: nn.Module) -> bool:
    """Whether the model, a part of it or one around it is adapted, or was until `detach` or `merge`."""
    if STATE in vars(root):
        return True
    return any(is_adapted(module) or vars(module).get(STATE, PART) is not PART for module in root.modules())


def mark(root: nn.Module, state: AdapterState) -> None:
    """Give a model its state, and let each module inside know that it is a part: a block may be compiled by itself."""
    setattr(root, STATE, state)
    for module in root.modules():
        vars(module).setdefault(STATE, PART)


def unmark(root: nn.Module) -> None:
    """Undo `mark`."""
    delattr(root, STATE)
    for module in root.modules():
        if vars(module).get(STATE) is PART:
            del vars(module)[STATE]


def state_of(root: nn.Module, purpose: str, allow_disabled: bool = False, allow_lost: bool = False) -> AdapterState:
    """The state of an adapted model, whose vectors are at hand.

    Warns once where some of them are gone.

    Raises:
        StateError: not adapted, adapted at another module of the tree, disabled, its vectors are offloaded or laid
            flat, or all of them are gone.
    """
    refuse_flattened(root, purpose)
    state = own_state(root, purpose)
    if not allow_disabled:
        refuse_disabled(root, purpose)
    present = adapted_weights(root)
    refuse_offloaded_vectors(root, present, purpose)
    if not allow_lost:
        _check_lost(root, state, present, purpose)
    return state


def _check_lost(root: nn.Module, state: AdapterState, present: Mapping[str, Target], purpose: str) -> None:
    """Whether something put other layers in the places of adapted ones; a layer that moved has its vector still."""
    if not present:
        raise StateError(
            f"can't {purpose}: no layer of this {type(root).__name__} has its vector any more. Something put layers of "
            "other classes in their places after adapt (to_mkldnn, a float8 conversion), which compute the base: "
            "convert first, adapt afterwards"
        )
    gone = [name for name in state.made if name not in present] if len(present) < len(state.made) else []
    known, state.told = state.told, gone
    if gone and gone != known:
        warnings.warn(
            f"this {type(root).__name__} was given {len(state.made)} vectors and has {len(present)}: layers were "
            f"replaced or taken out after adapt, and no layer {shortened(gone)} has one now. What took their place "
            "computes the base: resize, convert and cut first, adapt afterwards",
            OneLoRAWarning,
            stacklevel=4,
        )


def own_state(root: nn.Module, purpose: str) -> AdapterState:
    """The same for what is done hundreds of times a second: no module below the model is asked.

    Raises:
        StateError: not adapted, or adapted at another module of the tree.
    """
    state = state_or_none(root)
    if state is None:
        inside = next((name for name, module in named_modules(root) if vars(module).get(STATE)), None)
        hint = f"its submodule {inside!r} is: pass that one" if inside else "call onelora.adapt(model) first"
        raise StateError(f"can't {purpose}: this {type(root).__name__} was not given to adapt; {hint}")
    return state


def refuse_flattened(root: nn.Module, purpose: str) -> None:
    """Check that the process holds whole vectors and weights, not its pieces of all of them in a row.

    Raises:
        StateError: FullyShardedDataParallel has split the model.
    """
    adapted: Iterator[Any] = (module for module in root.modules() if is_adapted(module))
    if any(is_piece(module._parameters.get(name)) for module in adapted for name in module._onelora_weights):
        raise StateError(
            f"can't {purpose}: FullyShardedDataParallel has split the vectors over processes; do it to the wrapper's "
            "`module`, in every process, inside FullyShardedDataParallel.summon_full_params(wrapper), or shard with "
            "torch.distributed.fsdp.fully_shard"
        )


def refuse_offloaded_vectors(root: nn.Module, present: Mapping[str, Target], purpose: str) -> None:
    """Check that accelerate has not put the vectors away: each call would get new ones, whatever is done to them.

    Raises:
        StateError: the model was adapted, and dispatched with offloading afterwards.
    """
    refuse_weights_in_files(root, purpose)
    for name, target in present.items():
        refuse_offloaded_vector(name, target.module, target.vector, purpose)


def refuse_weights_in_files(root: nn.Module, purpose: str) -> None:
    """Check that the model holds its numbers: vectors that diffusers writes to files would be trained in vain.

    Raises:
        StateError: diffusers has put weights into files.
    """
    if is_in_files(root):
        raise StateError(
            f"can't {purpose}: diffusers has put weights of the model into files (enable_group_offload with "
            "offload_to_disk_path) and left memory without numbers in their places: offload to the CPU, without files"
        )


def refuse_offloaded_vector(name: str, module: nn.Module, vector: Tensor, purpose: str) -> None:
    """The same of one vector.

    Raises:
        StateError: accelerate has put it away.
    """
    if vector.is_meta and is_offloaded(module):
        raise StateError(
            f"can't {purpose}: accelerate has offloaded the vector of {name!r}, as the model was adapted before it "
            "was dispatched: dispatch it first, then call onelora.adapt or onelora.load_adapter"
        )


def refuse_disabled(root: nn.Module, purpose: str) -> None:
    """Check that the values of the model, adapted or not, are its own.

    Raises:
        StateError: the model or a part of it is in a `disabled` block, or in a `rows` block of this thread.
    """
    refuse_blocks(map(state_or_none, root.modules()), purpose)


def refuse_blocks(found: Iterable[AdapterState | None], purpose: str) -> None:
    """Check that models are in no block in which they have other values than their own.

    Raises:
        StateError: one is in a `disabled` block, or in a `rows` block of this thread.
    """
    states = [state for state in found if state is not None]
    if any(state.disabled for state in states):
        raise StateError(f"can't {purpose} inside a onelora.disabled block: the values there are the base's")
    if any(hasattr(state.pool.block.here, "rows") for state in states):
        raise StateError(f"can't {purpose} inside a onelora.rows block: each row has its own values there")


def state_or_none(root: nn.Module) -> AdapterState | None:
    """The state of a model that was given to `adapt`; None for any other."""
    state = vars(root).get(STATE) or None
    assert state is None or isinstance(state, AdapterState)
    return state
