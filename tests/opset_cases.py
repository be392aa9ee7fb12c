"""One or more uses of every standard operator that changed since opset 18, for lower_opset.

A case says from which opset on its form is valid, and below which one nothing can say it.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from onnx import defs, helper
from opset_case import case, tensor, x

NEWEST = 28
F, H, I = np.float32, np.float16, np.int64  # noqa: E741
BF = ml_dtypes.bfloat16


def changed():
    """Every standard operator that is new, or changed, since opset 18."""
    history: dict[str, Any] = {}
    for schema in defs.get_all_schemas_with_history():
        if (
            not schema.domain
            and not schema.deprecated
            and schema.support_level != defs.OpSchema.SupportType.EXPERIMENTAL
        ):
            history.setdefault(schema.name, []).append(schema.since_version)
    return {name for name, versions in history.items() if any(17 < version <= NEWEST for version in versions)}


IMAGE = (1, 2, 6, 6)
UNARY = (
    "Acos Asin Asinh Atan Atanh Cos Cosh Elu HardSigmoid HardSwish Selu Sin Sinh Softplus Softsign Tan ThresholdedRelu "
    "Round IsNaN Identity Shape Size Flatten Transpose Dropout Celu LpNormalization"
).split()
REDUCE = [f"Reduce{name}" for name in "L1 L2 LogSum LogSumExp Max Mean Min Prod SumSquare".split()]
AXES = np.array([-1, 0], I)


def branch(op):
    nodes = [helper.make_node("Constant", [], ["c"], value=tensor(x(2, 3), "c")), helper.make_node(op, ["c"], ["a"])]
    return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("a", 1, [2, 3])])


def loop_body():
    nodes = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Gelu", ["v"], ["w"])]
    types: list[tuple[str, int, list[int]]] = [("i", 7, []), ("c", 9, []), ("v", 1, [3, 4])]
    inputs = [helper.make_tensor_value_info(*one) for one in types]
    return helper.make_graph(
        nodes,
        "body",
        inputs,
        [helper.make_tensor_value_info("d", 9, []), helper.make_tensor_value_info("w", 1, [3, 4])],
    )


def scan_body():
    nodes = [helper.make_node("Swish", ["v"], ["w"])]
    return helper.make_graph(
        nodes, "body", [helper.make_tensor_value_info("v", 1, [4])], [helper.make_tensor_value_info("w", 1, [4])]
    )


CASES = [
    *[case(op, x(3, 4)) for op in UNARY],
    case("Acosh", x(3, 4, low=1.1, high=3.0)),
    case("IsInf", np.array([1, np.inf, -np.inf], F)),
    case("IsInf", np.array([1, np.inf, -np.inf], H), since=20, tag="half"),
    case("Det", x(2, 3, 3)),
    *[case(op, x(*IMAGE)) for op in ("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool")],
    case("Gelu", x(3, 4), since=20),
    case("Gelu", x(3, 4, dtype=H), since=20, tag="tanh", approximate="tanh"),
    case("Mish", x(3, 4), since=18),
    case("Swish", x(3, 4), since=24, alpha=1.5),
    case("SwiGLU", x(3, 4), x(3, 4), since=28),
    # Normalisations
    case("RMSNormalization", x(2, 3, 4), x(4), since=23),
    case("RMSNormalization", x(2, 3, 4, dtype=H), x(3, 4, dtype=H), since=23, tag="half", axis=1, epsilon=1e-3),
    case("GroupNormalization", x(2, 6, 3, 4), x(6), x(6), since=21, num_groups=2),
    case("GroupNormalization", x(2, 6, 3, dtype=H), x(6, dtype=H), x(6, dtype=H), since=21, tag="half", num_groups=3),
    case("InstanceNormalization", x(*IMAGE), x(2), x(2)),
    # Attention and what goes with it
    case("Attention", x(2, 3, 5, 8), x(2, 3, 6, 8), x(2, 3, 6, 8), since=23),
    case(
        "Attention", x(2, 5, 24), x(2, 5, 24), x(2, 5, 24), x(5, 5), since=23, tag="mask", q_num_heads=3, kv_num_heads=3
    ),
    case("Attention", x(2, 4, 5, 8), x(2, 2, 5, 8), x(2, 2, 5, 8), since=23, tag="causal", is_causal=1, scale=0.3),
    case(
        "Attention",
        *(x(1, 1, 4, 8), x(1, 1, 4, 8), x(1, 1, 4, 8)),
        **{"since": 25, "tag": "window", "left_window_size": 1, "right_window_size": 0},
    ),
    case("RotaryEmbedding", x(2, 3, 5, 8), x(2, 5, 4), x(2, 5, 4), since=23),
    case(
        "LinearAttention",
        x(1, 4, 8),
        x(1, 4, 8),
        x(1, 4, 8),
        since=27,
        outputs=2,
        q_num_heads=2,
        kv_num_heads=2,
        update_rule="linear",
    ),
    case("CausalConvWithState", x(2, 4, 5), x(4, 1, 3), x(4), since=27, outputs=2),
    case("TensorScatter", x(2, 4, 3), x(2, 1, 3), np.array([1, 2], I), since=24, lowest=24, axis=1),
    # In a dtype that came later
    *[
        case(op, x(3, 4, dtype=BF), since=22, tag="bf16")
        for op in ("Sin", "Elu", "Softplus", "Round", "HardSwish", "Mish")
    ],
    case("Conv", x(*IMAGE, dtype=BF), x(4, 2, 3, 3, dtype=BF), since=22, fixed="x1", tag="bf16"),
    case("MaxPool", x(*IMAGE, dtype=BF), since=22, tag="bf16", kernel_shape=[2, 2]),
    case("TopK", x(3, 5, dtype=BF), np.array([2], I), since=24, outputs=2, tag="bf16"),
    case("RandomNormal", since=22, lowest=22, tag="bf16", seed=1.0, shape=[2, 3], dtype=16),
    # Convolutions and pools
    case("Conv", x(*IMAGE), x(4, 2, 3, 3), fixed="x1"),
    case("ConvTranspose", x(*IMAGE), x(2, 4, 3, 3), fixed="x1"),
    case("DeformConv", x(1, 1, 4, 4), x(1, 1, 2, 2), x(1, 8, 3, 3), since=19, lowest=19),
    case(
        "AveragePool",
        x(*IMAGE),
        kernel_shape=[3, 3],
        strides=[2, 2],
        pads=[1, 1, 1, 1],
        ceil_mode=1,
        count_include_pad=1,
    ),
    case("AveragePool", x(*IMAGE), since=19, tag="dilated", lowest=19, kernel_shape=[2, 2], dilations=[2, 2]),
    case("AveragePool", x(*IMAGE), since=19, tag="once", kernel_shape=[2, 2], dilations=[1, 1]),
    case("MaxPool", x(*IMAGE), kernel_shape=[2, 2], outputs=2),
    case("LpPool", x(*IMAGE), kernel_shape=[2, 2]),
    case("LpPool", x(*IMAGE), since=18, tag="default", kernel_shape=[2, 2], dilations=[1, 1], ceil_mode=0),
    case("LpPool", x(*IMAGE), since=18, lowest=18, tag="ceil", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("MaxRoiPool", x(*IMAGE), np.array([[0, 1, 1, 4, 4]], F), pooled_shape=[2, 2]),
    case("MaxUnpool", x(1, 1, 2, 2), np.array([[[[5, 7], [13, 15]]]], I), kernel_shape=[2, 2], strides=[2, 2]),
    case("RoiAlign", x(*IMAGE), np.array([[0, 0, 4, 4]], F), np.array([0], I), output_height=2, output_width=2),
    case("Col2Im", x(1, 5, 5), np.array([5, 5], I), np.array([1, 5], I), since=18, lowest=18, fixed="x1 x2"),
    case("DepthToSpace", x(1, 4, 2, 2), blocksize=2, mode="CRD"),
    case("SpaceToDepth", x(1, 1, 4, 4), blocksize=2),
    case("SpaceToDepth", x(1, 2, 4, 4), since=28, tag="CRD", blocksize=2, mode="CRD"),
    # Sampling
    *[
        case("GridSample", x(*IMAGE), x(1, 3, 3, 2, low=-1), since=20, tag=mode, mode=mode, align_corners=1)
        for mode in ("linear", "nearest", "cubic")
    ],
    case("GridSample", x(1, 1, 3, 3, 3), x(1, 2, 2, 2, 3, low=-1), since=20, lowest=20, tag="volume"),
    case("AffineGrid", x(2, 2, 3), np.array([2, 1, 3, 4], I), since=20, lowest=18, fixed="x1"),
    *[
        case("Resize", x(*IMAGE), None, np.array([1, 1, 1.5, 2], F), fixed="x2", mode=mode, tag=mode)
        for mode in ("linear", "nearest", "cubic")
    ],
    case(
        "Resize", x(*IMAGE), None, np.array([1.5, 2], F), since=18, fixed="x2", mode="linear", tag="axes", axes=[2, -1]
    ),
    case("Resize", x(*IMAGE), None, np.array([1.5, 2], F), since=18, mode="linear", tag="scales", axes=[2, 3]),
    case(
        "Resize",
        x(*IMAGE),
        None,
        None,
        np.array([9, 4], I),
        since=18,
        fixed="x3",
        mode="linear",
        tag="sizes",
        axes=[3, 2],
    ),
    case("Resize", x(*IMAGE), None, np.array([1, 1, 2, 2], F), since=18, fixed="x2", tag="off", antialias=0),
    case(
        *("Resize", x(*IMAGE), None, np.array([1, 1, 0.5, 0.5], F)),
        **{"since": 18, "lowest": 18, "fixed": "x2", "tag": "antialias", "mode": "linear", "antialias": 1},
    ),
    case(
        *("Resize", x(*IMAGE), None, np.array([1, 1, 0.7, 0.7], F)),
        **{"since": 19, "lowest": 19, "fixed": "x2", "tag": "symmetric", "mode": "linear"},
        coordinate_transformation_mode="half_pixel_symmetric",
    ),
    case(
        *("Resize", x(*IMAGE), None, None, np.array([8, 9], I)),
        **{"since": 18, "lowest": 18, "fixed": "x3", "tag": "policy", "axes": [2, 3]},
        keep_aspect_ratio_policy="not_larger",
    ),
    # Shapes
    case("Reshape", x(3, 4), np.array([2, -1], I), fixed="x1"),
    case("Squeeze", x(1, 3, 1), np.array([0], I), fixed="x1"),
    case("Unsqueeze", x(3), np.array([0], I), fixed="x1"),
    case("Split", x(3, 8), since=18, outputs=3, tag="parts", axis=-1, num_outputs=3),
    case("Split", x(3, 8), np.array([2, 6], I), outputs=2, axis=1),
    case("SplitToSequence", x(4, 3)),
    *[case("Pad", x(3, 4), np.array([0, 1, 2, 1], I), mode=mode, tag=mode) for mode in ("constant", "edge", "reflect")],
    case("Pad", x(3, 4), np.array([0, 1, 2, 1], I), since=19, lowest=19, mode="wrap", tag="wrap"),
    case("Pad", x(3, 4), np.array([1, 2], I), F(3), np.array([-1], I), since=18, fixed="x1 x3", tag="axes"),
    case("Pad", x(3, 4), np.array([1, 2], I), None, np.array([0], I), since=18, fixed="x3", tag="computed"),
    case("Pad", x(3, 4), np.array([1, 2], I), None, np.array([0], I), since=18, lowest=18, tag="axes_computed"),
    case("CenterCropPad", x(5, 7), np.array([3, 9], I), since=18, fixed="x1"),
    case("Compress", x(4), np.array([1, 0, 1, 0], bool)),
    case("ScatterElements", x(3, 3), np.array([[0, 2]], I), x(1, 2), axis=1, reduction="add"),
    case("ScatterElements", x(3, 3), np.array([[0, 2]], I), x(1, 2), since=18, lowest=18, tag="max", reduction="max"),
    case("ScatterND", x(3, 3), np.array([[0], [2]], I), x(2, 3)),
    case("ScatterND", x(3, 3), np.array([[0], [2]], I), x(2, 3), since=18, lowest=18, tag="min", reduction="min"),
    case("ReverseSequence", x(3, 2), np.array([1, 3], I)),
    case("OneHot", np.array([0, 2], I), I(3), x(2), fixed="x1"),
    case("TopK", x(3, 5), np.array([2], I), outputs=2),
    case("Unique", np.array([2, 1, 2], F), outputs=4),
    # Reductions
    *[case(op, x(2, 3, 4), since=18, tag="all") for op in REDUCE],
    *[case(op, x(2, 3, 4), AXES, since=18, fixed="x1", tag="axes", keepdims=0) for op in REDUCE],
    *[case(op, x(2, 3, 4), AXES, since=18, lowest=18, tag="computed") for op in REDUCE],
    case("ReduceMax", np.array([[True, False]]), np.array([1], I), since=20, fixed="x1", tag="bool"),
    case("ReduceMin", x(2, 3), since=18, lowest=18, tag="noop", noop_with_empty_axes=1),
    # Numbers
    case("BitShift", np.array([1, 8], np.uint8), np.array([1, 2], np.uint8), direction="LEFT"),
    *[case(f"Bitwise{op}", *[np.array([5, 9])] * 2, since=18, lowest=18) for op in ("And", "Or", "Xor")],
    case("BitwiseNot", np.array([5, 9]), since=18, lowest=18),
    case("Mod", x(3), x(3), fmod=1),
    case("Einsum", x(3, 4), x(4, 2), equation="ij,jk->ik"),
    case("CumProd", x(3), I(0), since=26, lowest=26),
    case("BitCast", x(3), since=26, lowest=26, to=6),
    case("Equal", np.array([1.0, 2], F), np.array([1.0, 3], F)),
    case("Equal", np.array(["a", "b"]), np.array(["a", "c"]), since=19, lowest=19, tag="text"),
    case("Range", F(0), F(3), F(0.5)),
    case("Range", H(0), H(3), H(0.5), since=27, tag="half"),
    case("DFT", x(1, 6, 4, 1), None, I(1), since=20, fixed="x2", tag="axis"),
    case("DFT", x(1, 6, 4, 1), since=20),
    case("DFT", x(1, 6, 4, 1), None, I(-2), since=20, fixed="x2", tag="last", onesided=1),
    # Types
    case("Cast", x(3), to=10),
    case("Cast", x(3), since=19, to=10, saturate=0, tag="saturate"),
    case("Cast", x(3), since=24, to=10, round_mode="down", tag="round"),
    case("Cast", x(3), since=19, lowest=19, to=17, tag="float8"),
    case("CastLike", x(3), x(1, dtype=H)),
    case("Constant", value=tensor(x(3), "c")),
    case("Constant", since=19, lowest=19, tag="float8", value=tensor(x(3).astype(ml_dtypes.float8_e4m3fn), "c")),
    case("ConstantOfShape", np.array([2, 3], I), value=tensor(np.array([2], F), "c")),
    case("ConstantOfShape", np.array([2], I), since=20, lowest=20, tag="bf16", value=tensor(np.array([2], BF), "c")),
    case("EyeLike", x(3, 3)),
    # Quantisation
    case("QuantizeLinear", x(3, 4), F(0.01), np.uint8(3)),
    case("QuantizeLinear", x(3, 4), F(0.01), since=21, tag="dtype", fixed="x1", output_dtype=3),
    case("QuantizeLinear", x(3, 4), F(0.01), np.int8(3), since=21, tag="both", output_dtype=3, block_size=0),
    case("QuantizeLinear", x(3, 4), F(0.01), np.int16(3), since=21, lowest=21, tag="int16"),
    case("QuantizeLinear", x(3, 4, dtype=H), H(0.01), np.int8(3), since=19, tag="half"),
    case("QuantizeLinear", x(3, 4, dtype=H), F(0.01), np.int8(3), since=23, tag="two_dtypes"),
    case(
        "QuantizeLinear", x(2, 4), x(2, 2), np.zeros((2, 2), np.int8), since=21, lowest=21, tag="blocks", block_size=2
    ),
    case("DequantizeLinear", np.array([1, 9], np.int8), F(0.1), np.int8(2)),
    case("DequantizeLinear", np.array([1, 9], np.int8), H(0.1), np.int8(2), since=19, tag="half"),
    case("DequantizeLinear", np.array([1, 9], np.int8), H(0.1), np.int8(2), since=23, tag="dtype", output_dtype=1),
    case(
        "DequantizeLinear", np.array([[1, 9]], np.int8), x(1, 1), None, since=21, lowest=21, tag="blocks", block_size=2
    ),
    case("DequantizeLinear", np.array([1, 7], ml_dtypes.int4), F(0.1), since=21, lowest=21, fixed="x0", tag="int4"),
    case(
        *("QLinearMatMul", np.array([[1, 2]], np.uint8), F(0.1), np.uint8(1)),
        *(np.array([[3], [4]], np.uint8), F(0.2), np.uint8(2), F(0.01), np.uint8(0)),
    ),
    # Recurrence
    case("RNN", x(3, 2, 4), x(1, 5, 4), x(1, 5, 5), outputs=2, hidden_size=5),
    case("GRU", x(3, 2, 4), x(1, 15, 4), x(1, 15, 5), outputs=2, hidden_size=5),
    case("LSTM", x(3, 2, 4), x(1, 20, 4), x(1, 20, 5), outputs=2, hidden_size=5),
    # Chance
    case("Bernoulli", x(3, 4), seed=1.0),
    case("Multinomial", x(2, 3), seed=1.0, sample_size=4),
    case("RandomNormal", seed=1.0, shape=[2, 3]),
    case("RandomUniform", seed=1.0, shape=[2, 3]),
    case("RandomNormalLike", x(2, 3), seed=1.0),
    case("RandomUniformLike", x(2, 3), seed=1.0),
    # Text, images, sequences, bodies
    case("RegexFullMatch", np.array(["a1"]), since=20, lowest=20, pattern="a.*"),
    case("StringConcat", np.array(["a"]), np.array(["b"]), since=20, lowest=20),
    case("StringSplit", np.array(["a b"]), since=20, lowest=20, outputs=2),
    case("ImageDecoder", np.zeros(9, np.uint8), since=20, lowest=20),
    case("Optional", x(3)),
    case("OptionalGetElement", x(3), since=18, lowest=18),
    case("OptionalHasElement", x(3), since=18, lowest=18),
    case("NegativeLogLikelihoodLoss", x(2, 3), np.array([0, 2], I)),
    case("If", np.array(True), since=20, then_branch=branch("Gelu"), else_branch=branch("Identity")),
    case("Loop", I(3), np.array(True), x(3, 4), since=20, body=loop_body()),
    case("Scan", x(3, 4), since=24, body=scan_body(), num_scan_inputs=1),
]
