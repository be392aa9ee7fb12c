"""How often a forward uses a weight is counted; where nobody can count it, its file is refused by name."""

import copy

import onnx_tools as tools
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.adapting.select_targets import select
from onelora_compile.errors import ExportError
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy
from onelora_compile.weights.adapter_file import read_adapter


class Loop(nn.Module):
    """Uses `b` once on what it learned, and on each of what it is given."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.block = nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.first = nn.Parameter(torch.randn(8))
        self.register_buffer("table", torch.randn(8, 8))


def recurrent(s, x):
    state = s.first
    for t in range(x.shape[1]):
        state = torch.tanh(s.a(x[:, t]) + s.b(state))
    return state


def unfolded(s, x, steps: int = 3):
    state = s.first
    for _ in range(steps):
        state = s.b(state) + s.a(x[:, 0])
    return state


LOOPS = {
    "recurrent": recurrent,
    "by_a_number": unfolded,
    "unbind": lambda s, x: sum(s.b(one) for one in x.unbind(1)) + s.a(x[:, 0]) - s.b(s.first),
    "iteration": lambda s, x: torch.stack([s.b(one) for one in x]).sum(0)[:2] + s.a(x[:, 0]) - s.b(s.first),
    "chunk": lambda s, x: sum(s.b(one[:, 0]) for one in x.chunk(x.size(1), 1)) + s.a(x[:, 0]) - s.b(s.first),
    "in_a_block": lambda s, x: sum(s.block(one) for one in x.unbind(1)) + s.a(x[:, 0]) - s.block(s.table).sum(0),
    "made_of_a_size": lambda s, x: (
        sum(s.b(one) for one in x.unbind(1)) + s.a(x[:, 0]) + s.b(torch.arange(8.0) * x.shape[1])
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_use_on_constants_besides_a_loop_over_the_input_is_not_counted_but_refused(name, tmp_path):
    torch.manual_seed(0)
    base, x = type("Model", (Loop,), {"forward": LOOPS[name]})().eval(), torch.randn(2, 3, 8)
    names = ["a", "block.0" if name == "in_a_block" else "b"]
    config = onelora.OneLoRAConfig(target_modules=names)
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), config), 0.3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    torch.onnx.export(base, (x,), tmp_path / "base.onnx", dynamo=True, verbose=False)
    with pytest.raises(ExportError, match=r"the uses of (b|block\.0) can't be counted"):
        fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    export_onnx(model, (x,), tmp_path / "right.onnx")


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: sum(s.b(one) for one in x.unbind(1)) + s.a(x[:, 0]) + s.first,
        lambda s, x: s.b(s.first) + sum(s.a(one) for one in x.unbind(1)),
        lambda s, x: s.b(x[:, 0]) + s.a(x.new_zeros(x.shape[0], 8) + x[:, 1]),
    ],
)
def test_a_loop_without_a_use_on_constants_is_counted(forward):
    torch.manual_seed(0)
    base = type("Model", (Loop,), {"forward": forward})().eval()
    assert all(most for _, most in select(base, onelora.OneLoRAConfig()).uses.values())


def dual(s, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(s.b(torch.autograd.forward_ad.make_dual(x, s.table[:2]))).tangent


DERIVED = {
    "jvp": lambda s, x: torch.func.jvp(lambda z: torch.tanh(s.b(z)), (x,), (s.table[:2],))[1] + s.a(x),
    "jvp_of_a_block": lambda s, x: torch.func.jvp(s.block, (x,), (s.table[:2],))[1] + s.a(x),
    "vjp": lambda s, x: torch.func.vjp(s.b, x)[1](s.table[:2])[0] + s.a(x),
    "dual": dual,
    "jacfwd": lambda s, x: torch.func.jacfwd(lambda z: s.b(z).sum())(x) + s.a(x),
    "grad": lambda s, x: torch.func.grad(lambda z: s.b(z).sin().sum())(x) + s.a(x),
}


@pytest.mark.parametrize("name", DERIVED)
def test_uses_under_a_derivative_are_not_counted_but_refused(name, tmp_path):
    torch.manual_seed(0)
    base = type("Model", (Loop,), {"forward": DERIVED[name]})().eval()
    used = "block.0" if name == "jvp_of_a_block" else "b"
    model = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(target_modules=[used]))
    onelora.save_adapter(fill_vectors(model, 0.3), tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").uses == {used: (1, 0)}
    # Of the same weights: exporters take few of these forwards, and what they write holds the value of a derivative.
    base.__class__ = type("Plain", (Loop,), {"forward": lambda s, x: s.block(s.b(s.a(x)))})
    tools.torchscript(base, (torch.randn(2, 8),), tmp_path / "base.onnx")
    with pytest.raises(ExportError, match=rf"the uses of {used} can't be counted: .* a derivative"):
        fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    assert not (tmp_path / "out.onnx").exists()


SHARED = {
    "a_lookup": lambda s, ids: F.embedding(ids, s.head.weight) + s.embed(ids),
    "rows": lambda s, ids: s.head.weight[ids],
    "by_both_names": lambda s, ids: F.embedding(ids, s.head.weight) + F.embedding(ids, s.embed.weight),
    "the_embedding's": lambda s, ids: s.embed.weight[ids],
}


@pytest.mark.parametrize("name", SHARED)
def test_reads_of_a_weight_that_an_embedding_shares_are_adapted_and_a_file_of_them_refused(name, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.middle, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.middle(SHARED[name](self, ids)))

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.tensor([[1, 3, 5]])
    tools.torchscript(model, (ids,), tmp_path / "base.onnx")
    fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["head"])), 0.3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    exact, plain = merged_copy(model, torch.float64)(ids), merged_copy(model)(ids)
    assert_parity(model(ids), exact, plain)
    with pytest.raises(ExportError, match=r"the uses of head can't be counted: .* an embedding shares"):
        fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    export_onnx(model, (ids,), tmp_path / "right.onnx")
    found = onnxruntime.InferenceSession(tmp_path / "right.onnx").run(None, {"ids": ids.numpy()})[0]
    assert_parity(torch.from_numpy(found), exact, plain)


class Caller(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(8, 8)

    def forward(self, x, t):
        return self.out(x) * self.inner(t, dtype=x.dtype)


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, t, dtype):
        return self.second(torch.tanh(self.fc(t.exp()))).to(dtype)


TWICE = {"block.inner.fc": (2, 2), "block.inner.second": (2, 2)}
SEVERAL = {
    "the_same_value": (lambda s, x, t: s.block(x, t) + s.block.inner(t, dtype=x.sin().dtype), {}),
    "another_value": (
        lambda s, x, t: s.block(x, t) + s.block.inner(t.sin(), dtype=x.dtype),
        TWICE,
    ),
    "computed_again": (lambda s, x, t: s.block(x, t.sin()) + s.block.inner(t.sin(), dtype=x.dtype), {}),
    "by_two_blocks": (lambda s, x, t: s.block(x, t) + s.second(x, t), {}),
    "by_two_blocks_of_others": (lambda s, x, t: s.block(x, t) + s.second(x, t.cos()), TWICE),
    "on_a_constant": (lambda s, x, t: s.block(x, t) + s.block.inner(s.table, x.dtype), TWICE),
}


@pytest.mark.parametrize("tool", ["torchscript", "dynamo", "dynamo_plain"])
@pytest.mark.parametrize("name", SEVERAL)
def test_a_module_that_several_call_with_the_same_is_used_once(name, tool, tmp_path):
    use, expected = SEVERAL[name]

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Caller(Embed())
            self.second = Caller(self.block.inner) if name.startswith("by_two") else None
            self.register_buffer("table", torch.randn(5, 8))

        def forward(self, x, t):
            return use(self, x, t)

    torch.manual_seed(0)
    model, given = Several().eval(), (torch.randn(5, 8), torch.randn(5, 8))
    tools.PLAIN[tool](model, given, tmp_path / "base.onnx")
    fill_vectors(onelora.adapt(model), 0.3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").uses == expected
    try:
        fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    except ExportError:
        # The file holds what the exporter computed of it, or two modules' uses, of which one may be a frozen copy's.
        assert name == "on_a_constant" or (name, tool) == ("by_two_blocks", "dynamo_plain")
        return
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    feed = {one.name: value.numpy() for one, value in zip(session.get_inputs(), given, strict=True)}
    exact = merged_copy(model, torch.float64)(*(one.double() for one in given))
    assert_parity(torch.from_numpy(session.run(None, feed)[0]), exact, merged_copy(model)(*given))


def test_an_embedding_that_reads_its_own_weight_hides_no_use_of_the_head_that_shares_it():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return F.embedding(ids, self.weight) * 0.5

    model = nn.Sequential()
    model.embed, model.head = Scaled(16, 8), nn.Linear(8, 16)
    model.head.weight = model.embed.weight
    found = select(model, onelora.OneLoRAConfig())
    assert (list(found.targets), found.uses, found.not_linear) == (
        ["head"],
        {},
        {"embed": "an embedding, not a linear op"},
    )
