"""Inputs for a model as users give them, each by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onelora_compile.errors import ConfigError

NO_INPUTS = "calibration= holds no inputs"


def feeds(inputs: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each input of a model, arrays by name; `fitted` makes them what the model declares.

    Args:
        inputs: one input or several, each a mapping, a sequence in the order of the names, or an array or tensor of a
            model with one; or a CalibrationDataReader of onnxruntime.
        names: what the model takes.

    Raises:
        ConfigError: other inputs than the model takes.
    """
    if hasattr(inputs, "get_next"):  # a CalibrationDataReader of onnxruntime.quantization
        inputs = iter(inputs.get_next, None)
    if isinstance(inputs, Mapping) or hasattr(inputs, "shape"):
        inputs = [inputs]
    for one in inputs:
        if isinstance(one, Mapping):
            feed = dict(one)
        else:
            values = list(one) if isinstance(one, (list, tuple)) else [one]
            if len(values) != len(names):
                raise ConfigError(f"a calibration input holds {len(values)} arrays; the model takes {list(names)}")
            feed = dict(zip(names, values, strict=True))
        if set(feed) != set(names):
            raise ConfigError(f"a calibration input names {sorted(feed)}; the model takes {list(names)}")
        yield {name: one.detach().cpu().numpy() if hasattr(one, "detach") else one for name, one in feed.items()}
