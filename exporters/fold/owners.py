"""Decide which uses of equal numbers in an ONNX file are one vector's: all that can only be its layer's, or none.

A layer that is called twice, or stands in both branches of an If, may be written as two copies of its weight; two
layers with equal weights may share one; a frozen copy of a weight may be shared with it.  What a file says of an op is
a module path, at times, and its bias.  How often a forward of the model uses the weight is known too.

    the op's path                                 bias, adapter's config                           the use is
    the vector's module                           -                                                the vector's
    another one that ends as it, with it there    config leaves it out                             as of another module
    only ends as it                               -                                                the vector's
    another vector's, with the same numbers       -                                                that vector's
    `module_1`, as TorchScript numbers calls      no parameters of its own; config adapts it, or   the vector's
                                                  the vector's own bias
    another module, a linear                      its own parameters; config leaves it out         another layer's
    another module                                the vector's own bias; config adapts it          the vector's
    none, or of no vector; one stored weight      no second vector has these numbers               the vector's
    none, or of no vector; several copies         as above; config adapts every linear             the vector's
    anything else                                 no second vector has these numbers; as many      the vector's
                                                  uses as its model has of the weight
    anything else                                 -                                                refused, by name

Where one run of the file has more uses than the model, all but those of the vector's own module are another layer's,
if the config leaves their modules out, and else refused.  Where its own module alone has more, the file holds the
exported graph several times (`onnx.compose.merge_models`), and is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.module_names import matches
from onelora_compile.exporters.fold.added_bias import bias_of
from onelora_compile.exporters.fold.find_weights import Weight, WeightUse
from onelora_compile.exporters.fold.later_calls import calls_again
from onelora_compile.exporters.fold.often import times_of
from onelora_compile.exporters.fold.same_values import SameValues

if TYPE_CHECKING:
    import onnx_ir

    from onelora_compile.exporters.fold.places import Place

_ELSEWHERE, _UNNAMED, _AGAIN, _UNCLEAR = "an op of another name", "an op without a name", "called again?", "unclear"


@dataclasses.dataclass(frozen=True)
class Known:
    """What tells uses apart besides their paths.

    Attributes:
        config: with which the model was adapted.
        parameters: names of the file's values.
        uses: as in `AdapterFile`.
        bodies: the node that each body in the file belongs to.
        values: which values of the file are one.
    """

    config: OneLoRAConfig = dataclasses.field(default_factory=OneLoRAConfig)
    parameters: Collection[str] = ()
    uses: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    bodies: Mapping[Any, onnx_ir.Node] = dataclasses.field(default_factory=dict)
    values: SameValues = dataclasses.field(default_factory=SameValues)

    def too_many(self, name: str, uses: Sequence[WeightUse]) -> bool:
        """Whether one run of the file has more of these uses than a forward of the model has of the vector's weight."""
        most, distinct = self.uses.get(name, (1, 1))[1], _distinct(uses)
        if most <= 0 or times_of(distinct, self.bodies) <= most:
            return False
        return times_of(_computed_once(distinct, self.values), self.bodies) > most

    def often(self, name: str, uses: Sequence[WeightUse]) -> str:
        """Of a message: how often the model uses the weight, where the file has more."""
        most = self.uses.get(name, (1, 1))[1]
        times = "once" if most == 1 else f"{most} times"
        return f" (one forward of the model uses it {times})" if self.too_many(name, uses) else ""

    def adapts(self, path: str) -> bool:
        """Whether a linear of this path would have a vector, if it were a module of its own."""
        left_out = [*self.config.modules_to_save]
        if isinstance(self.config.exclude_modules, str):
            if matches(self.config.exclude_modules, path):
                return False
        else:
            left_out += self.config.exclude_modules or ()
        if left_out and matches(left_out, path):
            return False
        return self.config.target_modules == "all-linear" or matches(self.config.target_modules, path)

    @property
    def adapts_all(self) -> bool:
        """Whether every linear has a vector."""
        config = self.config
        return config.target_modules == "all-linear" and not config.exclude_modules and not config.modules_to_save

    def is_module(self, path: str) -> bool:
        """Whether the file holds parameters of a module of this path."""
        return any(path and f".{name}".rpartition(".")[0].endswith(f".{path}") for name in self.parameters)


