"""The builder's side of tensorrt_double.py: an engine is its ONNX model and what was asked for, as JSON."""

import base64
import json
import os
from typing import Any

import onnx


def builder_side(real, faults, checked):
    """The classes that a program makes itself, by name."""

    class Builder:
        num_DLA_cores = 0

        def __init__(self, log):
            self.log = log

        def create_builder_config(self):
            return checked("IBuilderConfig", Config())

        def create_network(self, flags=0):
            return checked("INetworkDefinition", Network(flags))

        def create_optimization_profile(self):
            return checked("IOptimizationProfile", Profile())

        def build_serialized_network(self, network, config):
            network, config = network._double, config._double
            if "build" in faults:
                self.log.log(real.ILogger.Severity.ERROR, faults["build"])
                return None
            dynamic = {value.name for value in network.inputs() if -1 in shape_of(value)}
            ranges = {name: shapes for profile in config.profiles for name, shapes in profile.items()}
            if dynamic - set(ranges):
                self.log.log(real.ILogger.Severity.ERROR, "Network has dynamic inputs, but no optimization profile")
                return None
            plan = {
                "model": base64.b64encode(network.model.SerializeToString()).decode(),
                "ranges": ranges,
                "marked": network.marked,
                "flags": network.flags,
                "config": sorted(str(flag).rsplit(".", 1)[-1] for flag in config.flags),
                "level": config.builder_optimization_level,
                "workspace": config.workspace,
                "cache": len(config.cache),
            }
            return json.dumps(plan).encode()

    class Config:
        def __init__(self):
            self.flags, self.profiles, self.cache = set(), [], b""
            self.builder_optimization_level = self.workspace = self.progress_monitor = None
            self.num_compute_capabilities = 0

        def set_flag(self, flag):
            self.flags.add(flag)

        def get_flag(self, flag):
            return flag in self.flags

        def clear_flag(self, flag):
            self.flags.discard(flag)

        def set_compute_capability(self, capability, index):
            assert index < self.num_compute_capabilities

        def set_memory_pool_limit(self, pool, pool_size):
            self.workspace = pool_size

        def add_optimization_profile(self, profile):
            self.profiles.append(profile._double.ranges)
            return 0

        def create_timing_cache(self, content):
            return None if content == b"damaged" else checked("ITimingCache", Cache(bytes(content) + b"."))

        def set_timing_cache(self, cache, ignore_mismatch):
            self.cache = cache._double.content
            return True

        def get_timing_cache(self):
            return checked("ITimingCache", Cache(self.cache))

    class Cache:
        def __init__(self, content):
            self.content = content

        def serialize(self):
            return self.content

    class Profile:
        def __init__(self):
            self.ranges = {}

        def set_shape(self, name, low, best, high):
            self.ranges[name] = [low, best, high]

    class Network:
        @property
        def num_layers(self):
            return len(self.model.graph.node)

        def get_layer(self, index):
            node = self.model.graph.node[index]
            inferred = onnx.shape_inference.infer_shapes(self.model).graph.value_info
            known = {value.name: value for value in [*inferred, *self.model.graph.output]}
            return checked("ILayer", Layer([known[name] for name in node.output if name in known], self.model.graph))

        def mark_output(self, tensor):
            self.model.graph.output.append(tensor._double.value)

        def __init__(self, flags):
            self.flags, self.marked = flags, []
            self.model: Any = None  # until it is parsed

        def inputs(self):
            constants = {tensor.name for tensor in self.model.graph.initializer}  # an input with a default is one too
            return [value for value in self.model.graph.input if value.name not in constants]

        @property
        def num_inputs(self):
            return len(self.inputs())

        @property
        def num_outputs(self):
            return len(self.model.graph.output)

        def get_input(self, index):
            return checked("ITensor", Slot(self.inputs()[index]))

        def get_output(self, index):
            return checked("ITensor", Slot(self.model.graph.output[index]))

        def mark_weights_refittable(self, name):
            found = name in {tensor.name for tensor in self.model.graph.initializer}
            self.marked += [name] if found else []
            return found

    class Layer:
        type = real.LayerType.ELEMENTWISE

        def __init__(self, values, graph):
            numbers = [value for value in values if value.type.tensor_type.elem_type in NUMBERS]
            self.values, self.graph, self.num_outputs = numbers, graph, len(numbers)

        def get_output(self, index):
            return checked("ITensor", Slot(self.values[index], self.graph))

    class Slot:
        def __init__(self, value, graph=None):
            self.value = value
            self.is_network_output = graph is not None and value.name in {one.name for one in graph.output}
            self.name, self.dtype, self.shape = value.name, dtype_of(real, value), shape_of(value)

    class Parser:
        def __init__(self, network, log):
            self.network, self.errors = network._double, []

        def parse_from_file(self, path):
            with open(path, "rb") as file:
                return self.parse(file.read(), path)

        def parse(self, content, path):
            try:
                self.network.model = onnx.load_model_from_string(content)
                onnx.external_data_helper.load_external_data_for_model(self.network.model, os.path.dirname(path))
            except Exception as error:
                self.errors = [str(error)]
            return not self.errors

        @property
        def num_errors(self):
            return len(self.errors)

        def get_error(self, index):
            return checked("ParserError", ParserError(self.errors[index]))

    class ParserError:
        def __init__(self, text):
            self.text = text

        def code(self):
            return real.ErrorCode.MODEL_DESERIALIZE_FAILED

        def desc(self):
            return self.text

        def node(self):
            return -1

        node_name = node_operator = lambda self: ""

    return {"Builder": Builder, "OnnxParser": Parser}


NUMBERS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64)


def dtype_of(real, value):
    """The dtype of an input or output in TensorRT."""
    kinds = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}
    kind = kinds[value.type.tensor_type.elem_type]
    # TensorRT 8 has no int64: such inputs become int32.
    return getattr(real.DataType, kind if hasattr(real.DataType, kind) else "INT32")


def shape_of(value):
    """-1 for dynamic sizes."""
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)
