"""Arithmetic over adapters, exact since they add: Σ wᵢ (bᵢ 1ᵀ) = (Σ wᵢ bᵢ) 1ᵀ."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapter import unwrap
from onelora_compile.adapting.adapter_state import adapted_weights, state_of
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.pool import check_name
from onelora_compile.adapting.select_targets import Selection
from onelora_compile.errors import ConfigError, OneLoRAWarning
from onelora_compile.file_names import as_path
from onelora_compile.many_adapters.names import put_adapter
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_content import AdapterFile, Part, check_finite, digest, float32
from onelora_compile.weights.adapter_file import base_fingerprints, content_of, read_adapter, write_adapter
from onelora_compile.weights.adapter_metadata import PRODUCER
from onelora_compile.weights.atomic_write import refuse_overwriting, replacing
from onelora_compile.weights.base_values import base_values
from onelora_compile.weights.combine_trained import (
    ADD,
    REFUSE,
    BaseValue,
    TrainedSum,
    check_word,
    combined_trained,
    weighted_sum,
)
from onelora_compile.weights.file_kinds import ADAPTER, GGUF_FILE, refuse_other_kinds
from onelora_compile.weights.layers import without_still_statistics
from onelora_compile.weights.same_base import (
    Term,
    all_names,
    check_same_layers,
    layers_together,
    not_compared,
    same_weights,
    uses_together,
)

PathLike = str | os.PathLike[str]
Weights = Mapping[str, float] | Mapping[Path, float] | Mapping[PathLike, float]  # the keys of a Mapping are invariant


def combine(
    adapters: Weights,
    out: PathLike | None = None,
    *,
    trained: str = REFUSE,
    base: PathLike | Mapping[str, Tensor] | None = None,
    model: nn.Module | None = None,
    adapter_name: str | None = None,
) -> AdapterFile:
    """Add adapters of one base: an adapter whose vectors are Σ wᵢ bᵢ. No model is needed.

    One adapter with a weight scales it, -1 negates it. Of a layer that an adapter leaves alone its vector is zero. The
    result is an adapter as any other: `load_adapter`, `fold_onnx`, `convert_adapter` and `OnnxRunner` read it. Its
    `parts` say what it was made of.

    Heads (modules_to_save), norms and statistics of batch norms replace values of the base. What adds is what training
    changed, value - base value; files have no base values. So `trained` says what becomes of them. Statistics that are
    the base's still are left out.

    Dtype: float64 arithmetic, rounded once: vectors to float32 as every adapter file, what else was trained to the
    widest dtype that it has in the adapters. `config.vector_dtype` is the widest of the adapters', too.

    Args:
        adapters: weights, finite numbers of any sign, by adapter: files of `save_adapter`, folders of PEFT, or `.gguf`.
        out: the file to write, replaced in one step; None writes none.
        trained: "refuse" raises where anything was trained besides vectors. "drop" leaves the base's values. "from:"
            and one of the adapters takes those of that one as they are. "add" adds what training changed, base + Σ wᵢ
            (valueᵢ - base). A head that began at random, another one in each training, does not add.
        base: for "add", where the weights do not add up to 1: a .safetensors file of the base, or its `state_dict()`.
            For a `.gguf`, as in `read_adapter`: the base's folder, its `config.json`, or its own `.gguf`.
        model: one that holds the adapters, which then are names and not files (`onelora.adapters`). It knows its base.
        adapter_name: under which the model gets the sum; it waits there until `set_adapter`.

    Returns:
        The adapter, as `read_adapter` reads it.

    Raises:
        ConfigError: no adapter, a weight that is no finite number, one adapter twice; `out` is an input or a file of
            another kind; `trained` has to be decided, or base values are needed.
        AdapterFileError: a damaged file; layers of different kind or size; a sum that its dtype can't hold; what can't
            be added.
        StateError: the model has no adapter of that name, or a `disabled` or `rows` block is open.
        BaseMismatchError: the adapters, or the values of `base`, are of different bases.
        FileNotFoundError: there is no such file.
        OSError: `out` can't be written; an old file is left as it was.

    An adapter that can't be compared with the others, as PEFT keeps no fingerprints, is a `OneLoRAWarning`.

    Example:
        onelora.combine({"french.safetensors": 0.7, "formal.safetensors": -0.3}, out="mix.safetensors")
        onelora.combine({"french": 0.7, "formal": -0.3}, model=model, adapter_name="mix")
    """
    check_word(trained)
    if model is not None:
        return _of_model(model, adapters, out, trained, base, adapter_name)
    if adapter_name is not None:
        raise ConfigError(f"adapter_name={adapter_name!r} is a name in a model: give model= too, or out= for a file")
    given = _given(adapters)
    if out is not None:
        _check_out(out, [path for path, _ in given], base)
    rows_of, values = _parted(base, [path for path, _ in given])
    if values is not None and trained != ADD:
        raise ConfigError(f"base= is for an adapter {GGUF_FILE}, or for trained={ADD!r}, not for {trained!r}")
    terms = [Term(str(path), weight, read_adapter(path, base=rows_of.get(path))) for path, weight in given]
    made = combined(terms, trained, None if values is None else base_values(values))
    if apart := not_compared(terms):
        warnings.warn(
            "whether all adapters are of one base could not be checked: no fingerprint is in common with "
            f"{shortened(apart)} (PEFT keeps none); names and shapes fit",
            OneLoRAWarning,
            stacklevel=2,
        )
    if out is not None:
        with replacing(out) as beside:
            write_adapter(made, beside)
    return made


def _of_model(
    model: nn.Module, adapters: Any, out: PathLike | None, trained: str, base: Any, adapter_name: str | None
) -> AdapterFile:
    root = unwrap(model)
    state = state_of(root, "combine adapters")
    if adapter_name is not None:
        check_name(adapter_name)
    if base is not None:
        raise ConfigError("base= is for files: a model knows the values of its base")
    if out is not None:
        refuse_other_kinds(out, ADAPTER)
    given = [(check_name(name), _weight(name, weight)) for name, weight in _mapping(adapters).items()]
    known = base_fingerprints(root, state)
    terms = [Term(name, weight, content_of(root, state, name, known)) for name, weight in given]
    made = combined(terms, trained, lambda name, others, known: state.originals[name])
    if out is not None:
        with replacing(out) as beside:
            write_adapter(made, beside)
    if adapter_name is not None:
        present = adapted_weights(root)
        chosen = Selection({name: present[name] for name in made.vectors}, [], {})
        put_adapter(root, state, adapter_name, made.config, chosen, made.vectors, made.saved)
    return made


def combined(terms: Sequence[Term], trained: str = REFUSE, base_value: BaseValue | None = None) -> AdapterFile:
    """The sum of adapters that are read already.

    Args:
        terms: at least one, each with a name of its own.
        trained: as in `combine`.
        base_value: the value of a tensor before training.

    Raises:
        ConfigError, AdapterFileError, BaseMismatchError: as `combine`.
    """
    names = all_names(term.file.vectors for term in terms)
    parts = _parts(terms)
    terms = [_moved(term) for term in terms]
    files = [term.file for term in terms]
    check_same_layers(terms)
    fingerprints = same_weights(terms)
    besides = combined_trained(terms, trained, base_value)
    vectors = {
        name: weighted_sum([(t.weight, t.file.vectors[name]) for t in terms if name in t.file.vectors], torch.float32)
        for name in names
    }
    check_finite(vectors | besides.saved, "the sum does not fit its dtype: take smaller weights")
    tasks = {file.task_type for file in files}
    return AdapterFile(
        config=_config(files, names, besides),
        vectors=vectors,
        saved=besides.saved,
        fingerprints=fingerprints,
        producer=PRODUCER,
        bases=besides.bases,
        aliases=besides.aliases,
        uses=uses_together(files),
        layers=layers_together(files),
        base_model=next((file.base_model for file in files if file.base_model), ""),
        task_type=tasks.pop() if len(tasks) == 1 else "",
        parts=parts,
    )


def _parts(terms: Sequence[Term]) -> tuple[Part, ...]:
    apart = not_compared(terms)
    return tuple(
        Part(
            term.weight,
            Path(term.name).name or term.name,
            digest({name: float32(vector) for name, vector in term.file.vectors.items()}),
            term.name not in apart,
        )
        for term in terms
    )


def _moved(term: Term) -> Term:
    """A term without the statistics that training did not move: they are the base's."""
    saved = without_still_statistics(term.file)
    bases = {name: known for name, known in term.file.bases.items() if name in saved}
    return dataclasses.replace(term, file=dataclasses.replace(term.file, saved=saved, bases=bases))