@dataclasses.dataclass(frozen=True)
class _Renaming:
    """How a file's paths relate to the adapter's names.

    Attributes:
        own: the path of a vector's module.
        added: what tools put before paths.
        cut: what they cut off.
    """

    own: str
    added: str
    cut: str

    def plain(self, path: str) -> str:
        """A path as the adapter would name it."""
        return self.cut + path.removeprefix(self.added)

    def leaves_out(self, path: str, known: Known) -> bool:
        """Whether a path that ends as the vector's module is that of another, which the config leaves out."""
        return path != self.own and not _numbered(path, self.own) and not known.adapts(self.plain(path))


def decided(name: str, places: Sequence[Place], twins: Sequence[str], known: Known) -> list[Place] | str:
    """The places and uses that are the vector's; or why that can't be told.

    Args:
        name: the vector.
        places: with the numbers of its base, each with uses.
        twins: other vectors that these numbers fit too.
        known: what else is known.
    """
    names = (name, *twins)
    owners = {use: _owner(use, place.weight, names, known) for place in places for use in place.uses}
    parts = any(place.first for place in places) or any(use.picked or use.cut for use in owners)
    if parts and name not in known.uses:  # they may be all of one use: attention cuts its packed weight up
        known = dataclasses.replace(known, uses={name: (1, 0)})
    renaming = _renaming(owners, name)
    for use, owner in owners.items():  # `teacher.fc` ends as `fc` does
        if owner == name and _of_module(use, name) and renaming.leaves_out(use.modules[-1], known):
            owners[use] = _ELSEWHERE
    if name in owners.values():
        own = [use for use, owner in owners.items() if owner == name]
        for use, owner in owners.items():
            if owner == _ELSEWHERE:
                owners[use] = _elsewhere(use, own, name, known, renaming)
            elif owner == _AGAIN:
                owners[use] = name if _same_bias(use, own) and not known.too_many(name, [*own, use]) else _UNCLEAR
            elif owner == _UNNAMED and not twins and known.adapts_all:
                owners[use] = name
    # Where not every linear has a vector, a second use may be another layer's, tied or equal, that has none.
    elif not twins and (len(owners) == 1 or known.adapts_all) and _one_layer(owners):
        if not known.too_many(name, [*owners]):
            return list(places)
    if known.too_many(name, [use for use, owner in owners.items() if owner == name]):
        # There is a frozen copy of the weight, and only the path of the vector's own module tells it.
        for use, owner in owners.items():
            by_path = _of_module(use, name) and not _numbered(use.modules[-1], renaming.own)
            owners[use] = _UNCLEAR if owner == name and not by_path else owner
        told = [use for use, owner in owners.items() if owner == name]
        if known.too_many(name, told):  # the file holds the exported graph several times, with the same paths
            owners |= dict.fromkeys(told, _UNCLEAR)
    unclear = [use for use, owner in owners.items() if owner in (_UNNAMED, _AGAIN, _UNCLEAR)]
    if (unclear or name not in owners.values()) and not twins and known.uses.get(name, (0, 0))[0] == len(owners):
        return list(places)
    if unclear or name not in owners.values():
        where = ", ".join(dict.fromkeys(place.weight.name for place in places))
        which = f", used by {_listed(unclear)}" if unclear else ""
        others = f", as of {', '.join(twins)}" if twins else ""
        often = known.often(name, [*owners])
        return f"the same numbers are at {where}{which}{others}, and no names tell them apart{often}"
    kept = [
        dataclasses.replace(place, uses=tuple(use for use in place.uses if owners[use] == name)) for place in places
    ]
    return [place for place in kept if place.uses]


def _renaming(owners: Mapping[WeightUse, str], name: str) -> _Renaming:
    """What the path of a vector's module tells: of several, the nearest is it (`fc`, not `teacher.fc`)."""
    paths = [use.modules[-1] for use, owner in owners.items() if owner == name and _of_module(use, name)]
    nearest = min(paths, key=lambda path: abs(len(path) - len(name)), default=name)
    longer = len(nearest) >= len(name)
    return _Renaming(
        nearest, nearest.removesuffix(name) if longer else "", "" if longer else name.removesuffix(nearest)
    )


def _of_module(use: WeightUse, name: str) -> bool:
    """Whether an op bears the path of a vector's module, or that of a later call of it."""
    path = use.modules[-1] if use.modules else ""
    return bool(path) and (_ends(path, name) or calls_again(path, name))


