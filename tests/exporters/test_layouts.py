"""The files that stock runtimes take an engine with, in their own terms."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import bundles
import onnx
import pytest
import torch
import yaml
from bundles import exported, for_runtime
from google.protobuf import text_format
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import bundle
from onelora_compile.testing import fill_vectors


def model_config():
    """Triton's own description of `config.pbtxt`, of the package tritonclient without what it needs for calls."""
    package = pytest.importorskip("tritonclient", reason="make test-real installs tritonclient")
    sys.path.insert(0, str(Path(package.__path__[0]) / "grpc"))
    try:
        return importlib.import_module("model_config_pb2")
    finally:
        del sys.path[0]


PBTXT = """\
name: "model"
backend: "tensorrt"
default_model_filename: "model.plan"
max_batch_size: 4
input {
  name: "x"
  data_type: TYPE_FP32
  dims: [16, 12]
}
output {
  name: "%s"
  data_type: TYPE_FP32
  dims: [5]
}
"""


def test_triton_is_told_what_the_engine_takes_and_gives(tmp_path):
    folder = for_runtime("fold", tmp_path)
    (output,) = onnx.load(folder / "model.onnx").graph.output
    assert (folder / "triton" / "model" / "config.pbtxt").read_text() == PBTXT % output.name
    assert not (folder / "triton" / "model" / "1" / "model.plan").exists()
    assert json.loads((folder / "manifest.json").read_text())["layout"]["plan"] == "triton/model/1/model.plan"
    assert "--model-repository=triton" in (folder / "README.md").read_text()
    assert bundles.call(folder, "selftest") == 0


