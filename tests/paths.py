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


def _forms(*names):
    return [f"form:{name}" for name in names]


# What fold_onnx refuses in a file that PyTorch wrote, and what it says of a vector.  Weights of more than two axes:
_EXPERTS = (
    *_forms(
        "einsum_two_inputs",
        "baddbmm_scaled",
        "bmm",
        "bmm_mT",
        "baddbmm",
        "baddbmm_in_place",
        "baddbmm_method",
        "addbmm",
        "addbmm_left",
        "left_experts",
    ),
    *_forms(
        "einsum_heads", "einsum_experts", "einsum_ellipsis_in_both", "experts_by_index", "linear_weight_first_batched"
    ),
    *_forms("matmul_experts_of_a_vector", "left_experts_of_a_vector"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "switch_moe", "einsum_linear"),
)
NOT_FOLDED = {
    **dict.fromkeys(_EXPERTS, r"vectors have no place in .*: no weight of its shape"),
    "form:unflattened": "1 of 1 vectors have no place in .*: w: no weight of its shape",  # one part of it
    # summed by the exporter along the axis on which x has one entry
    **dict.fromkeys(
        _forms("einsum_of_one_head_for_all", "tensordot_of_one_input_for_all"),
        "1 of 1 vectors have no place in .*: w: no weight of its shape",
    ),
    "detr": "4 of 36 vectors have no place",  # what they multiply is constant, and computed by the exporter
    "form:tensordot_axes": "is not the base of the adapter: none of its weights is; w ",  # reshaped by the exporter
}
# What torch.onnx alone can't convert of the base; and what this package can't either, or ONNX Runtime does not open.
NO_FOREIGN_FILE = {"t5", "xlnet", "swin", "beit", "packed_slices"}
NOT_EXPORTED = {
    "pixart": "ONNX Runtime can't load",
    "xlnet": "torch.onnx can't convert the captured program",
    "packed_slices": "torch.onnx can't convert the captured program",
}
# Where Dynamo captures nothing, no backend is asked.
NOT_CAPTURED = {"lstm"}


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
    return check_uncaptured(model, inputs) if case in NOT_CAPTURED else check_model(model, inputs, grad)


def check_uncaptured(model, inputs):
    """The one line does nothing, as any backend; after `adapt` every way is the adapted function."""
    fast, graphs = compiled(model)
    run(fast, inputs)
    assert not graphs.graphs
    assert not onelora.vectors(model)
    fill_vectors(onelora.adapt(model), 0.02)
    oracle = Oracle(model, inputs, grad=False)
    oracle.check(run(model, inputs), "eager")
    oracle.check(run(fast, inputs), "adapted, then compiled")


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
    foreign, own = folder / "base.onnx", folder / "own.onnx"
    if case not in NO_FOREIGN_FILE:
        with contextlib.redirect_stdout(None):
            torch.onnx.export(copy.deepcopy(model), (), foreign, kwargs=inputs, dynamo=True, verbose=False)
    fill_vectors(onelora.adapt(model), 0.02)
    oracle = Oracle(model, inputs, grad=False)
    onelora.save_adapter(model, folder / "a.safetensors")
    if case in NOT_EXPORTED:
        with pytest.raises(onelora.ExportError, match=NOT_EXPORTED[case]):
            export_onnx(model, (), own, kwargs=inputs, progress=False)
        return
    report = export_onnx(model, (), own, kwargs=inputs, progress=False)
    assert not report.unused
    ways = {"exported": own}
    if case in NOT_FOLDED:
        with pytest.raises(onelora.OneLoRAError, match=NOT_FOLDED[case]):
            fold_onnx(foreign, folder / "a.safetensors", folder / "folded.onnx", progress=False)
    elif foreign.exists():
        ways["folded into a foreign file"] = folder / "folded.onnx"
        folded = fold_onnx(foreign, folder / "a.safetensors", folder / "folded.onnx", progress=False)
        assert set(folded.folded) == set(onelora.vectors(model))
    main = main_of(model, inputs, [one.name for one in onnxruntime.InferenceSession(own).get_outputs()])
    for what, path in ways.items():
        session = onnxruntime.InferenceSession(path)
        feeds = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
        oracle.check(main([torch.from_numpy(value) for value in session.run(None, feeds)]), what)


def main_of(model, inputs, names):
    """What takes the output that `run` gives from all tensors that the model gives, in order."""
    with torch.no_grad():
        given = model(**inputs)
    if isinstance(given, dict):
        return lambda values: main_output(dict(zip(names, values, strict=True)))
    index = next(i for i, one in enumerate(tensors(given)) if one is main_output(given))
    return lambda values: values[index]


def tensors(out):
    """The tensors of a model's output, as an ONNX file lists them."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
