"""What an adapter is, as the README.md of a repository on the Hugging Face Hub: its YAML, and a text to read.

The YAML is huggingface_hub's (`ModelCard`). The base is named where it has an id on the Hub: a path of this machine
tells nobody anything, and the Hub refuses it.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onelora_compile.adapting.adapter import unwrap
from onelora_compile.adapting.adapter_state import state_of
from onelora_compile.errors import ConfigError, one_of
from onelora_compile.printable import bytes_text, shortened
from onelora_compile.table import grouped, spread
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_file import ONELORA, AdapterFile, base_fingerprints, content_of, read_adapter
from onelora_compile.weights.fingerprint import Fingerprint
from onelora_compile.weights.hub_download import HUB, LIBRARY, hub_library
from onelora_compile.weights.peft_config import TASKS_WITH_HEADS
from onelora_compile.weights.peft_folder import PEFT, PEFT_FORMATS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

ARXIV = "2503.08333"
# PEFT's words for what a model does: the Hub's, and the class of transformers that loads one.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
}
_ROWS = 30  # of the table of weights; names that differ in numbers share one


def model_card(
    adapter: nn.Module | AdapterFile | str | os.PathLike[str],
    name: str,
    *,
    format: str = ONELORA,
    metrics: Mapping[str, Any] | Sequence[EvalResult] = (),
) -> ModelCard:
    """Describe an adapter for those who get it: method, base, how the base is checked, numbers, how to load it.

        card = onelora.model_card(model, "owner/name", metrics={"accuracy": 0.93})
        card.data["license"] = "apache-2.0"
        onelora.push_to_hub(model, "owner/name", card=card)

    The result is huggingface_hub's: `card.data` and `card.text` can be changed, and `card.save("README.md")` writes it.
    Nothing is sent. A licence is yours to choose.

    Args:
        adapter: the adapted model, of which the active adapter is meant; or what `read_adapter` takes or gives.
        name: what the reader will load: an id on the Hub, or the name of a file.
        format: of what the reader gets, as in `save_adapter`: "onelora", "peft" or "peft-miss".
        metrics: values by name, for the text; or `EvalResult`s of huggingface_hub, which say on which data, and which
            the Hub shows beside the text too.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        StateError: the model is not adapted; a `disabled` block is open.
        ConfigError: an unknown format; metrics that are neither.
        AdapterFileError: a damaged file.
        FileNotFoundError: there is no such file.
    """
    hub = hub_library(f"write a model card for the {HUB}")
    one_of("format", format, [ONELORA, *PEFT_FORMATS])
    file = _content(adapter)
    base = _hub_base(file)
    rows, fields = _metrics(metrics, name, hub)
    data = hub.ModelCardData(
        base_model=base or None,
        base_model_relation="adapter" if base else None,
        library_name="peft" if format in PEFT_FORMATS else LIBRARY["library_name"],
        pipeline_tag=_TASKS.get(file.task_type, (None, ""))[0],
        tags=["1lora", *(["lora"] if format == PEFT else [])],
        **fields,
    )
    sections = [_title(name, base), _use(file, name, base, format), _method(file), _base(file, base)]
    sections += [_table("Metrics", ("metric", "value"), rows)] if rows else []
    text = "\n\n".join(sections)
    card: ModelCard = hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    return card


def _content(adapter: nn.Module | AdapterFile | str | os.PathLike[str]) -> AdapterFile:
    if isinstance(adapter, AdapterFile):
        return adapter
    if not isinstance(adapter, nn.Module):
        return read_adapter(adapter)
    root = unwrap(adapter)
    state = state_of(root, "describe")
    return content_of(root, state, None, base_fingerprints(root, state))


def _hub_base(file: AdapterFile) -> str:
    """The base's id on the Hub; "" where the adapter names none, or a path."""
    utils: Any = importlib.import_module("huggingface_hub.utils")  # does not say which of its names are public
    try:
        utils.validate_repo_id(file.base_model)
    except utils.HFValidationError:
        return ""
    return "" if os.path.exists(file.base_model) else file.base_model


