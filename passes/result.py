"""What a pass did: how many rewrites, and every skip with its reason."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class PassResult:
    """Returned by every pass.

    Attributes:
        name: of the pass.
        rewrites: what was rewritten, by the place it concerns (a module path, or a node's name).
        skips: what was left alone, with the reason.
        seconds: wall time, filled in by the runner.
    """

    name: str
    rewrites: list[str] = dataclasses.field(default_factory=list)
    skips: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def modified(self) -> bool:
        """Whether the graph changed."""
        return bool(self.rewrites)
