"""Paths of the second call of a module and later ones: TorchScript puts numbers behind their parts, `head_1`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from onelora_compile.exporters.fold.find_weights import WeightUse


def calls_again(path: str, name: str) -> bool:
    """Whether a path is that of a module's second call or a later one, whatever tools add and drop before it."""
    parts, own = path.split("."), name.split(".")
    count = min(len(parts), len(own))
    pairs = zip(parts[-count:], own[-count:], strict=True)
    return all(part == one or re.fullmatch(re.escape(one) + r"_\d+", part) for part, one in pairs)


def numbered_paths(uses: Iterable[WeightUse]) -> set[str]:
    """The paths of uses, where the exporter puts numbers into them: others name modules as they are."""
    told = {use.op: use for use in uses if "pkg.torch.onnx.name_scopes" not in use.op.metadata_props}
    return {use.modules[-1] for use in told.values() if use.modules}


def later_calls(paths: Iterable[str], modules: Collection[str], parameters: Collection[str]) -> set[str]:
    """Which paths are those of later calls of modules.

    Args:
        paths: with numbers of TorchScript.
        modules: whole paths, so that a shorter one is another module's: `norm` beside `blocks.0.norm`.
        parameters: names of those that are known, whose modules are modules of their own.
    """
    pairs = ((path, one) for path in paths for one in modules if one and path != one)
    again = {path for path, one in pairs if path.count(".") == one.count(".") and calls_again(path, one)}
    return {path for path in again if not any(name.startswith(f"{path}.") for name in parameters)}
