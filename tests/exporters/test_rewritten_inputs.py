"""OnnxRunner with a file of which a tool took the inputs that adapters come in by: one error, with their names."""

import copy

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import zoo
from onnx_graphs import assert_arrays
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import OnnxRunner, export_onnx
from onelora_compile.testing import fill_vectors


@pytest.fixture
def made(tmp_path):
    torch.manual_seed(0)
    base, x = zoo.MLP().eval(), None
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.3)
    x = torch.randn(4, next(one.in_features for one in base.modules() if isinstance(one, torch.nn.Linear)))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    names = list(onelora.vectors(model))
    for mode in ("input", "bank"):
        bank = [tmp_path / "a.safetensors"] if mode == "bank" else ()
        export_onnx(model, (x,), tmp_path / f"{mode}.onnx", adapters=mode, bank=bank)
    with torch.no_grad():
        y = copy.deepcopy(model).double()(x.double()).numpy(), model(x).numpy()
    return tmp_path, names, x.numpy(), y


def without_defaults(path):
    """As tools for ONNX Runtime write it: what has a default is no input."""
    model = onnx_ir.load(path)
    RemoveInitializersFromInputsPass()(model)
    onnx_ir.save(model, path)


def renamed(path, old, new):
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = [new if one == old else one for one in node.input]
    for one in (*model.graph.input, *model.graph.initializer):
        one.name = new if one.name == old else one.name
    onnx.save(model, path)


def test_vectors_that_are_no_inputs_any_more(made):
    folder, names, x, y = made
    without_defaults(folder / "input.onnx")
    with pytest.raises(ExportError, match=r"mode 'input', and has no inputs any more for") as caught:
        OnnxRunner(folder / "input.onnx", folder / "a.safetensors")
    assert all(name in str(caught.value) for name in names)
    runner = OnnxRunner(folder / "input.onnx")  # with the adapter that it was exported with
    assert_arrays(runner.run([x])[0], *y)
    for fails in (lambda: runner.use(folder / "a.safetensors"), lambda: runner.bind(runner.session.io_binding())):
        with pytest.raises(ExportError, match="no inputs any more"):
            fails()
    assert_arrays(runner.run([x])[0], *y)


def test_a_vector_of_another_name_is_the_one_that_is_named(made):
    folder, names, _, _ = made
    renamed(folder / "input.onnx", names[0], "v.0")
    with pytest.raises(ExportError, match=rf"no inputs any more for {names[0]}\."):
        OnnxRunner(folder / "input.onnx", folder / "a.safetensors")


def test_a_bank_that_a_tool_fixed_to_one_adapter(made):
    folder, _, x, _ = made
    model = onnx.load(folder / "bank.onnx")
    (ids,) = [one for one in model.graph.input if one.name == "adapter_ids"]
    model.graph.input.remove(ids)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(len(x), np.int64), "adapter_ids"))
    onnx.save(model, folder / "bank.onnx")
    with pytest.raises(ExportError, match=r"mode .bank., and has no inputs any more for adapter_ids\."):
        OnnxRunner(folder / "bank.onnx")
