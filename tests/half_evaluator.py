"""Each operator of an ONNX model in the dtypes that the file says, rounded after each.

ONNX Runtime on a CPU computes float16 in float32 and drops the casts between, also without its optimisations: there
nothing overflows.  onnx.reference computes in NumPy's dtypes; sums of float16 accumulate in float32, as on a GPU.
"""

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class LayerNormalization(OpRun):
    """As the standard defines it, in float32 by its stash_type; onnx.reference takes the dtype of x."""

    def _run(self, x, scale, bias=None, axis=-1, epsilon=1e-5, stash_type=1):
        assert stash_type == 1
        wide = x.astype(np.float32)
        axes = tuple(range(axis % x.ndim, x.ndim))
        d = wide - wide.mean(axes, keepdims=True)
        normal = (d / np.sqrt((d * d).mean(axes, keepdims=True) + np.float32(epsilon))).astype(x.dtype)
        return (normal * scale if bias is None else normal * scale + bias,)


def evaluate(model, **inputs):
    """The outputs of a model, or of a file."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    proto = proto if isinstance(proto, onnx.ModelProto) else onnx.load(proto)
    onnx.checker.check_model(proto, full_check=True)
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(proto, new_ops=[LayerNormalization]).run(None, inputs)
