"""The exporters of transformers: adapted models go through them, adapters into what they wrote of the base."""

import contextlib
import copy
import logging
from collections import Counter
from typing import Any

import onnx
import onnxruntime
import paths
import pytest
import torch

import onelora_compile as onelora
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors

exporters = pytest.importorskip("transformers.exporters")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs
FUSIONS = pytest.mark.parametrize("fusions", [None, "cpu"])  # into ONNX Runtime's own operators


def decoder():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, intermediate_size=64, initializer_range=0.1, **sizes)).eval()


def built(folder):
    """A decoder with an adapter, its base as it was, and inputs."""
    model, base, ids = fill_vectors(onelora.adapt(decoder()), 0.02), decoder(), torch.randint(0, 50, (2, 7))
    onelora.save_adapter(model, folder / "a.safetensors")
    return model, base, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def written(model, inputs, folder, way="export", fusions=None):
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None):
            exporter = exporters.OnnxExporter()
            config = exporters.OnnxConfig(dynamic=True, ort_fusions=fusions)
            getattr(exporter, way)(model, inputs, config).save_pretrained(folder)
    finally:
        logging.disable(logging.NOTSET)
    return folder


def logits(path, inputs):
    session = onnxruntime.InferenceSession(path)
    names = [one.name for one in session.get_inputs()]
    (out,) = session.run(["logits"], {name: inputs[name].numpy() for name in names})
    return torch.from_numpy(out)


def only(folder):
    (path,) = folder.glob("*.onnx")
    return path


def kinds(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@FUSIONS
def test_an_adapted_model_goes_through_and_an_adapter_goes_in(fusions, tmp_path):
    model, base, inputs = built(tmp_path)
    oracle = paths.Oracle(model, inputs, grad=False)
    own = only(written(model, inputs, tmp_path / "own", fusions=fusions))
    oracle.check(logits(own, inputs), "through the exporter")
    file = only(written(base, inputs, tmp_path / "base", fusions=fusions))
    assert ("MultiHeadAttention" in kinds(file) or "GroupQueryAttention" in kinds(file)) == (fusions is not None)
    report = fold_onnx(file, tmp_path / "a.safetensors", tmp_path / "folded.onnx", progress=False)
    assert set(report.folded) == set(onelora.vectors(model))
    oracle.check(logits(tmp_path / "folded.onnx", inputs), "folded")
    assert kinds(tmp_path / "folded.onnx") == kinds(file)
    assert kinds(own).total() > kinds(file).total()  # the updates are in the graph


def test_a_merged_copy_goes_through_as_the_graph_of_the_base(tmp_path):
    model, base, inputs = built(tmp_path)
    merged = copy.deepcopy(model)
    onelora.merge(merged)
    file = only(written(merged, inputs, tmp_path / "merged"))
    paths.Oracle(model, inputs, grad=False).check(logits(file, inputs), "merged")
    assert kinds(file) == kinds(only(written(base, inputs, tmp_path / "base")))


@FUSIONS
def test_prefill_and_decode_take_the_adapter(fusions, tmp_path):
    model, base, inputs = built(tmp_path)
    folder = written(base, inputs, tmp_path / "base", "export_for_generation", fusions)
    with torch.no_grad():
        wanted = model(**inputs, use_cache=True)
    for part in ("prefill", "decode"):
        file = tmp_path / f"{part}.onnx"
        report = fold_onnx(folder / f"{part}.onnx", tmp_path / "a.safetensors", file, progress=False)
        assert set(report.folded) == set(onelora.vectors(model))
    first = onnxruntime.InferenceSession(tmp_path / "prefill.onnx")
    names = [one.name for one in first.get_outputs()]
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    found = dict(zip(names, first.run(None, feeds(first, inputs)), strict=True))
    token = wanted.logits[:, -1].argmax(-1, keepdim=True)
    with torch.no_grad():
        then = model(torch.cat([inputs["input_ids"], token], dim=1)).logits[:, -1]
    given = {"input_ids": token, "position_ids": torch.full_like(token, inputs["input_ids"].shape[1])}
    given |= {f"input.{name}": torch.from_numpy(value) for name, value in found.items() if name != "logits"}
    second = onnxruntime.InferenceSession(tmp_path / "decode.onnx")
    out = dict(zip([one.name for one in second.get_outputs()], second.run(None, feeds(second, given)), strict=True))
    assert_parity(torch.from_numpy(out["logits"][:, -1]), then.double(), then, floor=64)


def feeds(session, given):
    return {one.name: given[one.name].numpy() for one in session.get_inputs()}
