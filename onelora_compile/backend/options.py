"""The options of the backend: `torch.compile(model, backend="onelora", options={...})`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from onelora_compile.adapting.config import OneLoRAConfig, check_config
from onelora_compile.errors import ConfigError
from onelora_compile.passes.lowerings import LOWERINGS


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """Checked options.

    Args:
        config: for a model that was never given to `adapt`: how to adapt it at its first call.
        inner: the backend that compiles the rewritten graph: a name known to `torch.compile` or a callable.
        lowering: what to take, instead of the rule, for every linear that can take it.  "producer_consumer" is the
            rule, "fused_kernel" a kernel for GPUs (experimental: none has run it).  `explain` says which each got.
        inner_options: options of the inner backend; for Inductor any key of `torch._inductor.config`.
    """

    config: OneLoRAConfig = dataclasses.field(default_factory=OneLoRAConfig)
    inner: str | Callable[..., Any] = "inductor"
    inner_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lowering: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """Check what the user passed.

        Raises:
            ConfigError: an unknown key (the valid ones are listed) or a value of the wrong type.
        """
        options = dict(options or {})
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(
                f"backend 'onelora' has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}. "
                "Options of Inductor go into inner_options={...}"
            )
        parsed = cls(**options)
        check_config(parsed.config)
        if not isinstance(parsed.inner, str) and not callable(parsed.inner):
            raise ConfigError(f"option inner must be the name of a backend or a callable, got {parsed.inner!r}")
        if parsed.inner == "onelora":
            raise ConfigError("option inner='onelora' would call itself; use 'inductor', 'aot_eager', …")
        if parsed.lowering is not None and parsed.lowering not in LOWERINGS:
            raise ConfigError(f"option lowering={parsed.lowering!r}: there is {', '.join(map(repr, LOWERINGS))}")
        if not isinstance(parsed.inner_options, Mapping):
            raise ConfigError(f"option inner_options must be a dict, got {parsed.inner_options!r}")
        return parsed
