"""`torch.set_default_device`: what is made without a device goes to another one than the model's.

The meta device is that other one: every machine has it, and nothing that lands on it meets a number of the model.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import onelora_compile as onelora
from onelora_compile.exporters import OnnxRunner, export_onnx, export_program, fold_onnx, verify
from onelora_compile.testing import fill_vectors


class Unknown(nn.Module):
    """A linear of an unknown class: what it computes is found by calling it."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("packed", torch.randn(8, 8))

    def forward(self, x):
        return x @ self.packed


class Model(nn.Module):
    """Linears that are called, read, packed and cut, a batch norm, and a head that is trained."""

    def __init__(self, middle=None):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.norm, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.attention, self.middle = nn.MultiheadAttention(8, 2, batch_first=True), middle or nn.Identity()

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).split(8, -1)
        return self.head(self.middle(self.norm(self.out(self.attention(q, k, v, need_weights=False)[0])[:, 0])))


class Given:
    """What a user has before anything is called: models on the CPU, an input, files."""

    def __init__(self, folder):
        self.config = onelora.OneLoRAConfig(modules_to_save=["head"])
        self.base, self.adapted = Model().eval(), self._adapted(Model())
        self.unknown, self.adapted_unknown = Model(Unknown()).eval(), self._adapted(Model(Unknown()))
        called = onelora.OneLoRAConfig(target_modules=["out"])
        self.called = fill_vectors(onelora.adapt(Model().eval(), called), 0.1)
        self.x, self.folder = torch.randn(3, 5, 8), folder
        self.file, self.of_called, self.out = (folder / name for name in ("a.safetensors", "b.safetensors", "out.onnx"))
        onelora.save_adapter(self.adapted, self.file)
        onelora.save_adapter(self.called, self.of_called)

    def _adapted(self, model):
        return fill_vectors(onelora.adapt(model.eval(), self.config), 0.1)


def load(g):
    return onelora.load_adapter(g.base, g.file)(g.x)


def load_beside(g):
    onelora.load_adapter(g.adapted, g.file, adapter_name="again")
    return onelora.set_adapter(g.adapted, "again", scale=0.5)(g.x)


def save_unknown(g):
    onelora.save_adapter(g.adapted_unknown, g.folder / "b.safetensors")
    return onelora.load_adapter(g.unknown, g.folder / "b.safetensors")(g.x)


def save_to_peft(g):
    onelora.save_adapter(g.called, g.folder / "peft", format="peft")
    return onelora.load_adapter(g.base, g.folder / "peft")(g.x)


def save_to_miss(g):
    onelora.save_adapter(g.called, g.folder / "peft", format="peft-miss")
    return onelora.load_adapter(g.base, g.folder / "peft")(g.x)


def combine(g):
    onelora.combine({g.file: 0.5}, g.folder / "b.safetensors", trained="drop")
    onelora.combine({"default": -1}, model=g.adapted, adapter_name="minus", trained="drop")
    return load(g), onelora.set_adapter(g.adapted, "minus")(g.x)


def rows(g):
    parameter = onelora.row_parameters(onelora.add_adapter(g.called, "other"))["other"]
    with torch.no_grad():
        parameter.fill_(0.1)
    with onelora.rows(g.called, ["default", "other", None]):
        y = g.called(g.x)
        y.sum().backward()
    return y, parameter.grad


def one_line(g):
    fast = torch.compile(g.unknown, backend="onelora", options={"inner": "aot_eager"})
    with pytest.warns(onelora.OneLoRAWarning, match="adapted"):
        first = fast(g.x)
    vectors = list(onelora.vectors(fill_vectors(g.unknown)).values())
    return first, fast(g.x), torch.autograd.grad(fast(g.x).sum(), vectors)


def disabled(g):
    with onelora.disabled(g.adapted):
        return g.adapted(g.x)


def merge(g):
    onelora.merge(g.adapted)
    return g.adapted(g.x)


def detach(g):
    return onelora.detach(g.adapted)(g.x)


def reports(g):
    return str(onelora.summary(g.adapted)), str(onelora.explain(g.adapted, g.x)), str(onelora.diagnose(g.base, g.x))


def program(g):
    return export_program(g.adapted, (g.x,)).module()(g.x)


def fold(g):
    with torch.device("cpu"):
        export_onnx(g.base, (g.x,), g.folder / "base.onnx")
    fold_onnx(g.folder / "base.onnx", g.file, g.out)
    assert verify(g.out, g.adapted, (g.x,)).passed
    return OnnxRunner(g.out).run({"x": g.x.numpy()})


def exported(mode):
    def run(g):
        export_onnx(g.adapted, (g.x,), g.out, adapters=mode)
        return OnnxRunner(g.out).run({"x": g.x.numpy()})

    return run


def export_bank(g):
    export_onnx(g.called, (g.x,), g.out, adapters="bank", bank=[g.of_called])
    runner = OnnxRunner(g.out)
    runner.use("b")
    return runner.run({"x": g.x.numpy()})


STEPS = [load, load_beside, save_unknown, save_to_peft, save_to_miss, combine, rows, one_line, disabled, merge, detach]
STEPS += [reports, program, fold, export_bank]
ALL = {step.__name__: step for step in STEPS} | {f"export_{m}": exported(m) for m in ("fold", "load")}


SLOW = ("export_fold", "export_bank", "fold")  # several exports each


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ALL])
def test_is_that_of_the_model_whatever_the_default(name, tmp_path):
    ours, theirs = (tmp_path / one for one in ("ours", "theirs"))
    ours.mkdir()
    theirs.mkdir()
    given = Given(theirs)
    with torch.device("meta"):
        found = ALL[name](given)
    wanted = ALL[name](Given(ours))
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert (one == other).all() if hasattr(one, "all") else one == other
