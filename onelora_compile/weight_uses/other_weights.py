"""Weights of linear ops that are no parameters of the model, so that they get no vector: buffers, what lies in a list.

self.register_buffer("table", w)    F.linear(x, self.table)
self.table = w                      F.linear(x, self.table)     a plain tensor
self.parts = [nn.Linear(8, 8)]      self.parts[0](x)            in a list that registers nothing
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from onelora_compile.kinds import is_linear, is_plain
from onelora_compile.passes.sites.linear_site import match_linear
from onelora_compile.weight_uses.follow_forward import Followed
from onelora_compile.weight_uses.tracer import CALLED

BUFFER = "the weight of a linear op, but a buffer and no parameter"
UNREGISTERED = (
    "the weight of a linear op, but registered nowhere in the model: it is in a plain attribute, a list or a dictionary"
)
COMPUTED = (
    "a weight that is computed from parameters (a parametrization); to adapt it, "
    "torch.nn.utils.parametrize.remove_parametrizations first"
)
_MOST, _DEEPEST = 1000, 4  # of a container: data beyond


class OtherWeights:
    """What the modules of a model hold besides their parameters and children, by where it is.

    Args:
        model: whose parameters and modules are known.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = set(model.modules())
        self._known = {id(one) for module in self._modules for one in module._parameters.values()}
        self._places: dict[int, tuple[nn.Module, str, str]] | None = None  # by the object or by its memory

    def held_by(self, module: nn.Module) -> bool:
        """Whether a module holds something that could be such a weight."""
        return next(self._held(module), None) is not None

    def used(self, way: Followed) -> dict[tuple[nn.Module, str], str]:
        """Those that are weights of linear ops in some code, by their holder and their place there; with the reason."""
        values: list[Any] = [
            _attribute(way, str(site.chain.root.target))
            for site in match_linear(way.gm)
            if site.chain is not None and site.kind != "conv" and str(site.chain.root.target) not in way.held
        ]
        called = (node.meta[CALLED] for node in way.gm.graph.nodes if CALLED in node.meta)
        values += (one for one in called if one not in self._modules)
        if values and self._places is None:
            own = ((module, one) for module in self._model.modules() for one in self._held(module))
            self._places = {}
            for module, (path, value, why) in own:
                self._places.setdefault(_key(value), (module, path, why))
        places = [self._places[_key(one)] for one in values if self._places and _key(one) in self._places]
        return {(module, path): why for module, path, why in places}

    def _held(self, module: nn.Module) -> Iterator[tuple[str, Any, str]]:
        """Matrices and modules that a module holds past its parameters and children: their place, they, and why."""
        for name, buffer in module._buffers.items():
            if self._may_be_weight(buffer):
                yield name, buffer, BUFFER
        fields = vars(module)
        for name in fields.keys() - {"_parameters", "_buffers", "_modules"}:
            if not name.endswith("_hooks"):
                yield from self._inside(name, fields[name], _DEEPEST)

    def _inside(self, path: str, value: Any, deep: int) -> Iterator[tuple[str, Any, str]]:
        if self._may_be_weight(value):
            yield path, value, UNREGISTERED
        elif isinstance(value, nn.Module) and value not in self._modules:
            if any(map(is_linear, value.modules())):
                yield path, value, UNREGISTERED
            for name, parameter in value.named_parameters():
                if self._may_be_weight(parameter):
                    yield f"{path}.{name}".removesuffix(".weight"), parameter, UNREGISTERED
        elif deep and isinstance(value, (list, tuple, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, one in itertools.islice(items, _MOST):
                yield from self._inside(f"{path}[{key!r}]", one, deep - 1)

    def _may_be_weight(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or not is_plain(value) or id(value) in self._known:
            return False
        return value.ndim > 1 and value.is_floating_point()


def parametrized(module: nn.Module) -> dict[tuple[nn.Module, str], str]:
    """The matrices that a module computes when they are read, with the reason why they have no vector."""
    if not is_parametrized(module):
        return {}
    lists: Any = module.parametrizations  # not the weight itself: to compute it may change buffers
    return {(module, name): COMPUTED for name, one in lists.items() if any(p.ndim > 1 for p in one.parameters())}


def _attribute(way: Followed, target: str) -> Any:
    found: Any = way.gm
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


def _key(value: Any) -> int:
    """What tells a module, or the memory of a tensor whatever view of it is read."""
    if isinstance(value, Tensor) and is_plain(value) and not value.is_meta:
        return value.untyped_storage().data_ptr() or id(value)
    return id(value)
