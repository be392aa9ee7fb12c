"""Reports that only the command line has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Group
from rich.text import Text

from onelora_compile.exporters import Verification
from onelora_compile.printable import Printable, bytes_text
from onelora_compile.table import Table, grouped
from onelora_compile.weights.adapter_content import AdapterFile, Part, Projection


@dataclasses.dataclass(frozen=True)
class Signed(Printable):
    """What `onelora sign` wrote.

    Attributes:
        file: what was signed.
        signature: the signature's file.
        sequence: the number that was signed with it.
    """

    file: Path
    signature: Path
    sequence: int

    def __rich__(self) -> Text:
        told = f"wrote {self.signature}, sequence {self.sequence}: send it with {self.file}"
        return Text(told, no_wrap=True, overflow="ignore")


@dataclasses.dataclass(frozen=True)
class Conversion(Printable):
    """What `onelora convert` wrote.

    Attributes:
        file: the file, or the folder of PEFT.
        bytes: of all of it.
        projection: what an approximation keeps; None where nothing was approximated.
        knows_base: whether it has fingerprints of its base, or its format has none.
    """

    file: Path
    bytes: int
    projection: Projection | None = None
    knows_base: bool = True

    def __rich__(self) -> Group:
        lines = [f"wrote {self.file}, {bytes_text(self.bytes)}"]
        if not self.knows_base:
            lines.append(
                "it has no fingerprints of its base, as PEFT wrote none: fold and ONNX Runtime need them. Load it"
            )
            lines.append("into the model, onelora.load_adapter, and save that, onelora.save_adapter")
        wrote = Text("\n".join(lines), no_wrap=True, overflow="ignore")
        return Group(wrote) if self.projection is None else Group(wrote, self.projection)


@dataclasses.dataclass(frozen=True)
class Combination(Printable):
    """What `onelora combine` wrote.

    Attributes:
        file: the file.
        bytes: of it.
        parts: the adapters in the sum.
        vectors: how many it holds.
        numbers: in all vectors.
        saved: shapes of the other trained tensors that it holds.
    """

    file: Path
    bytes: int
    parts: list[Part]
    vectors: int
    numbers: int
    saved: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, made: AdapterFile, file: Path) -> Combination:
        """The report of a file that was written."""
        numbers = sum(vector.numel() for vector in made.vectors.values())
        shapes = {name: tuple(value.shape) for name, value in made.saved.items()}
        return cls(file, file.stat().st_size, list(made.parts), len(made.vectors), numbers, shapes)

    def __rich__(self) -> Group:
        title = f"wrote {self.file}, {bytes_text(self.bytes)}: {self.vectors} vectors, {self.numbers:,} numbers"
        table = Table("weight", "adapter", "sha256 of its vectors", "base")
        for part in self.parts:
            base = "could not be checked" if not part.compared else "the same" if len(self.parts) > 1 else "its own"
            table.add_row(f"{part.weight:.12g}", part.name, part.digest[:16], base)
        named: dict[str, None] = dict.fromkeys(self.saved)
        trained = [f"also trained: {name}" for name in grouped(named.items())]
        return Group(Text(title, no_wrap=True, overflow="ignore"), table, *trained)


@dataclasses.dataclass(frozen=True)
class Comparisons(Printable):
    """What `onelora verify` found, one comparison for each size."""

    comparisons: list[Verification]

    @property
    def passed(self) -> bool:
        """Whether all did."""
        return all(one.passed for one in self.comparisons)

    def __rich__(self) -> Group:
        return Group(*self.comparisons)