def _metrics(
    metrics: Mapping[str, Any] | Sequence[EvalResult], name: str, hub: Any
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Rows for the text, and fields for the YAML."""
    if isinstance(metrics, Mapping):
        found = {str(key): value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        return [(key, str(value)) for key, value in found.items()], {"metrics": list(found)} if found else {}
    if not all(isinstance(one, hub.EvalResult) for one in metrics):
        raise ConfigError(
            f"metrics={metrics!r}: give values by name, a dict, or a list of huggingface_hub's EvalResult"
        )
    rows = [(f"{one.metric_name or one.metric_type} on {one.dataset_name}", str(one.metric_value)) for one in metrics]
    return rows, {"eval_results": list(metrics), "model_name": name.rpartition("/")[2]} if rows else {}


def _title(name: str, base: str) -> str:
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    return (
        f"# {name.rpartition('/')[2]}\n\nAn adapter{of} by [1LoRA](https://arxiv.org/abs/{ARXIV}). Card "
        f"written by onelora-compile {__version__} on PyTorch {torch.__version__}."
    )


def _use(file: AdapterFile, name: str, base: str, format: str) -> str:
    kind = _TASKS.get(file.task_type, (None, ""))[1]
    if base and kind:
        labels = _labels(file)
        lines = [
            f"from transformers import {kind}\n",
            f'model = {kind}.from_pretrained("{base}"{f", num_labels={labels}" if labels else ""})',
        ]
    else:
        lines = [f"\nmodel = ...  # {base or 'the base'}, as it was before onelora.adapt"]
    ours = ["import onelora_compile as onelora", *lines, f"onelora.load_adapter(model, {json.dumps(name)})"]
    text = f"## Use\n{_code(ours)}"
    if format in PEFT_FORMATS:
        theirs = ["from peft import PeftModel", *lines, f"model = PeftModel.from_pretrained(model, {json.dumps(name)})"]
        text += f"\n\nor, with PEFT:\n{_code(theirs)}"
    return text


def _labels(file: AdapterFile) -> int | None:
    """How many labels a trained head tells apart, where transformers has to be told."""
    heads = TASKS_WITH_HEADS.get(file.task_type, ())
    found = [one.shape[0] for name, one in file.saved.items() if one.ndim == 2 and {*name.split(".")} & {*heads}]
    return int(found[-1]) if found and file.task_type != "QUESTION_ANS" else None


def _method(file: AdapterFile) -> str:
    numbers = sum(vector.numel() for vector in file.vectors.values())
    saved = sum(tensor.numel() for tensor in file.saved.values())
    rows = [("vectors", f"{len(file.vectors)}, {numbers:,} numbers, {bytes_text(4 * numbers)}")]
    rows += [("trained besides", f"{shortened(sorted(file.saved), 6)}: {saved:,} numbers")] if saved else []
    rows += [("target modules", _patterns(file.config.target_modules))]
    rows += [("excluded", _patterns(file.config.exclude_modules))] if file.config.exclude_modules else []
    rows += [("sum of", ", ".join(f"{part.weight:.12g} * {part.name}" for part in file.parts))] if file.parts else []
    return (
        "## Method\n"
        "Each adapted linear `y = W x + c` becomes `y = W x + c + b * sum(x)`, that is `W + b 1ᵀ`, with one trained "
        f"vector `b` of `out_features` numbers. The base is frozen. Quercia et al., arXiv {ARXIV}.\n\n"
        f"{_table('', ('', ''), rows)}"
    )


def _patterns(patterns: str | Sequence[str] | None) -> str:
    return patterns if isinstance(patterns, str) else shortened(patterns or (), 6)


def _base(file: AdapterFile, base: str) -> str:
    named = f"[{base}](https://huggingface.co/{base})" if base else "Not named: it has no id on the Hub"
    if not file.fingerprints:
        return f"## Base\n{named}. The adapter has no fingerprints of its weights, so loading can't check them."
    alike = grouped(file.fingerprints.items(), alike=_shape)
    rows = [(f"`{name}`", *_shape(ones[0]), spread([one.norm for one in ones], ".4g")) for name, ones in alike.items()]
    more = f"\n\n… and {len(rows) - _ROWS} rows more." if len(rows) > _ROWS else ""
    return (
        f"## Base\n{named}. The adapter holds a fingerprint of each of {len(file.fingerprints)} base weights: shape, "
        "norm and 16 random projections, which survive a change of dtype. onelora-compile compares them when it loads, "
        "exports or folds, and refuses another base.\n\n"
        f"{_table('', ('weight of', 'shape', 'dtype', 'Frobenius norm'), rows[:_ROWS])}{more}"
    )


def _shape(known: Fingerprint) -> tuple[str, str]:
    return str(list(known.shape)), known.dtype


def _code(lines: Iterable[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    return f"## {title}\n{text}" if title else text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
