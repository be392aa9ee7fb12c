"""ONNX files of one model by other tools: exporters, optimizers and quantisers that really run.

optimum-onnx is not among them: it needs an older transformers than the rest of the tests.  It exports by TorchScript.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors
from onelora_compile.weights.adapter_file import read_adapter


class Main(nn.Module):
    """A model with one output."""

    names: list[str]

    def __init__(self, model, output):
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, *values):
        return self.output(self.model(**dict(zip(self.names, values, strict=True))))


def wrapped(model, inputs, output):
    """The model with positional inputs, as the TorchScript exporter wants them."""
    main = Main(model, output).eval()
    main.names = list(inputs)
    return main, tuple(inputs.values())


def exported(main, args, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(main, args, path, verbose=False, external_data=False, **options)
    return path


def dynamo(main, args, path):
    return exported(main, args, path, dynamo=True)


def dynamo_plain(main, args, path):
    return exported(main, args, path, dynamo=True, optimize=False)


def torchscript(main, args, path):
    return exported(main, args, path, dynamo=False)


def torchscript_plain(main, args, path):
    return exported(main, args, path, dynamo=False, do_constant_folding=False)


def slim(main, args, path):
    import onnxslim

    onnx.save(onnxslim.slim(str(torchscript(main, args, path))), path)
    return path


def simplified(main, args, path):
    import onnxsim

    model, ok = onnxsim.simplify(onnx.load(torchscript(main, args, path)))
    assert ok
    onnx.save(model, path)
    return path


def ort_fused(main, args, path):
    from onnxruntime.transformers.optimizer import optimize_model

    torchscript(main, args, path)
    # Level 0: what ONNX Runtime 1.32's own graph optimizers write of a BERT, it does not load again.
    optimize_model(str(path), "bert", num_heads=3, hidden_size=48, opt_level=0).save_model_to_file(str(path))
    return path


def ort_attention(main, args, path):
    """q, k and v packed into the weight of com.microsoft.Attention."""
    import onnx_ir
    from onnxscript import optimizer
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = onnx_ir.load(dynamo_plain(main, args, path))
    optimizer.optimize(model)
    optimize_for_ort(model)
    onnx_ir.save(model, path)
    return path


def ort_basic(main, args, path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    source = path.with_name("source.onnx")
    onnxruntime.InferenceSession(str(dynamo(main, args, source)), options, providers=["CPUExecutionProvider"])
    return path


def half(main, args, path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(torchscript(main, args, path)), keep_io_types=True), path)
    return path


def int8_dynamic(main, args, path):
    from onnxruntime.quantization import quantize_dynamic

    source = path.with_name("source.onnx")
    quantize_dynamic(torchscript(main, args, source), path)
    return path


class Feed:
    def __init__(self, path, args):
        names = [node.name for node in onnx.load(path).graph.input]
        self.rows = iter([dict(zip(names, (value.numpy() for value in args), strict=True))])

    def get_next(self):
        return next(self.rows, None)


def _static(main, args, path, form):
    from onnxruntime.quantization import QuantFormat, quantize_static

    source = path.with_name("source.onnx")
    torchscript(main, args, source)
    quantize_static(source, path, Feed(source, args), quant_format=QuantFormat[form], op_types_to_quantize=["MatMul"])
    return path


def int8_qdq(main, args, path):
    return _static(main, args, path, "QDQ")


def int8_operators(main, args, path):
    return _static(main, args, path, "QOperator")


def _blocks(main, args, path, form):
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(torchscript(main, args, path)), block_size=16, is_symmetric=False, quant_format=QuantFormat[form]
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))
    return path


def int4_operators(main, args, path):
    return _blocks(main, args, path, "QOperator")


def int4_dequantized(main, args, path):
    return _blocks(main, args, path, "QDQ")


PLAIN = {
    f.__name__: f
    for f in (
        dynamo,
        dynamo_plain,
        torchscript,
        torchscript_plain,
        slim,
        simplified,
        ort_fused,
        ort_attention,
        ort_basic,
        half,
    )
}
QUANTIZED = {f.__name__: f for f in (int8_dynamic, int8_qdq, int8_operators, int4_operators, int4_dequantized)}


def run(path, args):
    """The first output of a file, float64."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # An int4 DequantizeLinear would be computed in int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feed = dict(zip(names, (value.numpy() for value in args), strict=True))
    return session.run(None, feed)[0].astype(np.float64)


def adapter(folder, weight, **config):
    """The file of an adapter of one linear "lin" with this weight, and its vector, float64."""
    module = nn.ModuleDict({"lin": nn.Linear(weight.shape[1], weight.shape[0])})
    with torch.no_grad():
        module.get_parameter("lin.weight").copy_(torch.from_numpy(weight))
    torch.manual_seed(1)
    model = fill_vectors(onelora.adapt(module, onelora.OneLoRAConfig(**config)), 0.5)
    onelora.save_adapter(model, folder / "a.safetensors")
    return folder / "a.safetensors", onelora.vectors(model)["lin"].detach().double().numpy()


def used(path, least, most):
    """An adapter file as of a model whose forward uses each weight so often."""
    file = read_adapter(path)
    return dataclasses.replace(file, uses=dict.fromkeys(file.vectors, (least, most)))
