"""What of a model is PEFT's: the adapters that it has put on the model, and the copies of modules that it trains."""

from __future__ import annotations

import sys

from torch import nn

PEFT_PART = "a part of an adapter of PEFT"


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether PEFT has put this module in the place of one of the base, which is its `base_layer`."""
    return _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


def peft_parts(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that PEFT has made: all of its layers but the base's, and what it trains as a whole."""
    parts: set[nn.Module] = set()
    base: set[nn.Module] = set()
    for module in model.modules():
        if is_tuner_layer(module):
            parts.update(module.modules())
            if isinstance(inner := module._modules.get("base_layer"), nn.Module):
                base.update(inner.modules())
        elif _is(module, "peft.utils.other", "AuxiliaryTrainingWrapper"):
            parts.update(module.modules())
    return {one for one in parts if one not in base or is_tuner_layer(one)}


def _is(module: nn.Module, home: str, name: str) -> bool:
    kind = getattr(sys.modules.get(home), name, None)  # where it is not imported, no module can be of its classes
    return kind is not None and isinstance(module, kind)
