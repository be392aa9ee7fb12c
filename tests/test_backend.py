"""torch.compile(model, backend="onelora"): graphs, options, recompilation, what is private to a model."""

import copy
from typing import Any

import pytest
import torch
import zoo
from counted_graphs import Counter, build

import onelora_compile as onelora
from onelora_compile.passes.lowerings.producer_consumer import ADD_RANK1_BY_MATMUL
from onelora_compile.testing import fill_vectors, merged_copy


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_one_feature_sum_per_input_and_one_update_per_linear():
    counter = Counter()
    model = fill_vectors(onelora.adapt(zoo.MLP()))
    x = torch.randn(5, 8)
    torch.testing.assert_close(build(counter, model, fullgraph=True)(x), model(x))
    (graph,) = counter.graphs
    assert targets(graph).count(torch.sum) == 2  # of x, and of h, which b and c share
    assert targets(graph).count(ADD_RANK1_BY_MATMUL) == 3
    assert sum("onelora" in str(target) for target in targets(graph)) == 3


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("hf_vit", "gpt2") else ()) for name in zoo.MODELS]
)
def test_no_more_graphs_than_the_frozen_base(name):
    base, inputs = zoo.MODELS[name]()
    base.requires_grad_(False)
    plain, counter = Counter(), Counter()
    torch.compile(base, backend=plain)(**inputs)
    torch.compiler.reset()
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    out = zoo.logits(build(counter, model)(**inputs))
    torch.testing.assert_close(out, zoo.logits(model(**inputs)), rtol=1e-4, atol=1e-5)
    assert len(counter.graphs) == len(plain.graphs)


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_dynamic_shapes_do_not_recompile(mode):
    counter = Counter()
    model = fill_vectors(onelora.adapt(zoo.MLP()))
    compiled = build(counter, model, dynamic=True, fullgraph=True)
    for batch in (3, 5, 9):
        x = torch.randn(batch, 8)
        with torch.set_grad_enabled(mode == "training"):
            torch.testing.assert_close(compiled(x), model(x))
    assert len(counter.graphs) == 1


def test_a_new_shape_recompiles_and_stays_right():
    counter = Counter()
    model = fill_vectors(onelora.adapt(zoo.MLP()))
    compiled = build(counter, model, dynamic=False)
    for shape in ((3, 8), (5, 8), (2, 3, 8), (8,)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(counter.graphs) == 4


def test_graph_breaks_give_several_adapted_graphs():
    class Broken(zoo.MLP):
        def forward(self, x):
            h = torch.relu(self.a(x))
            torch._dynamo.graph_break()
            return self.b(h) + self.c(h)

    counter = Counter()
    model = fill_vectors(onelora.adapt(Broken()))
    x = torch.randn(5, 8)
    torch.testing.assert_close(build(counter, model)(x), model(x))
    assert [targets(graph).count(ADD_RANK1_BY_MATMUL) for graph in counter.graphs] == [1, 2]


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_training_through_the_compiled_model_is_training_in_eager(inner):
    eager = onelora.adapt(zoo.MLP())
    twin = copy.deepcopy(eager)
    compiled: Any = torch.compile(twin, backend="onelora", options={"inner": inner})
    x = torch.randn(5, 8)
    for model in (eager, compiled):
        optimizer = torch.optim.SGD(onelora.trainable_parameters(model), lr=0.002)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for name, vector in onelora.vectors(twin).items():
        assert vector.any()
        torch.testing.assert_close(vector, onelora.vectors(eager)[name])


@pytest.mark.parametrize("frozen", [True, False])
def test_adapting_after_a_compiled_call_takes_effect(frozen):
    model = zoo.MLP().requires_grad_(not frozen)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, 8)
    base = compiled(x).detach()
    fill_vectors(onelora.adapt(model), 0.5)
    torch.testing.assert_close(compiled(x), merged_copy(model)(x))
    onelora.detach(model)
    assert torch.equal(compiled(x), base)


def test_a_frozen_copy_of_the_base_in_the_same_process_keeps_its_own_graph():
    # A forward hook fails here: Dynamo does not guard on hooks, and the student would run the teacher's graph.
    teacher = zoo.MLP().requires_grad_(False)
    student = fill_vectors(onelora.adapt(copy.deepcopy(teacher)), 0.5)
    counter = Counter()
    fast_student, fast_teacher = torch.compile(student, backend=counter), torch.compile(teacher, backend=counter)
    x = torch.randn(5, 8)
    for _ in range(2):
        assert torch.equal(fast_student(x), student(x))
        assert torch.equal(fast_teacher(x), teacher(x))
    assert not torch.allclose(student(x), teacher(x))
    assert len(counter.graphs) == 2


def test_two_adapted_models_share_a_graph_and_not_their_vectors():
    counter = Counter()
    first = fill_vectors(onelora.adapt(zoo.MLP()), 0.5, seed=1)
    second = fill_vectors(copy.deepcopy(first), 0.5, seed=2)
    x = torch.randn(5, 8)
    assert torch.equal(build(counter, first)(x), first(x))
    assert torch.equal(build(counter, second)(x), second(x))
    assert not torch.equal(first(x), second(x))
    assert len(counter.graphs) == 1