@pytest.mark.real
def test_triton_parses_it(tmp_path):
    pb = model_config()
    folder = for_runtime("fold", tmp_path)
    config = text_format.Parse((folder / "triton" / "model" / "config.pbtxt").read_text(), pb.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("model", "tensorrt", 4)
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [("x", pb.TYPE_FP32, [16, 12])]
    assert [(one.data_type, list(one.dims)) for one in config.output] == [(pb.TYPE_FP32, [5])]


class Odd(nn.Module):
    """Inputs of many kinds, one without dimensions; outputs without a batch."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 3)

    def forward(self, x, rate, ids, flag):
        return self.line(x).sum(0) * rate, torch.where(flag, ids, -ids)


@pytest.mark.real
@pytest.mark.parametrize(("jetpack", "integers"), [("6.2", "TYPE_INT64"), ("6.0", "TYPE_INT32")])
def test_triton_gets_types_and_shapes_of_any_model(jetpack, integers, tmp_path):
    args = (torch.randn(5, 4), torch.tensor(2.0), torch.arange(3), torch.tensor([True, False, True]))
    names = {"input_names": ["x", "rate", 'ids"\\n', "flag"], "output_names": ["y", "out"]}
    shapes = ({0: "length"}, None, None, None)
    source = exported(Odd().eval(), args, tmp_path / "m.onnx", dynamic_shapes=shapes, **names)
    folder = bundle(source, tmp_path / "b", jetpack=jetpack, shapes={"length": (1, 5, 9)}, layout="triton").folder
    text = (folder / "triton" / "model" / "config.pbtxt").read_text()
    assert "max_batch_size: 0\n" in text
    pb = model_config()
    config = text_format.Parse(text, pb.ModelConfig())
    integer = getattr(pb, integers)
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [
        ("x", pb.TYPE_FP32, [-1, 4]),
        ("rate", pb.TYPE_FP32, [1]),
        ('ids"\\n', integer, [3]),
        ("flag", pb.TYPE_BOOL, [3]),
    ]
    assert [one.HasField("reshape") for one in config.input] == [False, True, False, False]
    assert list(config.input[1].reshape.shape) == []
    assert [(one.name, one.data_type, list(one.dims)) for one in config.output] == [
        ("y", pb.TYPE_FP32, [3]),
        ("out", integer, [3]),
    ]


class Picture(nn.Module):
    def __init__(self, channels=3, of_the_batch=False):
        super().__init__()
        self.conv, self.head, self.of_the_batch = nn.Conv2d(channels, 4, 8, 8), nn.Linear(4, 3), of_the_batch

    def forward(self, x):
        y = self.head(self.conv(x).mean((2, 3)))
        return y.mean(0) if self.of_the_batch else y


@pytest.mark.parametrize("of_the_batch", [False, True])
def test_deepstream_is_told_shape_and_batch(of_the_batch, tmp_path):
    options = {"input_names": ["x"], "dynamic_shapes": ({0: "batch"},)}
    source = exported(
        Picture(of_the_batch=of_the_batch).eval(), (torch.randn(2, 3, 16, 24),), tmp_path / "m.onnx", **options
    )
    folder = bundle(source, tmp_path / "b", shapes={"batch": (1, 2, 6)}, layout="deepstream").folder
    lines = (folder / "deepstream" / "nvinfer.txt").read_text().splitlines()
    found = dict(
        line.split("=") for line in itertools.dropwhile(lambda line: line != "[property]", lines) if "=" in line
    )
    assert found["model-engine-file"] == "model.plan"
    assert (found["batch-size"], found["infer-dims"]) == ("6", "3;16;24")
    assert (found["network-type"], found["output-tensor-meta"], found["network-mode"]) == ("100", "1", "0")
    assert json.loads((folder / "manifest.json").read_text())["layout"]["plan"] == "deepstream/model.plan"


def test_isaac_ros_gets_parameters(tmp_path):
    folder = for_runtime("fold", tmp_path, "isaac-ros")
    (output,) = onnx.load(folder / "model.onnx").graph.output
    found = yaml.safe_load((folder / "isaac-ros" / "tensor_rt.yaml").read_text())["/**"]["ros__parameters"]
    assert found == {
        "model_file_path": "",
        "engine_file_path": "isaac-ros/model.plan",
        "force_engine_update": False,
        "input_tensor_names": ["input_tensor"],
        "input_binding_names": ["x"],
        "output_tensor_names": ["output_tensor"],
        "output_binding_names": [output.name],
    }


def test_what_a_stock_runtime_can_not_feed_is_refused(tmp_path):
    sources, take = bundles.sources(), {"shapes": bundles.SHAPES}
    grey = exported(Picture(2).eval(), (torch.randn(1, 2, 16, 16),), tmp_path / "m.onnx", input_names=["x"])
    half = exported(
        fill_vectors(onelora.adapt(Picture()), 0.1).eval(),
        (torch.randn(1, 3, 16, 16),),
        tmp_path / "h.onnx",
        input_names=["x"],
        adapters="fold",
        dtype=torch.float16,
    )
    for source, options, message in (
        (
            sources / "input.onnx",
            {"layout": "triton"} | take,
            r"mode 'input' takes more, bundle it with swap='refit'; or",
        ),
        (
            sources / "input.onnx",
            {"layout": "triton", "jetpack": "6.0"} | take,
            r"'input' takes more; or export it with",
        ),
        (sources / "bank.onnx", {"layout": "isaac-ros"} | take, r"mode 'bank' takes more; or export it with adapters="),
        (
            sources / "fold.onnx",
            {"layout": "deepstream"} | take,
            r"nvinfer feeds one image .* takes x \[batch, 16, 12\]",
        ),
        (
            sources / "fold.onnx",
            {"layout": "kserve"} | take,
            r"is not one of 'plain', 'triton', 'deepstream', 'isaac-ros'",
        ),
        (grey, {"layout": "deepstream"}, r"this model takes x \[1, 2, 16, 16\]"),
        (half, {"layout": "deepstream"}, r"nvinfer feeds float32, and 'x' is float16"),
    ):
        with pytest.raises(onelora.ConfigError, match=message):
            bundle(source, tmp_path / "b", **options)
        assert not (tmp_path / "b").exists()
