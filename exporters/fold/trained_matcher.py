"""Find in an ONNX model where trained heads and norms go: which reads of which constants are a parameter's.

Numbers first, by the fingerprint of the base's value.  Norms of ones and biases of zeros look alike, exporters merge
equal constants, and drop biases of zeros; so a read is a parameter's by what tells more, in this order:

    names      the module that exporters note at the op, or the name of the constant
    position   the other inputs of an op that is found: of a norm its shift, of a linear or a convolution its bias
    numbers    alone, where the value is not one number everywhere, and no other parameter has it

A new head is random, and another one in the process that wrote the model: found by names, its numbers do not matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from onelora_compile.adapting.module_names import matches
from onelora_compile.exporters.fold.find_weights import WeightUse, names_of
from onelora_compile.exporters.fold.head_biases import bias_shape, scale_of
from onelora_compile.exporters.fold.later_calls import later_calls, numbered_paths
from onelora_compile.exporters.fold.parameter_reads import (
    OPTIONAL_BIAS,
    SLOTS,
    SLOTTED,
    ParameterRead,
    ParameterReads,
    TrainedPlaces,
    uniform,
)
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_file import AdapterFile
from onelora_compile.weights.fingerprint import fingerprint_of_values

if TYPE_CHECKING:
    import onnx_ir

_LINEARS = ("Gemm", "MatMul", "Add")
_CONVOLUTIONS = ("Conv", "ConvTranspose")  # which exporters merge norms and factors into, and keep the names


class TrainedMatcher:
    """The search in one model for what one adapter trained."""

    def __init__(self, model: onnx_ir.Model, file: AdapterFile, renaming: tuple[str, str]) -> None:
        self.file = file
        self.added, self.cut = renaming
        self.floating = {name: value for name, value in file.saved.items() if value.is_floating_point()}
        known = [*self.floating, *(f"{name}.weight" for name in file.vectors)]
        self.parameters = [*names_of(model), *(other for name in known for other in self._names(name))]
        self.places = TrainedPlaces()
        self.unclear: dict[str, str] = {}  # why what was found is no place
        self.model = model
        self.reads = ParameterReads(model, self.floating)
        self.fitting = {name: self.reads.by_numbers(name, file.bases.get(name)) for name in self.floating}
        numbered = numbered_paths(read.use for reads in self.fitting.values() for read in reads)
        self.numbered = {path for path in numbered if not self._left_out(path)}

    def match(self) -> TrainedPlaces:
        """The places, what tells most first; weights before the biases beside them."""
        left = sorted(self.floating, key=lambda name: -self.floating[name].ndim)
        for rule in (self._by_names, self._by_position, self._alone, self._by_position):
            left = [name for name in left if not rule(name)]
        for name in left:
            if not self._needless(name):
                self.places.missing[name] = self._reason(name)
        self._refuse_shared()
        return self.places

    def _names(self, name: str) -> set[str]:
        """What the model calls a parameter, tied ones by each of their names."""
        return {self.added + one.removeprefix(self.cut) for one in (name, *self.file.aliases.get(name, ()))}

    def _left_out(self, path: str) -> bool:
        """Whether the adapter's config leaves a path out by name: it is of a module of its own."""
        excluded = self.file.config.exclude_modules
        return excluded is not None and matches(excluded, self.cut + path.removeprefix(self.added))

    def _by_names(self, name: str) -> bool:
        """Reads at the parameter's own module, or of the constant of its name."""
        names, fitting = self._names(name), self.fitting[name]
        own = {one.rpartition(".")[0] for one in names}
        again = later_calls(self.numbered, own, self.parameters)
        if self._once(name) and any(_module(read.use) in again for read in fitting):
            self.unclear[name] = f"{shortened(sorted(again))} may be a later call, and the model had one call of it"
            return False
        modules = own | again
        here = [read for read in fitting if _module(read.use) in modules]
        if not here and (not fitting or self._uniform(name)):
            # A new head, whose numbers are others in every process; or ops that do not say where they come from.
            anywhere = [read for read in self.reads.by_shape(name) if _module(read.use) in (None, *modules)]
            if not fitting:
                anywhere = [read for read in anywhere if self._can_be_new(name, read)]
            here = [read for read in anywhere if read.value.name in names]
            if not here and not fitting:
                at = [read for read in anywhere if _module(read.use) in modules]
                here = at if len({read.value for read in at}) == 1 else []
        if self._uniform(name):
            here = [read for read in here if read.value.name in names] or here
        else:
            here += [read for read in fitting if here and read not in here and _module(read.use) is None]
        # A norm of another name that was left as it is (`norm_1` beside `norm`) looks the same.
        if (
            self._uniform(name)
            and not self.file.config.train_norms
            and any(_module(read.use) in again for read in here)
        ):
            return False
        held = {read.value for read in here}
        unclear = [read for value in held for read in (*fitting, *here) if read.value is value]
        # Of a value that others have by chance, a use without a name may be theirs.
        if any(_module(read.use) is None and uniform(read.value) for read in unclear):
            if len({(read.use.op, read.use.position) for read in unclear}) > 1:
                return False
        return self._take(name, here)

    def _once(self, name: str) -> bool:
        """Whether the adapted model was seen to call the parameter's linear once."""
        return self.file.uses.get(f"{name.rpartition('.')[0]}.weight") == (1, 1)

    def _can_be_new(self, name: str, read: ParameterRead) -> bool:
        """Whether numbers that are not the base's can be a new head's, and not the base's with something merged in.

        A batch norm in a convolution or a linear, the scale of attention: what replaces such a weight loses them. New
        numbers are of the base's distribution, so their norm is the base's, give or take 4 standard deviations.
        """
        base = self.file.bases.get(name)
        if read.use.op.op_type in _CONVOLUTIONS:
            return False
        if base is None or read.use.op.op_type not in _LINEARS:
            return True
        here, count = self.reads.fingerprint(name, read), self.floating[name].numel()
        norms = here.norm, base.norm
        if not min(norms) or count < 4:  # a bias of zeros stays one
            return bool(min(norms)) or not max(norms)
        # Factors of rows leave it near the base; 16 numbers of another draw are as near once in 20000.
        near = min(here.shape) >= 4 and here.cosine(base) > 0.8
        return not near and max(norms) <= (1 + 2.9 / count**0.5) * min(norms)

    def _by_position(self, name: str) -> bool:
        """The input of an op whose other parameter is found, or a bias that the exporter dropped since it was zero."""
        module, _, own = name.rpartition(".")
        siblings = [other for other in self.places.reads if other.rpartition(".")[0] == module]
        beside = {read.use.op: (other, read) for other in siblings for read in self.places.reads[other]}
        ops = {op: found for op, found in beside.items() if op.op_type in (*SLOTTED, "MatMul", "Mul")}
        if not ops or own not in SLOTS:
            return False
        found: list[ParameterRead] = []
        dropped: list[tuple[ParameterRead, tuple[int, ...]]] = []
        for op, (sibling, weight) in ops.items():
            new = not self.fitting[sibling]  # a new head: its bias has other numbers too
            slotted = op.op_type in SLOTTED
            at, position = (op, SLOTS[own]) if slotted else (_sum_behind(op), None)
            if not slotted and own != "bias":
                return False
            candidates = self.reads.by_shape(name) if new else self.fitting[name]
            reads = [read for read in candidates if read.use.op is at and position in (None, read.use.position)]
            reads = [read for read in reads if not new or self._can_be_new(name, read)]
            empty = not slotted or (op.op_type in OPTIONAL_BIAS and _absent(op, SLOTS[own]))
            if reads:
                found += reads
            elif own == "bias" and self._zero(name) and empty:
                if (shape := self._bias_shape(name, weight)) is None:
                    return False
                dropped.append((weight, shape))
            else:
                return False
        if found and not self._take(name, found):
            return False
        self.places.dropped |= {name: dropped} if dropped else {}
        return bool(found or dropped)

    def _bias_shape(self, name: str, weight: ParameterRead) -> tuple[int, ...] | None:
        """The shape of a dropped bias behind the reader of its weight; None, with the reason, where nothing tells."""
        op = weight.use.op
        if scale := scale_of(op):
            self.unclear[name] = (
                f"Gemm {op.name!r} has {scale}, and nothing tells whether that is the bias's factor too"
            )
            return None
        shape = bias_shape(self.model, weight)
        if shape is None:
            self.unclear[name] = (
                f"{op.op_type} {op.name!r} gives a result of unknown rank: the bias's axis can't be told"
            )
        return shape

    def _alone(self, name: str) -> bool:
        """All reads of numbers that no other parameter has, whatever the ops are called."""
        held = {read.value for read in self.fitting[name]}
        names = self._names(name)
        twins = any(
            held & {read.value for read in reads} and not names & self._names(other)
            for other, reads in self.fitting.items()
            if other != name
        )
        # A second op may be that of a frozen copy: nothing says how often the model uses what is no vector's.
        several = len({read.use.op for read in self.fitting[name]}) > 1 and not self.file.aliases.get(name)
        return not twins and not several and not self._uniform(name) and self._take(name, self.fitting[name])

    def _take(self, name: str, reads: list[ParameterRead]) -> bool:
        for read in reads:
            # Zeros look alike with any factor, and a new bias may be stored divided by it.
            scale = scale_of(read.use.op) if read.use.position == SLOTS["bias"] else None
            if scale and (self._uniform(name) or not self.fitting[name]):
                self.unclear[name] = f"{read.use.op.op_type} {read.use.op.name!r} that reads it has {scale}"
                return False
        if reads:
            self.places.reads[name] = reads
        return bool(reads)

    def _uniform(self, name: str) -> bool:
        """Whether the base value is one number everywhere."""
        return bool(self.fitting[name]) and uniform(self.fitting[name][0].value)

    def _zero(self, name: str) -> bool:
        base = self.file.bases.get(name)
        return base is not None and base.norm == 0

    def _needless(self, name: str) -> bool:
        """Whether training left a norm as it was, so that the model may be as well; a head's weight is never sure."""
        base, module = self.file.bases.get(name), name.rpartition(".")[0]
        beside = [value for other, value in self.floating.items() if other.rpartition(".")[0] == module]
        now = fingerprint_of_values(self.floating[name])
        return base is not None and all(value.ndim < 2 for value in beside) and now.distance(base) == 0

    def _refuse_shared(self) -> None:
        """A read that two parameters with other values claim is neither's."""
        claims: dict[tuple[onnx_ir.Node, int], list[str]] = {}
        for name, reads in self.places.reads.items():
            for read in reads:
                claims.setdefault((read.use.op, read.use.position), []).append(name)
        for (op, _), names in claims.items():
            if any(not torch.equal(self.floating[names[0]], self.floating[one]) for one in names[1:]):
                for name in names:
                    self.places.reads.pop(name, None)
                    self.places.missing[name] = f"{op.op_type} {op.name!r} reads what can be any of {', '.join(names)}"

    def _reason(self, name: str) -> str:
        if name in self.unclear:
            return self.unclear[name]
        if reads := self.fitting[name]:
            where = ", ".join(sorted({read.value.name or "a constant" for read in reads}))
            return f"its base value is at {where}, and neither names nor other parameters tell which use is its own"
        if name not in self.file.bases:
            return "nothing has its name, and the file is of an older version, without its base value: save it again"
        return "nothing has its base value or its name: a tool merged it with something, quantised it, or left it out"


def _absent(op: onnx_ir.Node, position: int) -> bool:
    return len(op.inputs) <= position or op.inputs[position] is None


def _sum_behind(op: onnx_ir.Node) -> onnx_ir.Node | None:
    """The Add that alone reads an output."""
    users = [use.node for use in op.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == "Add" else None


def _module(use: WeightUse) -> str | None:
    """The module that an op belongs to; None where exporters do not say."""
    return use.modules[-1] if use.modules else None
