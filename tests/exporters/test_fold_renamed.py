"""A model that carries vectors, after a tool renamed, removed or inlined them: the base is taken whole or not at all."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError, OneLoRAError
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
MODES = ("load", "input", "bank")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of each mode with adapter a; b.safetensors, and what b gives in float64."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).eval()
    models = [fill_vectors(onelora.adapt(copy.deepcopy(net)), 0.3, seed) for seed in range(2)]
    for model, name in zip(models, "ab", strict=True):
        onelora.save_adapter(model, folder / f"{name}.safetensors")
    for mode in MODES:
        bank = [folder / "a.safetensors"] if mode == "bank" else []
        shapes = ({0: "batch"},)
        out = folder / f"{mode}.onnx"
        export_onnx(models[0], (X,), out, adapters=mode, bank=bank, dynamic_shapes=shapes, progress=False)
    return folder, models[1].double()(X.double()).detach().numpy()


def names_of(mode):
    return ["adapter_ids"] if mode == "bank" else ["0", "2"]


def prefixed(model, mode):
    return onnx.compose.add_prefix(model, "p/")


def renamed(model, mode):
    """The inputs and initializers that the metadata names, alone."""
    for name in names_of(mode):
        for one in [*model.graph.input, *model.graph.initializer]:
            one.name = f"{one.name}_new" if one.name == name else one.name
        for node in model.graph.node:
            node.input[:] = [f"{one}_new" if one == name else one for one in node.input]
    return model


def as_constants(model, mode):
    """As nodes Constant in the place of inputs and initializers."""
    held = {one.name: one for one in model.graph.initializer}
    for name in names_of(mode):
        value = held.pop(name, None) or onnx.numpy_helper.from_array(np.zeros(len(X), np.int64))
        kept = [one for one in model.graph.input if one.name != name]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=value))
    del model.graph.initializer[:]
    model.graph.initializer.extend(held.values())
    return model


def as_initializers(model, mode):
    """No input but the data: ids that are chosen once for all."""
    if mode == "bank":
        ids = onnx.numpy_helper.from_array(np.zeros(len(X), np.int64), "adapter_ids")
        model.graph.initializer.append(ids)
    kept = [one for one in model.graph.input if one.name not in names_of(mode)]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def beside(model, mode):
    """The names stay, and nothing that computes reads them: a tool put copies in their place."""
    renamed(model, mode)
    for name in names_of(mode):
        if mode == "bank":
            shape = [one for one in model.graph.input if one.name == f"{name}_new"][0].type
            model.graph.input.append(onnx.ValueInfoProto(name=name, type=shape))
        else:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(12, np.float32), name))
    return model


TOOLS = {one.__name__: one for one in (prefixed, renamed, as_constants, as_initializers, beside)}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("mode", MODES)
def test_the_base_is_taken_whole_or_the_file_is_refused_by_name(made, mode, tool, tmp_path):
    folder, expected = made
    out = tmp_path / "out.onnx"
    onnx.save(TOOLS[tool](onnx.load(folder / f"{mode}.onnx"), mode), tmp_path / "tool.onnx")
    onnxruntime.InferenceSession(tmp_path / "tool.onnx")  # the tool's work is a model
    try:
        fold_onnx(tmp_path / "tool.onnx", folder / "b.safetensors", out, progress=False)
    except OneLoRAError as error:
        assert tool != "as_initializers" or mode == "bank"  # vectors that are no inputs any more are told by their names
        assert isinstance(error, ExportError), error
        assert "export_onnx wrote" in str(error)
        assert ", ".join(names_of(mode)) in str(error)
        assert not out.exists()
        return
    session = onnxruntime.InferenceSession(out)
    inputs = session.get_inputs()
    assert len(inputs) == 1
    assert np.allclose(session.run(None, {inputs[0].name: X.numpy()})[0], expected, atol=1e-5)
