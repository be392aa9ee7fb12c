"""TensorRT without a GPU: an engine that ONNX Runtime computes, behind the API of the real bindings.

The module that this makes has the enumerations and classes of a real `tensorrt` (or `tensorrt_rtx`) binding; its
objects answer only to names that the real class has, and check each call against the signature in the real docstring
(checked_calls.py).  What it computes is ONNX Runtime's, at the addresses that it is given: of a `libcudart` that works
on the CPU's memory (cudart_double.py), or of PyTorch's.  It shows that the calls exist and that the bytes go where they
should; it shows nothing about TensorRT's own behaviour.
"""

from __future__ import annotations

import types
from typing import Any

from builder_double import builder_side
from checked_calls import Checked, Signature
from runtime_double import runtime_side


def module(real, **faults):
    """A module like `real` whose engines ONNX Runtime computes.

    Faults, in its attribute of that name: `build` makes the builder fail with that message, `missing` lets the refitter
    ask for the weights of that name too, `stream` is the stream that work must be on (7, that of cudart_double.py),
    `stale` lets engines be written without what was refitted.
    """
    calls: set[str] = set()
    made: Any = types.ModuleType("tensorrt")
    made.__dict__.update({name: getattr(real, name) for name in dir(real) if not name.startswith("__")})
    made.__version__ = real.__version__
    made.calls, made.faults = calls, faults

    def checked(name, double):
        return Checked(real, getattr(real, name), double, calls)

    def constructor(name, double):
        def construct(*args):
            Signature("__init__", getattr(real, name).__init__.__doc__).check(real, args, {})
            calls.add(name)
            return checked(name, double(*args))

        return construct

    runtime, made.Weights = runtime_side(real, faults, checked)
    for name, double in {**builder_side(real, faults, checked), **runtime}.items():
        setattr(made, name, constructor(name, double))
    if hasattr(real, "init_libnvinfer_plugins"):
        made.init_libnvinfer_plugins = lambda log, namespace: True
    return made
