"""A model with vectors that a tool renamed, removed or inlined: the base is taken whole or not at all."""

import copy
import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_graphs import assert_arrays
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
MODES = ("load", "input", "bank")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of each mode with adapter a; b.safetensors, and what b gives in float64 and in plain float32."""
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
    plain = models[1](X).detach().numpy()
    return folder, models[1].double()(X.double()).detach().numpy(), plain


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
            shape = next(one for one in model.graph.input if one.name == f"{name}_new").type
            model.graph.input.append(onnx.ValueInfoProto(name=name, type=shape))
        else:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(12, np.float32), name))
    return model


REFUSED = {one.__name__: one for one in (prefixed, renamed, as_constants, beside)}


def rewritten(folder, mode, tool, path):
    onnx.save(tool(onnx.load(folder / f"{mode}.onnx"), mode), path)
    onnxruntime.InferenceSession(path)  # what a tool wrote is a model
    return path


@pytest.mark.parametrize(("mode", "tool"), [*itertools.product(MODES, REFUSED.values()), ("bank", as_initializers)])
def test_what_the_metadata_names_and_the_graph_does_not_add_is_refused_by_name(made, mode, tool, tmp_path):
    path = rewritten(made[0], mode, tool, tmp_path / "tool.onnx")
    named = f"of mode '{mode}'.* {', '.join(names_of(mode))}: .*the file that export_onnx wrote"
    with pytest.raises(ExportError, match=named):
        fold_onnx(path, made[0] / "b.safetensors", tmp_path / "out.onnx", progress=False)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("mode", ["load", "input"])
def test_vectors_that_are_no_inputs_any_more_are_taken_out(made, mode, tmp_path):
    folder, exact, plain = made
    path = rewritten(folder, mode, as_initializers, tmp_path / "tool.onnx")
    fold_onnx(path, folder / "b.safetensors", tmp_path / "out.onnx", progress=False)
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    inputs = session.get_inputs()
    assert len(inputs) == 1
    assert_arrays(session.run(None, {inputs[0].name: X.numpy()})[0], exact, plain)
