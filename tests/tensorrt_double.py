"""TensorRT without a GPU: an engine that ONNX Runtime computes, behind the API of the real bindings.

The module that this makes has the enumerations and classes of a real `tensorrt` (or `tensorrt_rtx`) binding; its
objects answer only to names that the real class has, and check each call against the signature in the real docstring.
What it computes is ONNX Runtime's, on memory that a `libcudart` of a few lines of C hands out.  It shows that the calls
exist and that the bytes go where they should; it shows nothing about TensorRT's own behaviour.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import types

import numpy as np
import onnx
import onnxruntime

_CUDART = r"""
#include <stdlib.h>
#include <string.h>
typedef void* P;
static long live = 0;
long allocations(void) { return live; }
int cudaMalloc(P* p, size_t n) { *p = malloc(n); live++; return *p ? 0 : 2; }
int cudaFree(P p) { free(p); live--; return 0; }
int cudaMemcpyAsync(P a, P b, size_t n, int kind, P s) {
  if (kind != 1 && kind != 2) return 21;
  memcpy(a, b, n);
  return s == (P)7 ? 0 : 400;
}
int cudaStreamCreate(P* s) { *s = (P)7; return 0; }
int cudaStreamSynchronize(P s) { return s == (P)7 ? 0 : 400; }
int cudaStreamDestroy(P s) { return 0; }
int cudaMemGetInfo(size_t* a, size_t* b) { *a = 1; *b = 2; return 0; }
int cudaDeviceGetAttribute(int* v, int what, int device) {
  *v = what == 75 ? 8 : 7;
  return what == 75 || what == 76 ? 0 : 1;
}
int cudaStreamBeginCapture(P s, int mode) { return s == (P)7 ? 0 : 400; }
int cudaStreamEndCapture(P s, P* g) { *g = (P)8; return 0; }
int cudaGraphInstantiateWithFlags(P* e, P g, unsigned long long f) {
  *e = (P)9;
  return g == (P)8 ? 0 : 1;
}
static long launched = 0;
long launches(void) { return launched; }
int cudaGraphLaunch(P e, P s) { launched++; return e == (P)9 && s == (P)7 ? 0 : 1; }
const char* cudaGetErrorString(int c) { return "an error of the double"; }
"""


def compile_cudart(folder):
    """A library with the functions of CUDA's runtime that works on the CPU's memory."""
    source, library = folder / "cudart.c", folder / "libcudart_double.so"
    source.write_text(_CUDART)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    return library


class Signature:
    """The overloads that the docstring of a bound function names."""

    def __init__(self, name, doc):
        self.name = name
        self.overloads = []
        for line in (doc or "").splitlines():
            if found := re.match(rf"\s*(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", line):
                self.overloads.append([_parameter(one) for one in _split(found[1]) if not one.startswith("self")])

    def check(self, trt, args, kwargs):
        if not self.overloads:
            raise AssertionError(f"{self.name} has no signature in its docstring")
        problems = [self._problem(trt, parameters, args, kwargs) for parameters in self.overloads]
        if all(problems):
            raise AssertionError(f"{self.name}{args}{kwargs}: {problems}; the real one takes {self.overloads}")

    def _problem(self, trt, parameters, args, kwargs):
        if len(args) > len(parameters):
            return f"{len(args)} arguments"
        names = [name for name, _, _ in parameters]
        if unknown := set(kwargs) - set(names[len(args) :]):
            return f"unknown {unknown}"
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, kind, optional in parameters:
            if name not in given:
                if not optional:
                    return f"{name} is missing"
            elif not _fits(trt, kind, given[name]):
                return f"{name}={given[name]!r} is no {kind}"
        return ""


def _split(text):
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += letter in "[(<"
        depth -= letter in "])>" and text[position - 1] != "-"
        if letter == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def _parameter(text):
    name, _, rest = text.partition(":")
    kind, equals, _ = rest.partition("=")
    return name.strip(), kind.strip(), bool(equals)


def _fits(trt, kind, value):
    simple = kind.rsplit(".", 1)[-1]
    if "Union" in kind or "object" in kind or "Callable" in kind or "Optional" in kind:
        return True
    if "int" in simple.lower() and simple.lower().startswith(("int", "typing.supportsint", "supportsint")):
        return isinstance(value, int) or hasattr(value, "__index__")
    if simple == "bool":
        return isinstance(value, bool)
    if simple == "str":
        return isinstance(value, str)
    if simple.lower() == "buffer":
        return isinstance(value, (bytes, bytearray, memoryview))
    if simple in ("Dims", "tuple"):
        return isinstance(value, tuple) and all(isinstance(size, int) for size in value)
    if simple == "list":
        return isinstance(value, list)
    real = getattr(trt, simple, None)
    if isinstance(real, type):
        return isinstance(value, real) or (isinstance(value, Checked) and issubclass(value._real, real))
    raise AssertionError(f"no check for a parameter of type {kind}")


class Checked:
    """An object that has what its real class has, and does what a double does."""

    def __init__(self, trt, real, double, calls):
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_double", double)
        object.__setattr__(self, "_trt", trt)
        object.__setattr__(self, "_calls", calls)

    def __getattr__(self, name):
        if not hasattr(self._real, name):
            raise AttributeError(f"{self._real.__name__} of {self._trt.__version__} has no {name!r}")
        self._calls.add(f"{self._real.__name__}.{name}")
        if isinstance(getattr(self._real, name), property):
            return getattr(self._double, name)
        signature = Signature(name, getattr(self._real, name).__doc__)

        def call(*args, **kwargs):
            signature.check(self._trt, args, kwargs)
            return getattr(self._double, name)(*args, **kwargs)

        return call

    def __setattr__(self, name, value):
        member = getattr(self._real, name, None)
        if not isinstance(member, property) or member.fset is None:
            raise AttributeError(f"{self._real.__name__} of {self._trt.__version__} has no {name!r} to set")
        self._calls.add(f"{self._real.__name__}.{name}")
        setattr(self._double, name, value)


def module(real, **faults):
    """A module like `real` whose engines ONNX Runtime computes.

    Faults: `build` makes the builder fail with that message, `missing` lets the refitter ask for weights of that name.
    """
    calls = set()
    made = types.ModuleType("tensorrt")
    made.__dict__.update({name: getattr(real, name) for name in dir(real) if not name.startswith("__")})
    made.__version__ = real.__version__
    made.calls = calls

    def checked(name, double):
        return Checked(real, getattr(real, name), double, calls)

    def constructor(name, double):
        def construct(*args):
            Signature("__init__", getattr(real, name).__init__.__doc__).check(real, args, {})
            calls.add(name)
            return checked(name, double(*args))

        return construct

    class Builder:
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
            dynamic = {value.name for value in network.model.graph.input if -1 in shape_of(value)}
            ranges = {name: shapes for profile in config.profiles for name, shapes in profile.items()}
            if dynamic - set(ranges):
                self.log.log(real.ILogger.Severity.ERROR, "Network has dynamic inputs, but no optimization profile")
                return None
            plan = {
                "path": network.path,
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

        def clear_flag(self, flag):
            self.flags.discard(flag)

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
        def __init__(self, flags):
            self.flags, self.marked, self.model, self.path = flags, [], None, ""

        def mark_weights_refittable(self, name):
            found = name in {tensor.name for tensor in self.model.graph.initializer}
            self.marked += [name] if found else []
            return found

    class Parser:
        def __init__(self, network, log):
            self.network, self.errors = network._double, []

        def parse_from_file(self, path):
            try:
                self.network.model, self.network.path = onnx.load(path), path
            except Exception as error:
                self.errors = [str(error)]
            return not self.errors

        def get_error(self, index):
            return checked("ParserError", ParserError(self.errors[index]))

        @property
        def num_errors(self):
            return len(self.errors)

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

    class Runtime:
        def __init__(self, log):
            pass

        def deserialize_cuda_engine(self, content):
            return checked("ICudaEngine", Engine(json.loads(bytes(content))))

    class Engine:
        def __init__(self, plan):
            self.plan = plan
            self.model = onnx.load(plan["path"], load_external_data=False)
            self.slots = {value.name: value for value in [*self.model.graph.input, *self.model.graph.output]}
            self.vectors = {}
            self.open()

        def open(self):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            if self.vectors:
                values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in self.vectors.values()]
                options.add_external_initializers(list(self.vectors), values)
            self.session = onnxruntime.InferenceSession(self.plan["path"], options)

        @property
        def num_io_tensors(self):
            return len(self.slots)

        @property
        def refittable(self):
            return bool(self.plan["marked"])

        def get_tensor_name(self, index):
            return list(self.slots)[index]

        def get_tensor_mode(self, name):
            inputs = {value.name for value in self.model.graph.input}
            return real.TensorIOMode.INPUT if name in inputs else real.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            kinds = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}
            kind = kinds[self.slots[name].type.tensor_type.elem_type]
            # TensorRT 8 has no int64: such inputs become int32.
            return getattr(real.DataType, kind if hasattr(real.DataType, kind) else "INT32")

        def get_tensor_shape(self, name):
            return shape_of(self.slots[name])

        def get_tensor_profile_shape(self, name, profile):
            return [tuple(shape) for shape in self.plan["ranges"][name]]

        def get_tensor_location(self, name):
            return real.TensorLocation.DEVICE

        def create_execution_context(self):
            return checked("IExecutionContext", Context(self))

    class Context:
        def __init__(self, engine):
            self.engine, self.shapes, self.addresses = engine, {}, {}

        def set_input_shape(self, name, shape):
            low, _, high = self.engine.plan["ranges"][name]
            self.shapes[name] = shape
            return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

        def get_tensor_shape(self, name):
            if name in self.shapes:
                return self.shapes[name]
            batch = next(iter(self.shapes.values()), (1,))[0]
            return tuple(batch if size == -1 else size for size in shape_of(self.engine.slots[name]))

        def set_tensor_address(self, name, address):
            self.addresses[name] = address
            return bool(address)

        def execute_async_v3(self, stream):
            feed = {}
            for value in self.engine.session.get_inputs():
                dtype = real.nptype(self.engine.get_tensor_dtype(value.name))
                shape = self.get_tensor_shape(value.name)
                raw = ctypes.string_at(self.addresses[value.name], int(np.prod(shape)) * np.dtype(dtype).itemsize)
                wanted = np.int64 if value.type == "tensor(int64)" else dtype
                feed[value.name] = np.frombuffer(raw, dtype).reshape(shape).astype(wanted)
            names = [value.name for value in self.engine.session.get_outputs()]
            for name, result in zip(names, self.engine.session.run(None, feed), strict=True):
                dtype = real.nptype(self.engine.get_tensor_dtype(name))
                raw = result.astype(dtype).tobytes()
                assert result.shape == self.get_tensor_shape(name)
                ctypes.memmove(self.addresses[name], raw, len(raw))
            return stream == 7

    class Refitter:
        def __init__(self, engine, log):
            self.engine, self.found = engine._double, {}

        def set_named_weights(self, name, weights):
            if name not in self.engine.plan["marked"]:
                return False
            self.found[name] = weights
            return True

        def get_missing_weights(self):
            return [faults["missing"]] if "missing" in faults else []

        def refit_cuda_engine(self):
            for name, weights in self.found.items():
                _, address, count = memory[id(weights)]
                raw = ctypes.string_at(address, 4 * count)
                self.engine.vectors[name] = np.frombuffer(raw, np.float32).copy()
            self.engine.open()
            return True

    memory = {}

    def weights(dtype, address, count):
        # Weights.numpy() of the 10.3 and 10.13 bindings has strides of zero with NumPy 2: the address is read instead.
        made = real.Weights(dtype, address, count)
        assert made.size == count
        memory[id(made)] = (made, address, count)
        return made

    made.Weights = weights
    for name, double in (("Builder", Builder), ("OnnxParser", Parser), ("Runtime", Runtime), ("Refitter", Refitter)):
        setattr(made, name, constructor(name, double))
    if hasattr(real, "init_libnvinfer_plugins"):
        made.init_libnvinfer_plugins = lambda log, namespace: True
    return made


def shape_of(value):
    """-1 for dynamic sizes."""
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)
