"""The modes: how a model, a bundle or an engine carries its adapter, and what follows from it.

base     there is none
fold     it is in the weights
load     added to the weights when a session is opened or an engine is built
input    inputs of every call, one for each vector
bank     rows of tables, chosen by the input `adapter_ids` for each row of a batch
refit    weights of a built engine, which can be replaced; engines and bundles only
"""

from __future__ import annotations

from dataclasses import dataclass

IDS = "adapter_ids"  # name of the input of a bank


@dataclass(frozen=True)
class Mode:
    """What tells one mode from the others.

    Attributes:
        name: as users write it.
        takes_files: whether another adapter file can be used without another export.
        feeds_vectors: whether each call is given the vectors.
        feeds_ids: whether each call is given the numbers of adapters.
        rebuilds: whether each adapter has a session or an engine of its own.
        refits: whether an adapter is written into the weights of a built engine.
        engines: the modes of engines that can be built from a model of this one, the default first.
    """

    name: str
    takes_files: bool = False
    feeds_vectors: bool = False
    feeds_ids: bool = False
    rebuilds: bool = False
    refits: bool = False
    engines: tuple[str, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether another adapter, or none, needs another model."""
        return not (self.takes_files or self.feeds_ids)

    def __str__(self) -> str:
        return self.name


BASE = Mode("base", engines=("base", "fold"))
FOLD = Mode("fold", engines=("fold",))
LOAD = Mode("load", takes_files=True, rebuilds=True, engines=("fold",))
INPUT = Mode("input", takes_files=True, feeds_vectors=True, engines=("input", "refit"))
BANK = Mode("bank", feeds_ids=True, engines=("bank",))
REFIT = Mode("refit", takes_files=True, refits=True)
MODES = {mode.name: mode for mode in (BASE, FOLD, LOAD, INPUT, BANK, REFIT)}
EXPORTED = ("fold", "load", "input", "bank")  # what `export_onnx(adapters=)` takes


class HasMode:
    """What names its mode, as files do, and is asked what follows; mixed into the descriptions of a model.

    Attributes:
        mode: a key of `MODES`.
    """

    mode: str

    @property
    def traits(self) -> Mode:
        """What follows from the mode."""
        return MODES[self.mode]
