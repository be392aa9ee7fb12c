"""Reports that only the command line has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Group
from rich.text import Text

from onelora_compile.exporters import Verification
from onelora_compile.printable import Printable, bytes_text
from onelora_compile.weights.adapter_content import Projection


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
class Comparisons(Printable):
    """What `onelora verify` found, one comparison for each size."""

    comparisons: list[Verification]

    @property
    def passed(self) -> bool:
        """Whether all did."""
        return all(one.passed for one in self.comparisons)

    def __rich__(self) -> Group:
        return Group(*self.comparisons)
