"""From an ONNX model to an engine, with TensorRT 8.5 to 11 or TensorRT-RTX, by what it has and not by its number."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from .logger import flag, made
from .messages import Refused
from .progress import building


class Build:
    """One build: the builder, its configuration, and the network that the parser fills.

    The parser holds the network's weights, so all of them live as long as this object.

    Args:
        trt: the module.
        log: its logger.
        strong: whether the dtypes of the ONNX model are the engine's, where this version can (`can_be_strong`).

    Raises:
        Refused: TensorRT gives no builder, mostly for want of a GPU.
    """

    def __init__(self, trt: Any, log: Any, strong: bool) -> None:
        self.trt, self.log = trt, log
        self.builder: Any = made(trt, log, "builder", trt.Builder)
        self.config: Any = self.builder.create_builder_config()
        names = ["EXPLICIT_BATCH"] + (["STRONGLY_TYPED"] if strong else [])  # the first is gone in TensorRT 11
        found = [flag(trt, "NetworkDefinitionCreationFlag", name) for name in names]
        self.network: Any = self.builder.create_network(sum(1 << int(one) for one in found if one is not None))
        self.parser: Any = trt.OnnxParser(self.network, log)

    def parse(self, path: str, content: bytes | None = None) -> None:
        """Read a model into the network: the file, or other content whose external weights are beside the file.

        Raises:
            Refused: TensorRT can't read it; `said` names the nodes.
        """
        parser = self.parser
        if not (parser.parse_from_file(path) if content is None else parser.parse(content, path)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise Refused("read", self.log, said=[_parser_text(error) for error in errors])

    def allow(self, dtypes: Sequence[str]) -> None:
        """Let the layers of a weakly typed network take other dtypes: "FP16", "BF16", "INT8", which must be there."""
        for name in dtypes:
            self.config.set_flag(flag(self.trt, "BuilderFlag", name))

    def targets(self, capabilities: Sequence[str]) -> None:
        """Build for these GPUs ("SM86"), of which TensorRT-RTX alone knows others than the one at hand."""
        config = self.config
        if capabilities and flag(self.trt, "ComputeCapability", capabilities[0]) is not None:
            config.num_compute_capabilities = len(capabilities)
            for index, name in enumerate(capabilities):
                config.set_compute_capability(flag(self.trt, "ComputeCapability", name), index)

    def workspace(self, limit: int) -> None:
        """Bytes that a layer may use."""
        self.config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, limit)

    def optimization_level(self, level: int) -> bool:
        """How long the builder searches, 0 to 5; returns whether this version can be told (8.6 and newer)."""
        config = self.config
        if not hasattr(config, "builder_optimization_level"):
            return False
        config.builder_optimization_level = level
        return True

    def profile(self, shapes: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """One more profile: (smallest, usual, largest) shape of each dynamic input."""
        optimization_profile = self.builder.create_optimization_profile()
        for name, (low, usual, high) in shapes.items():
            optimization_profile.set_shape(name, tuple(low), tuple(usual), tuple(high))
        self.config.add_optimization_profile(optimization_profile)

    def refittable(self, names: Sequence[str]) -> list[str]:
        """Let these weights be replaced in the engine, and nothing else; returns those that are not in the network.

        Only where `can_refit`.
        """
        network = self.network
        self.config.set_flag(flag(self.trt, "BuilderFlag", "REFIT_INDIVIDUAL"))
        return [name for name in names if not network.mark_weights_refittable(name)]

    def watch(self, names: Sequence[str]) -> list[str]:
        """Let inner values be outputs too; returns those that the network has under these names."""
        wanted, network, found = set(names), self.network, []
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            for tensor in (layer.get_output(place) for place in range(layer.num_outputs)):
                if tensor is not None and tensor.name in wanted and not tensor.is_network_output:
                    network.mark_output(tensor)
                    found.append(tensor.name)
        return found

    def use_timings(self, content: bytes) -> bool:
        """Use a timing cache, b"" for a new one; returns whether it is of this device and version.

        Where it is not, a new one is used.  Only where `has_timings`.
        """
        config = self.config
        cache = config.create_timing_cache(content)
        fits = cache is not None and bool(config.set_timing_cache(cache, False))
        if not fits and content:
            self.use_timings(b"")
        return fits

    def timings(self) -> Any:
        """The timing cache by now, None without one.  Worth keeping after a build that failed too."""
        cache = self.config.get_timing_cache()
        return cache.serialize() if cache is not None else None

    def plan(self, bar: Any) -> Any:
        """The engine, as a buffer; `bar` as in `building`.

        Raises:
            Refused: TensorRT can't build it.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        with building(self.trt, self.config, bar):
            plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is None:
            raise Refused("build", self.log)
        return plan


def can_be_strong(trt: Any) -> bool:
    """Whether a network can be strongly typed: TensorRT 9.1 and newer, TensorRT-RTX."""
    return flag(trt, "NetworkDefinitionCreationFlag", "STRONGLY_TYPED") is not None


def can_refit(trt: Any) -> bool:
    """Whether single weights can be made refittable: TensorRT 10.2 and newer, TensorRT-RTX."""
    return flag(trt, "BuilderFlag", "REFIT_INDIVIDUAL") is not None and hasattr(
        trt.INetworkDefinition, "mark_weights_refittable"
    )


def has_timings(trt: Any) -> bool:
    """Whether a timing cache does anything: TensorRT-RTX has the calls, which do nothing."""
    return not trt.__name__.startswith("tensorrt_rtx")


def _parser_text(error: Any) -> str:
    where = ""
    if hasattr(error, "node_name"):  # not in 8.x
        where = f"node {error.node_name() or error.node()} ({error.node_operator()}): "
    elif error.node() >= 0:
        where = f"node {error.node()}: "
    return f"{where}{error.code().name}: {error.desc()}"
