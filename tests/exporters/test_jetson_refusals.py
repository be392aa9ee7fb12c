"""What bundle() refuses, by name and with what to do, and leaves nothing behind."""

import os

import bundles
import pytest
import torch
import zoo
from bundles import base_model, exported
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import bundle
from onelora_compile.testing import fill_vectors


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("fold", {"jetpack": "4.6"}, onelora.ConfigError, r"jetpack='4.6' is not one of 5.1, 6.0.*L4T"),
        (
            "fold",
            {"shapes": None},
            onelora.ConfigError,
            r"missing for x \[batch, 16, 12\]. For example shapes=",
        ),
        ("fold", {"shapes": {"y": 1}}, onelora.ConfigError, r"shapes names y; the model's inputs are x; its .*: batch"),
        (
            "bank",
            {"shapes": {"x": bundles.SHAPES["x"], "adapter_ids": ((1,), (2,), (8,))}},
            onelora.ConfigError,
            r"'batch' is \(1, 2, 4\) in one place and \(1, 2, 8\) in another",
        ),
        ("fold", {"shapes": {"batch": (0, 1, 2)}}, onelora.ConfigError, r"\(0, 16, 12\) is empty, and the self-test"),
        ("fold", {"shapes": {"batch": (2, 1, 4)}}, onelora.ConfigError, r"is not smallest, usual, largest"),
        (
            "fold",
            {"shapes": {"x": ((1, 9, 12),) * 3}},
            onelora.ConfigError,
            r"\(1, 9, 12\) changes a fixed dimension of \[batch, 16, 12\]",
        ),
        ("fold", {"adapters": ["a"]}, onelora.StateError, r"can't take any \(mode 'fold'\)"),
        ("bank", {"adapters": ["a"]}, onelora.StateError, r"can't take any \(mode 'bank'\)"),
        ("input", {"adapters": ["other"]}, onelora.BaseMismatchError, r"trained on another base"),
        ("input", {"adapters": ["a", "a"]}, onelora.ConfigError, r"'a' is taken"),
        ("input", {"swap": "refit", "jetpack": "5.1"}, onelora.ConfigError, r"8.5.2 .* can't refit single weights"),
        ("input", {"swap": "refit", "jetpack": "6.0"}, onelora.ConfigError, r"take swap='input'"),
        ("load", {"swap": "refit"}, onelora.ConfigError, r"export it with adapters='input'"),
        ("fold", {"swap": "hot"}, onelora.ConfigError, r"is not one of 'auto', 'input', 'refit'"),
        ("fold", {"optimization_level": 6}, onelora.ConfigError, r"optimization_level 0 to 5"),
    ],
)
def test_refusals_name_what_to_do_and_leave_nothing(source, options, error, message, tmp_path):
    folder = bundles.sources()
    options = {"shapes": bundles.SHAPES, **options}
    options["adapters"] = [folder / f"{name}.safetensors" for name in options.get("adapters", ())]
    with pytest.raises(error, match=message):
        bundle(folder / f"{source}.onnx", tmp_path / "b", **options)
    assert os.listdir(tmp_path) == []


def test_models_that_tensorrt_does_not_take(tmp_path):
    x = torch.randn(2, 8)
    bf16 = exported(nn.Linear(8, 8).bfloat16(), (x.bfloat16(),), tmp_path / "bf16.onnx", verify=False)
    with pytest.raises(onelora.ExportError, match=r"TensorRT 8.6.2 of JetPack 6.0 has no bfloat16: .*float16"):
        bundle(bf16, tmp_path / "b", jetpack="6.0", selftest=False)
    with pytest.raises(onelora.ExportError, match=r"ONNX Runtime can't load"):
        bundle(bf16, tmp_path / "b", jetpack="6.2")
    assert bundle(bf16, tmp_path / "ok", jetpack="6.2", selftest=False).checks == []
    f64 = exported(nn.Linear(8, 8).double(), (x.double(),), tmp_path / "f64.onnx")
    with pytest.raises(onelora.ExportError, match=r"has no float64, which input, output are"):
        bundle(f64, tmp_path / "b")
    from onnxruntime.quantization import quantize_dynamic

    plain = exported(zoo.MLP(), (torch.randn(4, 8),), tmp_path / "plain.onnx")
    quantize_dynamic(plain, tmp_path / "int8.onnx")
    with pytest.raises(onelora.ExportError, match=r"(DynamicQuantizeLinear|com\.microsoft)"):
        bundle(tmp_path / "int8.onnx", tmp_path / "b")
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07nonsense")
    with pytest.raises(onelora.ExportError, match="damaged"):
        bundle(tmp_path / "bad.onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_bundle_is_replaced_and_nothing_else_is(tmp_path):
    source = exported(zoo.MLP(), (torch.randn(4, 8),), tmp_path / "m.onnx")
    bundle(source, tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("old")
    bundle(source, tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() != "old"
    assert sorted(os.listdir(tmp_path)) == ["b", "m.onnx"]
    (tmp_path / "b" / "local").mkdir()
    with pytest.raises(onelora.StateError, match="was built or updated in its place"):
        bundle(source, tmp_path / "b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(onelora.StateError, match="is there and is no bundle"):
        bundle(source, tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        bundle(source, tmp_path / "no" / "b")


def test_a_bundle_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    from onelora_compile.exporters.opsets import rules
    from onelora_compile.exporters.opsets.write_out import Before

    def wrong(node):
        made = Before(node)
        made.replace_with(made.add("Erf", node.inputs[0]))

    monkeypatch.setitem(rules._RULES, ("Gelu", 20), wrong)
    with pytest.raises(onelora.ExportError, match=r"the model in the bundle differs from the original: output .* by"):
        bundle(bundles.sources() / "fold.onnx", tmp_path / "b", jetpack="6.0", shapes=bundles.SHAPES)
    assert os.listdir(tmp_path) == []


def test_adapter_that_trained_more_than_vectors(tmp_path):
    model = fill_vectors(onelora.adapt(base_model(), onelora.OneLoRAConfig(train_norms=True)), 0.1)
    onelora.save_adapter(model, tmp_path / "norms.safetensors")
    with pytest.raises(onelora.AdapterFileError, match=r"also trained"):
        bundle(
            bundles.sources() / "input.onnx",
            tmp_path / "b",
            shapes=bundles.SHAPES,
            adapters=[tmp_path / "norms.safetensors"],
        )
