"""Whether an adapter belongs to a model: its names, shapes and fingerprints."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from math import prod

from torch import Tensor, nn

from onelora_compile.adapting.module_names import clean_name, matches, named_modules
from onelora_compile.adapting.weight_target import Target
from onelora_compile.errors import AdapterFileError, BaseMismatchError
from onelora_compile.kinds import is_linear
from onelora_compile.printable import percent, shortened
from onelora_compile.progress import over_weights
from onelora_compile.weights.adapter_content import AdapterFile
from onelora_compile.weights.fingerprint import fingerprint_of
from onelora_compile.weights.layers import STATISTICS, base_model_of

PathLike = str | os.PathLike[str]


def check_model(
    root: nn.Module,
    targets: dict[str, Target],
    current: Mapping[str, Tensor],
    file: AdapterFile,
    path: PathLike,
) -> None:
    """Whether a file fits a model.

    Args:
        root: the model.
        targets: the weights that have to have a vector in the file.
        current: what has to have been trained besides, by name.
        file: the adapter.
        path: what messages call it.

    Raises:
        AdapterFileError: other modules or shapes.
        BaseMismatchError: it was trained on another base.
    """
    # A file that was an ONNX model's adapter in between has no counters, which say nothing to a model in evaluation.
    counted = {name for name, value in current.items() if not value.is_floating_point()} - set(file.saved)
    counted |= set(left_to_the_base(current, file))
    for what, here, there in (
        ("vectors", set(targets), set(file.vectors)),
        ("trained parameters", set(current) - counted, set(file.saved)),
    ):
        if here != there:
            raise AdapterFileError(
                f"{path} and the adapted model have different {what}. "
                f"Missing in the file: {shortened(sorted(here - there))}. "
                f"Missing in the model: {shortened(sorted(there - here))}. Detach the model and load again to take the "
                "file's selection"
            )
    for name, value in file.saved.items():
        if value.shape != current[name].shape:
            raise AdapterFileError(
                f"{path}: {name!r} is {list(value.shape)} in the file and {list(current[name].shape)} in the model"
            )
    if file.unknown:
        _check_named(root, current, file, path)
    check_base(targets, file, path)


def left_to_the_base(names: Iterable[str], file: AdapterFile) -> list[str]:
    """The running statistics of batch norms that a file has none of, as PEFT's: they are the base's there."""
    held = {name.rpartition(".")[0] for name in file.saved}
    return [name for name in names if name.endswith(STATISTICS) and name.rpartition(".")[0] not in held]


def _check_named(root: nn.Module, current: Mapping[str, Tensor], file: AdapterFile, path: PathLike) -> None:
    """Of an adapter of PEFT: whether it has all that its configuration names, and nothing that is tied here."""
    config = file.config
    if not isinstance(config.target_modules, str):
        linears = [name for name, module in named_modules(root) if is_linear(module)]
        linears = [one for one in linears if matches(config.target_modules, one) and one not in file.vectors]
        apart = [*(config.exclude_modules or ()), *config.modules_to_save]
        inside = tuple(f"{one}." for one in config.modules_to_save)
        if missing := [one for one in linears if not matches(apart, one) and not one.startswith(inside)]:
            raise AdapterFileError(
                f"{path} has no tensors for {shortened(missing)}, which its target_modules select: they would stay the "
                "base's"
            )
    if tied := tied_names(root, current):
        raise AdapterFileError(
            f"{path} trained {shortened(tied)} apart (modules_to_save), which is tied to other parameters in this "
            f"model ({shortened(other for others in tied.values() for other in others)}): they would change with it. "
            "Untie them first"
        )


def on_the_base(targets: Mapping[str, Target], originals: Mapping[str, Tensor]) -> dict[str, Target]:
    """The same targets with the base's weights, also of those that an adapter trains as a whole.

    Nothing of the model is changed, which other threads may run.
    """
    return {name: _on_the_base(name, target, originals) for name, target in targets.items()}


def _on_the_base(name: str, target: Target, originals: Mapping[str, Tensor]) -> Target:
    original = originals.get(f"{name}.weight".removeprefix(".") if target.parameter == "weight" else name)
    if original is None:
        return target
    module = target.module
    other = object.__new__(type(module))
    vars(other).update(vars(module))
    vars(other)["_parameters"] = {
        **module._parameters,
        target.parameter: nn.Parameter(original, original.requires_grad),
    }
    return dataclasses.replace(target, module=other)


def check_base(targets: dict[str, Target], file: AdapterFile, path: PathLike) -> None:
    """Whether an adapter was trained on these weights.

    Raises:
        AdapterFileError: a vector does not fit its weight.
        BaseMismatchError: other weights.
    """
    wrong = []
    for name, target in over_weights("check of the base", targets):
        expected, found = file.fingerprints.get(name), (target.out_features, target.in_features)
        shape = expected.shape if expected else _shape(file, name, target.in_features)
        if found != shape or file.vectors[name].shape != target.shape:
            raise AdapterFileError(
                f"{path}: the vector {list(file.vectors[name].shape)} of {name!r} is for a weight of "
                f"{list(shape)}; the model's is {list(found)} and takes {list(target.shape)}"
            )
        if expected and not (here := fingerprint_of(target, with_levels=False)).agrees(expected):
            wrong.append(f"{name} (differs by {percent(here.distance(expected))})")
    if wrong:
        raise BaseMismatchError(
            f"{path} was trained on another base: {len(wrong)} of {len(targets)} weights are not those it was trained "
            f"with: {shortened(wrong, 5)}. Load the base model that it was trained on (a merged or further trained "
            "model is another base)"
        )


def _shape(file: AdapterFile, name: str, in_features: int) -> tuple[int, int]:
    """Of the weight of a vector whose fingerprint is not known; in_features where the file does not tell."""
    layer = file.layers.get(name)
    return file.vectors[name].numel(), in_features if layer is None or layer.inputs is None else prod(layer.inputs)


def unchecked(root: nn.Module, file: AdapterFile, path: PathLike) -> str:
    """The warning that a file does not know its base."""
    named = f", which it says is {file.base_model!r}" if file.base_model else ""
    here = base_model_of(root)
    model = f"; the model is from {here!r}" if here and here != file.base_model else ""
    return (
        f"{path} has no fingerprints of its base{named}{model}: names and shapes fit, but whether it was trained on "
        "these weights could not be checked. onelora.save_adapter writes a file that knows"
    )


def tied_names(root: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The other names of trained parameters that are used in several places."""
    found: dict[str, tuple[str, ...]] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean_name(name))
    for name, value in trained.items():
        if others := tuple(one for one in names.get(id(value), ()) if one != name):
            found[name] = others
    return found
