"""`export_program`: plain ATen, the base's graph when folded, vectors by name when not, and no need of this package."""

import copy
import itertools
import subprocess
import sys
from typing import Any

import paths
import pytest
import torch
from architectures.outputs import main_output
from programs import MODES, as_inputs, small
from torch import nn
from torch._dynamo.testing import CompileCounter

import onelora_compile as onelora
from onelora_compile.exporters import export_program
from onelora_compile.exporters.to_program import export
from onelora_compile.passes.exported.vectors_to_inputs import vectors_to_inputs
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

MODELS = ("bert", "vit", "llama", "encoder_post_norm", "conv1x1")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Pointwise(nn.Module):
    """Convolutions with windows of one pixel."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.first(x).relu())


def built(name):
    """A model whose cache is off, its keyword inputs, and how it is adapted."""
    if name == "conv1x1":
        torch.manual_seed(0)
        config = onelora.OneLoRAConfig(target_modules=["first", "last"])
        return Pointwise().eval(), {"x": torch.randn(2, 3, 5, 4)}, config
    model, inputs = paths.build(name)
    return model, inputs | ({"use_cache": False} if name == "llama" else {}), onelora.OneLoRAConfig()


def adapted(name, dtype=torch.float32):
    model, inputs, config = built(name)
    model = model.to(dtype)
    inputs = {
        key: one.to(dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for key, one in inputs.items()
    }
    return fill_vectors(onelora.adapt(model, config), 0.02), inputs


def tensors(inputs):
    return {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}


def operators(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def arguments(program):
    return [str((node.args, node.kwargs)) for node in program.graph.nodes if node.op == "call_function"]


def cells(*first):
    """Every model, mode and dtype; those that are not in `first` are slow."""
    every = itertools.product(MODELS, MODES, DTYPES)
    return [pytest.param(*one, marks=() if one in first else pytest.mark.slow, id="-".join(one)) for one in every]


FIRST = [("bert", "fold", "bfloat16"), ("encoder_post_norm", "input", "bfloat16"), ("llama", "input", "float32")]


@pytest.mark.parametrize(("name", "mode", "dtype"), cells(*FIRST, *(("conv1x1", mode, "float32") for mode in MODES)))
def test_the_program_is_the_adapted_function(name, mode, dtype):
    model, inputs = adapted(name, DTYPES[dtype])
    oracle = paths.Oracle(model, inputs, grad=False)
    program = export_program(model, (), inputs, adapters=mode)
    assert {target.namespace for target in operators(program) if hasattr(target, "namespace")} == {"aten"}
    given = tensors(inputs) | (as_inputs(onelora.vectors(model)) if mode == "input" else {})
    oracle.check(main_output(program.module()(**given)), mode)


@pytest.mark.parametrize("name", MODELS)
def test_the_folded_program_is_the_bases_node_for_node(name):
    model, inputs, config = built(name)
    with torch.no_grad():  # else blocks of the model's own without gradients are graphs in the graph
        base = torch.export.export(copy.deepcopy(model), (), inputs, strict=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fill_vectors(onelora.adapt(model, config), 0.02)
    program = export_program(model, (), inputs)
    assert operators(program) == operators(base)
    assert arguments(program) == arguments(base)
    exact = merged_copy(
        model, torch.float64
    ).state_dict()  # rounded once: the nearest number, give or take float32's own
    assert set(program.state_dict) <= set(exact)
    for key, value in program.state_dict.items():
        assert_parity(value, exact[key], exact[key].to(value.dtype), key)
    onelora.detach(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_vectors_of_zeros_are_the_base(mode):
    model, inputs, config = built("bert")
    with torch.no_grad():
        base = model(**inputs).logits
    onelora.adapt(model, config)
    program = export_program(model, (), inputs, adapters=mode)
    given = tensors(inputs) | (as_inputs(onelora.vectors(model)) if mode == "input" else {})
    assert torch.equal(program.module()(**given)["logits"], base)


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("onelora_compile", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
saved, given, wanted = sys.argv[1:]
module = torch.export.load(saved).module()
given, wanted = torch.load(given), torch.load(wanted)
torch.testing.assert_close(module(**given), wanted)
try:
    import onelora_compile
except ImportError:
    print("alone")
"""


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("encoder_post_norm", "input"),
        ("bert", "fold"),
        pytest.param("bert", "input", marks=pytest.mark.slow),
        pytest.param("encoder_post_norm", "fold", marks=pytest.mark.slow),
    ],
)
def test_a_process_without_this_package_loads_and_runs_it(name, mode, tmp_path):
    model, inputs = adapted(name)
    program = export_program(model, (), inputs, adapters=mode)
    given = tensors(inputs) | (as_inputs(onelora.vectors(model)) if mode == "input" else {})
    torch.export.save(program, tmp_path / "m.pt2")
    with torch.no_grad():
        result = model(**inputs)
    torch.save({key: value.detach() for key, value in given.items()}, tmp_path / "given")
    torch.save(result if isinstance(result, torch.Tensor) else dict(result), tmp_path / "wanted")
    command = [sys.executable, "-P", "-c", ALONE, *(str(tmp_path / one) for one in ("m.pt2", "given", "wanted"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alone\n"


def test_trained_heads_and_norms_are_in_a_folded_program():
    model, x = small(train_norms=True, modules_to_save=["head"]), torch.randn(4, 6)
    program = export_program(model, (x,))
    oracle = merged_copy(model, torch.float64)(x.double())
    assert_parity(program.module()(x), oracle, merged_copy(model)(x))
    assert torch.equal(program.state_dict["head.weight"], model.head.weight)


@pytest.mark.parametrize("part", ["", "head"])
def test_what_is_compiled_as_one_graph_is_exported_without_a_warning(part):
    """Of torch 2.12: that one, an error here, left every size of later graphs dynamic.  2.11 skipped later frames."""
    model, x = small(), torch.randn(4, 6)
    with torch.no_grad():
        out = model(x)
    model.get_submodule(part).compile(backend="onelora", options={"inner": "eager"}, fullgraph=True, dynamic=True)
    torch.testing.assert_close(export_program(model, (x,)).module()(x), out)
    assert torch._dynamo.config.assume_static_by_default

    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    counter = CompileCounter()
    torch.compile(broken, backend=counter)(x)
    assert counter.frame_count == 2


def test_states_of_a_model():
    x = torch.randn(4, 6)
    model = small()
    with onelora.disabled(model), pytest.raises(onelora.StateError, match="disabled"):
        export_program(model, (x,))
    with torch.no_grad():
        out = model(x)
    compiled: Any = torch.compile(model, backend="onelora", options={"inner": "eager"})
    torch.testing.assert_close(export_program(compiled, (x,)).module()(x), out)
    merged = copy.deepcopy(model)
    onelora.merge(merged)
    torch.testing.assert_close(export_program(merged, (x,)).module()(x), out)
    detached = onelora.detach(model)
    with torch.no_grad():
        assert torch.equal(export_program(detached, (x,)).module()(x), detached(x))
    for plain in (merged, detached):
        with pytest.raises(onelora.StateError, match="needs an adapted model"):
            export_program(plain, (x,), adapters="input")
    with pytest.raises(onelora.ConfigError, match="adapters='load' is not one of 'fold', 'input'"):
        export_program(detached, (x,), adapters="load")


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


def test_what_can_not_be_folded_is_refused_by_name_and_can_be_an_input():
    model, x = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4)).eval(), torch.randn(2, 4)
    fill_vectors(onelora.adapt(model), 0.3)
    with pytest.raises(onelora.PassError, match="'1': the module computes something else"):
        export_program(model, (x,))
    program = export_program(model, (x,), adapters="input")
    torch.testing.assert_close(program.module()(x, **as_inputs(onelora.vectors(model))), model(x))
    with pytest.raises(onelora.ExportError, match="has no name to swap it by"):
        export_program(onelora.adapt(nn.Linear(4, 4)), (x,), adapters="input")


def test_a_program_that_is_not_the_model_is_refused(monkeypatch):
    model, x = small(), torch.randn(4, 6)

    def rows_off(program, inputs):
        program.state_dict["head.bias"] = nn.Parameter(program.state_dict["head.bias"] + 0.01)
        return vectors_to_inputs(program, inputs)

    monkeypatch.setattr(export, "vectors_to_inputs", rows_off)
    with pytest.raises(onelora.ExportError, match="differs from Two with its vectors"):
        export_program(model, (x,), adapters="input")
    export_program(model, (x,), adapters="input", verify=False)
    # What ignores its vectors is right for zeros, and for nothing else.
    monkeypatch.setattr(export, "open_operators", without_an_update)
    monkeypatch.setattr(export, "vectors_to_inputs", vectors_to_inputs)
    for vector in onelora.vectors(model).values():
        vector.data.zero_()
    with pytest.raises(onelora.ExportError, match="differs from Two with other vectors"):
        export_program(model, (x,), adapters="input")


def without_an_update(program):
    node = next(node for node in program.graph.nodes if "add_rank1" in str(node.target))
    node.replace_all_uses_with(node.args[0])
    program.graph_module.recompile()
    return program


def test_the_model_is_not_touched():
    model, x = small(train_norms=True), torch.randn(4, 6)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for mode in ("fold", "input"):
        program = export_program(model, (x,), adapters=mode)
        program.module()(*program.example_inputs[0], **program.example_inputs[1])
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_folded_in_inference_mode_gives_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(target_modules="all-linear")), 0.3)
    inputs = torch.randn(64, 8)
    with torch.inference_mode():
        program = export_program(model, (inputs,))

    def gradient(function, x):
        return torch.autograd.grad(function(x.requires_grad_()).square().sum(), x)[0]

    exact = gradient(copy.deepcopy(model).double(), inputs.double())
    assert_parity(gradient(program.module(), inputs.clone()), exact, gradient(model, inputs.clone()))