def _distinct(uses: Sequence[WeightUse]) -> list[WeightUse]:
    """The uses without those that compute the same again: of the same input, with the same bias."""
    found: dict[Any, WeightUse] = {}
    for use in uses:
        others = tuple(one for place, one in enumerate(use.op.inputs) if place != use.position)
        found.setdefault(use if (bias := bias_of(use.op)) is None else (bias, others), use)
    return list(found.values())


def _computed_once(uses: Sequence[WeightUse], same: SameValues) -> list[WeightUse]:
    """The uses without those of the same module whose input and product are computed again."""
    found: dict[Any, WeightUse] = {}
    for use in uses:
        again = (use.modules[-1], same.number(use.op.outputs[0]), bias_of(use.op)) if use.modules else use
        found.setdefault(again, use)
    return list(found.values())


def _one_layer(owners: dict[WeightUse, str]) -> bool:
    """Whether uses that bear no vector's name may be those of one layer: without names, or all with the same one."""
    paths = {re.sub(r"_\d+(?=\.|$)", "", use.modules[-1]) if use.modules else None for use in owners}
    return len(paths) == 1 and _AGAIN not in owners.values()


def _listed(uses: Sequence[WeightUse]) -> str:
    listed = [use.op.name or use.op.op_type for use in uses[:4]]
    return ", ".join(listed) + (", …" if len(uses) > 4 else "")


def _owner(use: WeightUse, weight: Weight, names: Sequence[str], known: Known) -> str:
    """Which vector an op belongs to by the names that tools left."""
    if use.modules:
        path = use.modules[-1]
    elif sum(one.linear for one in weight.uses) == 1 and weight.name.endswith(".weight"):
        path = weight.name.removesuffix(".weight")
    else:
        return _UNNAMED
    # A vector of a parameter that is read, "attention.in_proj_weight", belongs to the ops of "attention".
    for candidates in ({name: name for name in names}, {name.rpartition(".")[0]: name for name in names}):
        if path in candidates:
            return candidates[path]
        if inside := [one for one in candidates if _ends(path, one)]:
            return candidates[max(inside, key=len)]
    if again := [one for one in names if calls_again(path, one)]:
        if known.is_module(path):
            return _ELSEWHERE
        return max(again, key=len) if known.adapts(path) else _AGAIN
    return _ELSEWHERE


def _ends(path: str, name: str) -> bool:
    """Whether one path is the end of the other: tools add and drop what is around a model."""
    return bool(path) and bool(name) and (f".{path}".endswith(f".{name}") or f".{name}".endswith(f".{path}"))


def _numbered(path: str, name: str) -> bool:
    """Whether a path has TorchScript's numbers of later calls."""
    return calls_again(path, name) and not _ends(path, name)


def _elsewhere(use: WeightUse, own: Sequence[WeightUse], name: str, known: Known, renaming: _Renaming) -> str:
    """Whose an op with the name of another module is, which no vector has: that module's, the vector's, or unclear.

    Another name may be the same module's (`self.b = self.a`), or that of code which reads the adapted weight.
    """
    path = use.modules[-1] if use.modules else ""
    same_bias, more = _same_bias(use, own), known.too_many(name, [*own, use])
    if known.adapts(renaming.plain(path)):
        return name if same_bias and not more else _UNCLEAR
    if more and path and all(_of_module(one, name) for one in own) and not _numbered(path, name):
        return _ELSEWHERE  # the config leaves it out, and the model has no further use of the weight
    classes = use.op.metadata_props.get("pkg.torch.onnx.class_hierarchy", "")
    if classes and "Linear" not in classes:
        return _UNCLEAR
    # Equal biases of two layers are made one as well, which then bears the name of the first; that of one layer with
    # two names bears its last.
    apart = _named_by_first(use) if same_bias else known.is_module(path)
    return _ELSEWHERE if apart else _UNCLEAR


def _same_bias(use: WeightUse, own: Sequence[WeightUse]) -> bool:
    bias = bias_of(use.op)
    return bias is not None and any(bias is bias_of(one.op) for one in own)


def _named_by_first(use: WeightUse) -> bool:
    """Whether the bias that an op adds has the name of the module that adds it first."""
    bias = bias_of(use.op)
    first = next((one.node for one in bias.uses()), None) if bias is not None else None
    modules = WeightUse((first,), 0).modules if first is not None else ()
    return bool(modules) and _ends((bias.name or "").rpartition(".")[0], modules[-1])  # type: ignore[union-attr]