def _config(files: Sequence[AdapterFile], names: list[str], besides: TrainedSum) -> OneLoRAConfig:
    """The selection that all have, else the layers by name."""
    first = files[0].config
    axes: dict[str, int] = {}
    for file in files:
        axes |= file.config.target_parameters
    made = dataclasses.replace(
        first,
        modules_to_save=besides.modules_to_save,
        train_norms=besides.train_norms,
        vector_dtype=_widest([file.config.vector_dtype for file in files]),
        target_parameters=axes,
    )
    selections = [dataclasses.replace(file.config, vector_dtype=made.vector_dtype) for file in files]
    if all(one == made for one in selections):
        return made
    return dataclasses.replace(made, target_modules=names, exclude_modules=None)


def _widest(dtypes: Sequence[torch.dtype | None]) -> torch.dtype | None:
    """The widest dtype of vectors; None is float32, and float64 for a float64 weight."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    widest = functools.reduce(torch.promote_types, [torch.float32 if one is None else one for one in dtypes])
    return None if None in dtypes and widest == torch.float32 else widest


def _given(adapters: Any) -> list[tuple[Path, float]]:
    """The paths and weights of a call, checked."""
    found: list[tuple[Path, float]] = []
    for key, weight in _mapping(adapters).items():
        path = as_path(key, "an adapter")
        if path.name == str(path) and not path.suffix and not path.exists():
            raise FileNotFoundError(
                f"there is no adapter file {path}; for a name of an adapter in a model give model= too"
            )
        if twice := [one for one, _ in found if _same(one, path)]:
            raise ConfigError(f"{path} and {twice[0]} are one file: give it once, with the sum of its weights")
        found.append((path, _weight(path, weight)))
    return found


def _mapping(adapters: Any) -> Mapping[Any, Any]:
    if not isinstance(adapters, Mapping):
        raise ConfigError(f"adapters={adapters!r} is no dict of adapters and weights: {{'a.safetensors': 0.7}}")
    if not adapters:
        raise ConfigError("there is no adapter to combine: give adapters and weights, {'a.safetensors': 0.7}")
    return adapters


def _same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _weight(path: Path | str, weight: Any) -> float:
    try:
        value = float(weight) if not isinstance(weight, bool) and isinstance(weight, numbers.Real) else math.nan
    except OverflowError:  # an int of hundreds of digits
        value = math.inf
    if not math.isfinite(value):
        raise ConfigError(f"the weight of {path} is {weight!r}: give a finite number")
    return value


def _parted(base: Any, paths: Sequence[Path]) -> tuple[dict[Path, PathLike], Any]:
    """A base for each `.gguf`, whose rows it orders, or one that has values: a `.safetensors` file, a mapping."""
    files = [path for path in paths if path.suffix == GGUF_FILE]
    if base is None or not files or isinstance(base, Mapping) or as_path(base, "base").suffix == ADAPTER:
        return {}, base
    return dict.fromkeys(files, base), None


def _check_out(out: PathLike, paths: Sequence[Path], base: PathLike | Mapping[str, Tensor] | None) -> None:
    inside = [one for path in paths if path.is_dir() for one in path.iterdir()]
    refuse_overwriting(out, [*paths, *inside, *([] if base is None or isinstance(base, Mapping) else [base])])
    refuse_other_kinds(out, ADAPTER)
