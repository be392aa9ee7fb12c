"""What `adapt` did to a model: `summary`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from rich.console import Group
from torch import nn

from onelora_compile.adapting.adapter import unwrap
from onelora_compile.adapting.adapter_state import adapted_weights, state_of
from onelora_compile.printable import Printable, bytes_text, shortened
from onelora_compile.table import Table, grouped


@dataclasses.dataclass(frozen=True)
class Summary(Printable):
    """The vectors of a model.

    Attributes:
        sites: module name, in_features and out_features of every adapted linear.
        skipped: every linear without a vector, with the reason.
        not_linear: convolutions and embeddings, which the method does not adapt, with what they are.
        output_only: adapted modules that compute something else than W x + c, so that nothing can be merged into them.
        vector_parameters: numbers in all vectors.
        other_parameters: trained besides, by modules_to_save and train_norms.
        base_parameters: numbers in the frozen base.
        vector_bytes: of the vectors in an adapter file (float32).
    """

    sites: list[tuple[str, int, int]]
    skipped: dict[str, str]
    not_linear: dict[str, str]
    output_only: list[str]
    vector_parameters: int
    other_parameters: int
    base_parameters: int
    vector_bytes: int

    @property
    def share(self) -> float:
        """Vectors over all parameters of the base, 0 to 1."""
        return self.vector_parameters / max(1, self.base_parameters)

    def __rich__(self) -> Group:
        table = Table(title="adapted linears")
        for column in ("module", "in_features", "out_features"):
            table.add_column(column, justify="left" if column == "module" else "right")
        for name, sizes in grouped(((name, sizes) for name, *sizes in self.sites), alike=tuple).items():
            table.add_row(name, *map(str, sizes[0]))
        lines = [f"{len(self.sites)} vectors, {self.vector_parameters:,} numbers, {bytes_text(self.vector_bytes)}: "]
        share = f"{self.share:.3%} of " if self.base_parameters else "the base has "  # packed, it has none
        lines[0] += f"{share}{self.base_parameters:,} base parameters"
        if self.other_parameters:
            lines.append(f"trained besides: {self.other_parameters:,} numbers (modules_to_save, train_norms)")
        if self.output_only:
            lines.append(f"adapted by their output alone, can't be merged: {shortened(_grouped(self.output_only), 6)}")
        for reasons in (self.skipped, self.not_linear):
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, why in reasons.items() if why == reason]
                lines.append(f"no vector on {shortened(_grouped(names), 6)}: {reason}")
        return Group(table, "\n".join(lines))


def _grouped(names: list[str]) -> Iterable[str]:
    return grouped((name, None) for name in names)


def summary(model: nn.Module) -> Summary:
    """What `adapt` did to a model; `print(summary(model))` shows it.

    Raises:
        StateError: the model is not adapted.
    """
    root = unwrap(model)
    state = state_of(root, "summarise", allow_disabled=True)
    targets = adapted_weights(root)
    entries = sum(target.vector.numel() for target in targets.values())
    everything = sum(parameter.numel() for parameter in root.parameters())
    trained = sum(parameter.numel() for parameter in root.parameters() if parameter.requires_grad)
    return Summary(
        sites=[(name, target.in_features, target.out_features) for name, target in targets.items()],
        skipped=dict(state.skipped),
        not_linear=dict(state.not_linear),
        output_only=[name for name, target in targets.items() if target.dims is None],
        vector_parameters=entries,
        other_parameters=trained - sum(t.vector.numel() for t in targets.values() if t.vector.requires_grad),
        base_parameters=everything - entries,
        vector_bytes=4 * entries,
    )
