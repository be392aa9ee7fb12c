"""Every way from a model to its adapted function, and what each must give: the pieces of test_paths.py."""

import contextlib
import copy
import warnings

import forms
import onnxruntime
import pytest
import torch
from architectures import ARCHITECTURES
from architectures.outputs import main_output
from oracle import row_sums

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, gradients, merged_copy

CASES = {
    **{f"form:{name}": name for name, (_, _, vectors) in forms.FORMS.items() if vectors is not None},
    **{name: name for name in ARCHITECTURES},
}


# What fold_onnx refuses in a file that PyTorch wrote, and what it says: weights of more than two axes.
NOT_FOLDED = dict.fromkeys(
    ("form:bmm", "form:baddbmm_in_place", "form:left_experts"), "1 of 1 vectors have no place in .*: w: no weight"
)


class Graphs:
    """An inner backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        return gm.forward


def build(case, train=False):
    """The model without dropout, and its keyword inputs."""
    torch.manual_seed(0)
    if case.startswith("form:"):
        model, x, _ = forms.build(case.removeprefix("form:"))
        inputs = {"x": x}
    else:
        model, inputs = ARCHITECTURES[case]()
    return without_dropout(model).train(train), inputs


def without_dropout(model):
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if hasattr(holder, "__dict__") else ():
                if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, _DROPOUTS))):
                    with contextlib.suppress(AttributeError):
                        setattr(holder, name, 0.0)
    return model


_DROPOUTS = (torch.nn.modules.dropout._DropoutNd,)


def run(model, inputs):
    torch.manual_seed(1)  # masks and noise that models draw
    return main_output(model(**inputs))


def weighted(out):
    """A scalar with another slope at each output."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)).sum()


def doubled(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


class Oracle:
    """The adapted function in float64, from nothing but merged weights, and plain PyTorch's own error beside it."""

    def __init__(self, model, inputs, grad):
        self.exact_model, plain_model = merged_copy(model, torch.float64), merged_copy(model)
        with torch.no_grad():
            self.exact = run(copy.deepcopy(self.exact_model), doubled(inputs))
            self.plain = run(copy.deepcopy(plain_model), inputs)
        if grad:
            self.sums = row_sums(model, self.exact_model, lambda one: weighted(run(one, doubled(inputs))))
            self.plain_sums = row_sums(model, plain_model, lambda one: weighted(run(one, inputs)))

    def check(self, out, what):
        assert_parity(out.detach(), self.exact, self.plain, what, floor=64)

    def check_gradients(self, out, vectors, what):
        for key, gradient in gradients(weighted(out), vectors).items():
            # factor: detr's decoder has gradients that cancel to 1e-7, where either error is luck
            assert_parity(gradient, self.sums[key], self.plain_sums[key], f"{what}: {key}", factor=3, floor=256)


def compiled(model):
    graphs = Graphs()
    return torch.compile(model, backend="onelora", options={"inner": graphs}), graphs


def first_call(run_it):
    """What a first call returns, and the backend's messages."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", onelora.OneLoRAWarning)
        out = run_it()
    return out, [str(one.message) for one in caught if issubclass(one.category, onelora.OneLoRAWarning)]


def check_torch_paths(case, train, grad):
    """`check_model` of a form or an architecture."""
    model, inputs = build(case, train)
    return check_model(model, inputs, grad)


def check_model(model, inputs, grad, scale=0.02):
    """One line, adapt then compile, and eager, against one oracle; returns whether the first call ran as it is."""
    mode = contextlib.nullcontext if grad else torch.no_grad
    with mode():
        base = run(copy.deepcopy(model), inputs).detach()
    untouched, adapted = copy.deepcopy(model), onelora.adapt(copy.deepcopy(model))

    fast, graphs = compiled(model)
    with mode():
        out, messages = first_call(lambda: run(fast, inputs))
    if not torch.equal(out.detach(), base):  # Dynamo itself may take another path, as the fused transformer layer's
        with mode():
            base = run(torch.compile(untouched, backend="eager"), inputs).detach()
        # Whether a weight is trained decides how matmul folds its arguments.
        allowed = 8 * torch.finfo(base.dtype).eps * base.abs().max() if grad else 0
        assert (out.detach() - base).abs().max() <= allowed, "the first call is not the base"
    message = next(one for one in messages if "adapted" in one)
    as_it_is = "run as it is" in message
    expected, found = onelora.vectors(adapted), onelora.vectors(model)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert not any(vector.any() for vector in found.values())
    flags = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if grad:
        zero = Oracle(model, inputs, grad)
        if as_it_is:
            weighted(out).backward()  # the base's own gradients go nowhere
            assert all(p.grad is None for p in model.parameters())
        else:
            zero.check_gradients(out, found, "first call")

    fill_vectors(model, scale)
    fill_vectors(adapted, scale)
    oracle = Oracle(adapted, inputs, grad)
    assert (oracle.exact - base).abs().max() > 10 * (oracle.plain - oracle.exact).abs().max(), "too small to see"
    again, counted = compiled(adapted)
    for what, one, vectors in (
        ("one line", fast, found),
        ("adapt then compile", again, expected),
        ("eager", adapted, expected),
    ):
        with mode():
            out = run(one, inputs)
        oracle.check(out, what)
        if grad:
            oracle.check_gradients(out, vectors, what)
    assert len(graphs.graphs) <= len(counted.graphs), "the first call cost more than one graph"
    return as_it_is


def check_onnx_paths(case, folder):
    """Exported, and folded into a file that PyTorch wrote of the base, in ONNX Runtime."""
    model, inputs = build(case)
    foreign = folder / "base.onnx"
    with contextlib.redirect_stdout(None):
        torch.onnx.export(copy.deepcopy(model), (), foreign, kwargs=inputs, dynamo=True, verbose=False)
    fill_vectors(onelora.adapt(model), 0.02)
    oracle = Oracle(model, inputs, grad=False)
    out = run(model, inputs)
    with torch.no_grad():
        index = next(i for i, one in enumerate(tensors(model(**inputs))) if one.shape == out.shape)
    onelora.save_adapter(model, folder / "a.safetensors")
    report = export_onnx(model, (), folder / "own.onnx", kwargs=inputs, progress=False)
    assert not report.unused
    ways = {"exported": folder / "own.onnx", "folded into a foreign file": folder / "folded.onnx"}
    if case in NOT_FOLDED:
        with pytest.raises(onelora.ExportError, match=NOT_FOLDED[case]):
            fold_onnx(foreign, folder / "a.safetensors", ways.popitem()[1], progress=False)
    else:
        folded = fold_onnx(foreign, folder / "a.safetensors", folder / "folded.onnx", progress=False)
        assert set(folded.folded) == set(onelora.vectors(model))
    for what, path in ways.items():
        session = onnxruntime.InferenceSession(path)
        feeds = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
        oracle.check(torch.from_numpy(session.run(None, feeds)[index]), what)


def tensors(out):
    """The tensors of a model's output, as an ONNX file lists them."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
