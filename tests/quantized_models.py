"""Small models in PyTorch, quantised by ONNX Runtime, with an adapter and what they compute in float64."""

import copy
import logging
import warnings

import numpy as np
import onnx_tools as tools
import torch
from torch import nn
from torch.nn import functional

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 16), nn.LayerNorm(24)

    def forward(self, x):
        return self.c(self.norm(x + self.b(torch.relu(self.a(x)))))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 32), nn.Linear(32, 24, bias=False), nn.Linear(24, 16)

    def forward(self, x):
        return self.c(functional.gelu(self.b(functional.relu6(self.a(x) * 6))))


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1, stride=2)
        self.c = nn.Linear(8, 5)

    def forward(self, x):
        h = functional.max_pool2d(self.b(torch.relu(self.a(torch.relu(self.first(x))))), 2)
        return self.c(h.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.v, self.c = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x):
        weights = torch.softmax(self.a(x) @ self.b(x).transpose(-1, -2) / 5, -1)
        return self.c(weights @ self.v(x)) + x


SHAPES = {Residual: (4, 6, 24), Layers: (16, 24), Image: (2, 3, 8, 8), Attention: (2, 6, 24)}


class Case:
    """A base, its inputs, an adapter of it, and what both compute in float64."""

    def __init__(self, kind, folder):
        torch.manual_seed(0)
        base = kind().eval()
        names = [
            name for name, one in base.named_modules() if isinstance(one, (nn.Linear, nn.Conv2d)) and name != "first"
        ]
        model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(target_modules=names)), 0.1)
        self.adapter = folder / "a.safetensors"
        onelora.save_adapter(model, self.adapter)
        self.base, self.inputs, self.folder = base, [torch.randn(SHAPES[kind]) for _ in range(6)], folder
        wide = merged_copy(model, torch.float64)
        with torch.no_grad():
            self.plain = [copy.deepcopy(base).double()(x.double()).numpy() for x in self.inputs]
            self.exact = [wide(x.double()).numpy() for x in self.inputs]

    def feeds(self):
        return [{"x": x.numpy()} for x in self.inputs]

    def quantised(self, form, signed, by_axis, opset):
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        source, path = self.exported(opset), self.folder / "q.onnx"
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quantize_static(
                    source, path, Reader(self.feeds()), quant_format=QuantFormat[form], per_channel=by_axis,
                    activation_type=QuantType.QInt8 if signed else QuantType.QUInt8, weight_type=QuantType.QInt8,
                    reduce_range=not signed, extra_options={"ActivationSymmetric": signed},
                )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        return path

    def exported(self, opset):
        path = self.folder / "f.onnx"
        tools.exported(self.base, (self.inputs[0],), path, dynamo=False, input_names=["x"], opset_version=opset)
        return path

    def dynamic(self, signed, by_axis, opset):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        kind, path = QuantType.QInt8 if signed else QuantType.QUInt8, self.folder / "q.onnx"
        logging.disable(logging.WARNING)
        try:
            quantize_dynamic(self.exported(opset), path, weight_type=kind, per_channel=by_axis, reduce_range=True)
        finally:
            logging.disable(logging.NOTSET)
        return path

    def error(self, path, expected):
        """Largest error over the largest number."""
        actual = [tools.run(path, (x,)) for x in self.inputs]
        worst = max(np.abs(a - e).max() for a, e in zip(actual, expected, strict=True))
        return worst / max(np.abs(e).max() for e in expected)


class Reader:
    """As ONNX Runtime's quantiser reads calibration data."""

    def __init__(self, feeds):
        self.rows = iter(feeds)

    def get_next(self):
        return next(self.rows, None)