def test_twenty_four_adapters_in_a_row_one_compilation(tmp_path):
    counter = Counter()
    model = onelora.adapt(zoo.MLP())
    compiled = build(counter, model, fullgraph=True)
    x = torch.randn(5, 8)
    paths = []
    for index in range(24):
        twin = fill_vectors(copy.deepcopy(model), 0.5, seed=index)
        paths.append(tmp_path / f"{index}.safetensors")
        onelora.save_adapter(twin, paths[-1])
    base = compiled(x).detach()
    optimizer = torch.optim.SGD(onelora.trainable_parameters(model), lr=0.1)
    for index, path in enumerate(paths):
        onelora.load_adapter(compiled, path)
        expected = merged_copy(fill_vectors(copy.deepcopy(model), 0.5, seed=index))(x)
        out = compiled(x)
        torch.testing.assert_close(out, expected)
        with onelora.disabled(compiled):
            assert torch.equal(compiled(x), base)
        out.sum().backward()
        optimizer.step()
        assert not torch.allclose(compiled(x), expected)
    assert len(counter.graphs) == 1


def test_modules_to_save_do_not_add_graphs_when_disabled():
    counter = Counter()
    model = onelora.adapt(zoo.MLP(), onelora.OneLoRAConfig(modules_to_save=["c"]))
    compiled = build(counter, model)
    x = torch.randn(5, 8)
    base = compiled(x).detach()
    with torch.no_grad():
        model.c.weight.add_(1.0)
    assert not torch.allclose(compiled(x), base)
    with onelora.disabled(model):
        assert torch.equal(compiled(x), base)
    assert len(counter.graphs) == 1


def test_dynamos_own_graph_is_left_alone():
    # Dynamo generates code from its graph after the backend returned.
    seen = []

    def spy(gm, example_inputs):
        seen.append((gm, [str(node.target) for node in gm.graph.nodes]))
        return onelora_backend(gm, example_inputs, options={"inner": "eager"})

    from onelora_compile.backend import onelora_backend

    torch.compile(onelora.adapt(zoo.MLP()), backend=spy)(torch.randn(5, 8))
    gm, before = seen[0]
    assert [str(node.target) for node in gm.graph.nodes] == before


def test_the_entry_point_is_found_without_an_import(tmp_path):
    import subprocess
    import sys

    script = tmp_path / "program.py"
    script.write_text(
        "import sys, torch, warnings\n"
        "assert 'onelora' in torch.compiler.list_backends()\n"
        "model = torch.nn.Linear(4, 3)\n"
        "warnings.simplefilter('ignore')\n"
        "torch.compile(model, backend='onelora', options={'inner': 'eager'})(torch.randn(2, 4))\n"
        "assert type(model).__name__ == 'OneLoRALinear', type(model)\n"
        "print('adapted')\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "adapted", done.stderr


def test_an_inplace_write_between_siblings_keeps_their_sums_apart():
    class Mutating(zoo.MLP):
        def forward(self, x):
            h = self.a(x)
            left = self.b(h)
            h.mul_(2.0)
            return left + self.c(h)

    counter = Counter()
    model = fill_vectors(onelora.adapt(Mutating()), 0.5)
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(build(counter, model)(x), merged_copy(model)(x))
    assert targets(counter.graphs[0]).count(torch.sum) == 3


def test_half_precision_base_and_autocast():
    x = torch.randn(64, 8)
    model = fill_vectors(onelora.adapt(zoo.MLP().bfloat16()), 0.5)
    compiled = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    out = compiled(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, model(x.bfloat16()), rtol=2e-2, atol=2e-2)

    torch.compiler.reset()
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    compiled = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    with torch.autocast("cpu", torch.bfloat16):
        eager, fast = model(x), compiled(x)
    assert eager.dtype == fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast, eager, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(eager.float(), merged_copy(model)(x), rtol=5e-2, atol=0.2)


def test_the_backend_takes_a_graph_that_is_not_dynamos():
    from onelora_compile.backend import onelora_backend

    model = zoo.MLP()
    x = torch.randn(5, 8)
    compiled = onelora_backend(torch.fx.symbolic_trace(model), [x], options={"inner": "eager"})
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_an_adapted_model_works_with_any_other_backend(backend):
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(5, 8)
    torch.testing.assert_close(compiled(x), merged_copy(model)(x))
    compiled(x).sum().backward()
    assert all(v.grad is not None and v.grad.any() for v in onelora.vectors(model).values())


@pytest.mark.parametrize("strict", [True, False])
def test_an_adapted_model_can_be_exported_by_hand(strict):
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(5, 8)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(program.run_decompositions().module()(x), model(x))


def test_a_copy_of_the_compiled_model():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    compiled: Any = torch.compile(model, backend="onelora", options={"inner": "eager"})
    x = torch.randn(5, 8)
    expected = compiled(x)
    twin = copy.deepcopy(compiled)
    fill_vectors(twin, 0.5, seed=7)
    torch.testing.assert_close(twin(x), merged_copy(twin)(x))
    torch.testing.assert_close(compiled(x), expected)
    assert not torch.allclose(twin(x), expected)
