"""fold_onnx into files whose weights were scaled before they were quantised, as SmoothQuant and AWQ do.

The oracle is the adapted model in float64.  What is scaled mildly may fold, where the error stays that of the quantised
file; all else is refused by name.  What was only quantised must fold, by whatever rule its numbers were chosen.
"""

import copy
import dataclasses
import logging

import numpy as np
import onnx
import onnx_tools as tools
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_graphs import assert_arrays, session
from torch import nn
from torch.nn import functional

import onelora_compile as onelora
from onelora_compile.errors import BaseMismatchError, ExportError
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import fill_vectors, merged_copy
from onelora_compile.weights.adapter_file import read_adapter
from onelora_compile.weights.fingerprint import fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
WIDTH, HIDDEN = 64, 128


class Gated(nn.Module):
    """A block of a decoder: a norm before two linears, whose product goes into a third."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def scaled(base, spread, only_behind_norms=False):
    """The same function: columns by factors from 1/spread to spread, the inverse in what comes before."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(3)

    def factors(count):
        return torch.exp((torch.rand(count, generator=generator) * 2 - 1) * np.log(spread))

    with torch.no_grad():
        for block in model:
            s, t = factors(WIDTH), factors(HIDDEN)
            for linear in (block.gate, block.up):
                linear.weight *= s
            block.norm.weight /= s
            block.norm.bias /= s
            if not only_behind_norms:
                block.down.weight *= t
                block.up.weight /= t[:, None]
    return model


@dataclasses.dataclass
class Setup:
    base: nn.Module
    adapter: object
    x: torch.Tensor
    plain: np.ndarray
    exact: np.ndarray


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    torch.manual_seed(0)
    base = nn.Sequential(*(Gated() for _ in range(3))).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            drawn = torch.randn_like(parameter)
            norms = {"norm.weight": torch.exp(0.4 * drawn), "norm.bias": 0.2 * drawn}
            parameter.copy_(norms.get(name.partition(".")[2], drawn / parameter.shape[-1] ** 0.5))
    model, x = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.03), torch.randn(40, WIDTH)
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    onelora.save_adapter(model, path)
    wide = x.double()
    with torch.no_grad():
        return Setup(
            base, path, x, copy.deepcopy(base).double()(wide).numpy(), merged_copy(model, torch.float64)(wide).numpy()
        )


def int8(by_axis):
    def write(source, path):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(source, path, weight_type=QuantType.QInt8, per_channel=by_axis, reduce_range=True)

    return write


def int4(block, symmetric):
    def write(source, path):
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        one = MatMulNBitsQuantizer(onnx.load(source), block_size=block, is_symmetric=symmetric, accuracy_level=1)
        one.process()
        one.model.save_model_to_file(str(path))

    return write


QUANTIZERS = {
    "int8": int8(False),
    "int8 by channel": int8(True),
    **{f"int4 {b} {'sym' if s else 'asym'}": int4(b, s) for b in (32, 128) for s in (False, True)},
}


def quantised(setup, model, how, folder):
    tools.exported(model, (setup.x,), folder / "f.onnx", dynamo=False, input_names=["x"], opset_version=17)
    logging.disable(logging.WARNING)
    try:
        QUANTIZERS[how](folder / "f.onnx", folder / "q.onnx")
    finally:
        logging.disable(logging.NOTSET)
    return folder / "q.onnx"


def error(path, x, exact):
    """Relative to all outputs together."""
    return np.linalg.norm(tools.run(path, (x,)) - exact) / np.linalg.norm(exact)


def refused(path, adapter, out):
    """What the refusal says; None where the file is folded."""
    try:
        fold_onnx(path, adapter, out, progress=False)
    except (ExportError, BaseMismatchError) as refusal:
        return str(refusal)
    return None


@pytest.mark.parametrize("how", QUANTIZERS)
def test_what_folds_into_scaled_weights_is_as_exact_as_into_others_and_the_rest_is_refused(how, setup, tmp_path):
    path, out = quantised(setup, setup.base, how, tmp_path), tmp_path / "out.onnx"
    fold_onnx(path, setup.adapter, out, progress=False)
    usual = error(out, setup.x, setup.exact)
    assert usual < 1.5 * error(path, setup.x, setup.plain)
    for spread in (1.02, 1.1, 1.2, 2):
        for only_behind_norms in (False, True):
            path = quantised(setup, scaled(setup.base, spread, only_behind_norms), how, tmp_path)
            out.unlink(missing_ok=True)
            if (refusal := refused(path, setup.adapter, out)) is not None:
                assert "SmoothQuant" in refusal or "no weight is its base's" in refusal
                assert not out.exists()
            else:
                assert spread < 1.2
                assert error(out, setup.x, setup.exact) < 1.25 * usual


def test_a_refusal_says_what_was_scaled_by_how_much_and_what_to_do(setup, tmp_path):
    path = quantised(setup, scaled(setup.base, 1.3), "int4 32 asym", tmp_path)
    with pytest.raises(ExportError) as refusal:
        fold_onnx(path, setup.adapter, tmp_path / "out.onnx", progress=False)
    assert "0.gate: the columns of its weight" in str(refusal.value)
    assert "fold first, then scale and quantise" in str(refusal.value)
    # Rows alone: what is behind the activation of another linear.
    model = copy.deepcopy(setup.base)
    with torch.no_grad():
        for block in model:
            block.up.weight *= torch.exp(0.2 * torch.randn(HIDDEN, 1))
    path = quantised(setup, model, "int4 32 asym", tmp_path)
    report = fold_onnx(path, setup.adapter, tmp_path / "out.onnx", on_unmatched="skip", progress=False)
    assert set(report.skipped) == {"0.up", "1.up", "2.up"}
    assert all("the rows of its weight" in reason and "other units" in reason for reason in report.skipped.values())


def test_adapters_without_levels_fold_as_before(setup, tmp_path):
    file = read_adapter(setup.adapter)
    bare = {name: dataclasses.replace(one, columns=None, rows=None) for name, one in file.fingerprints.items()}
    old = dataclasses.replace(file, fingerprints=bare)
    for model in (setup.base, scaled(setup.base, 1.2)):
        path = quantised(setup, model, "int4 32 asym", tmp_path)
        assert len(fold_onnx(path, old, tmp_path / "out.onnx", progress=False).folded) == 9


def gptq(weight, bits, x):
    """Frantar et al. 2023: column by column, each error passed on to the columns that are left."""
    w, size, width = weight.copy(), 32, weight.shape[1]
    hessian = x.T @ x
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(width)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    codes, scales = np.zeros(w.shape, np.int16), np.zeros(w.shape, np.float32)
    for at in range(width):
        if at % size == 0:
            scale = np.abs(w[:, at : at + size]).max(1) / (2 ** (bits - 1) - 1)
        codes[:, at] = np.clip(np.round(w[:, at] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        scales[:, at] = scale
        w[:, at + 1 :] -= np.outer((w[:, at] - codes[:, at] * scale) / upper[at, at], upper[at, at + 1 :])
    return codes, scales


def clipped(weight, bits, share):
    """Rounded to the nearest in blocks of 32, of which only a share of the range is kept."""
    blocks = np.abs(weight.reshape(len(weight), -1, 32)).max(2).repeat(32, 1)
    scales = (share * blocks / (2 ** (bits - 1) - 1)).astype(np.float32)
    return np.clip(np.round(weight / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int16), scales


@pytest.mark.parametrize(("rule", "bits"), [("nearest", 4), ("nearest", 8), ("clipped", 4), ("gptq", 4), ("gptq", 8)])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "loud columns"])
def test_what_was_only_quantised_folds_by_whatever_rule(rule, bits, kind, tmp_path):
    rng = np.random.default_rng(5)
    nodes, held, kept = [], [], []
    for layer in range(4):
        weight = rng.normal(size=(96, 96)) if kind != "heavy tails" else rng.standard_t(4, size=(96, 96))
        if kind == "loud columns":
            weight[:, rng.integers(96, size=3)] *= 5
        weight /= 10
        if rule == "gptq":
            mixed = np.linalg.qr(rng.normal(size=(96, 96)))[0] * np.exp(-0.01 * np.arange(96))
            codes, scales = gptq(weight, bits, rng.normal(size=(400, 96)) @ mixed.T)
        else:
            codes, scales = clipped(weight, bits, 0.85 if rule == "clipped" else 1)
        packed = (codes + 2 ** (bits - 1)).astype(np.uint8)
        packed = packed if bits == 8 else packed[:, ::2] | packed[:, 1::2] << 4
        packed, steps = packed.reshape(96, 3, -1), np.ascontiguousarray(scales[:, ::32])
        held += [numpy_helper.from_array(packed, f"q{layer}"), numpy_helper.from_array(steps.reshape(-1), f"s{layer}")]
        nodes.append(
            helper.make_node(
                "MatMulNBits", [f"x{layer}", f"q{layer}", f"s{layer}"], [f"x{layer + 1}"],
                domain="com.microsoft", K=96, N=96, bits=bits, block_size=32, accuracy_level=1,
            )
        )  # fmt: skip
        kept.append((torch.from_numpy(weight.astype(np.float32)), codes * scales.astype(np.float64)))
    infos = [helper.make_tensor_value_info(name, 1, (3, 96)) for name in ("x0", "x4")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "q.onnx")
    base = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in kept))
    with torch.no_grad():
        for parameter, (numbers, _) in zip(base.parameters(), kept, strict=True):
            parameter.copy_(numbers)
    model = fill_vectors(onelora.adapt(base), 0.05)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    fold_onnx(tmp_path / "q.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    x = torch.randn(3, 96)
    exact, plain = x.double().numpy(), x.numpy()
    for layer, (vector, (_, rounded)) in enumerate(zip(onelora.vectors(model).values(), kept, strict=True)):
        update = vector.detach().double().numpy()
        # The base's product is ONNX Runtime's own: how its kernels round differs between processors.
        alone = helper.make_graph(
            nodes[layer : layer + 1],
            "g",
            [helper.make_tensor_value_info(f"x{layer}", 1, (3, 96))],
            [helper.make_tensor_value_info(f"x{layer + 1}", 1, (3, 96))],
            held[2 * layer : 2 * layer + 2],
        )
        onnx.save(helper.make_model(alone, opset_imports=opsets, ir_version=8), tmp_path / "one.onnx")
        (product,) = session(tmp_path / "one.onnx").run(None, {f"x{layer}": plain})
        plain = product + plain.sum(-1, keepdims=True) * update.astype(np.float32)
        exact = exact @ (rounded + update[:, None]).T
    assert_arrays(session(tmp_path / "out.onnx").run(None, {"x0": x.numpy()})[0], exact, plain)


@pytest.mark.parametrize("spread", [1.01, 1.1, 1.5])
def test_levels_tell_the_spread_of_factors_whatever_the_dtype(spread):
    torch.manual_seed(1)
    weight, seen = torch.randn(300, 200), []
    for _ in range(20):
        factors = torch.exp((torch.rand(200) * 2 - 1) * np.log(spread))
        known, other = fingerprint(weight), fingerprint((weight * factors).bfloat16())
        assert known.columns is not None
        assert known.rows is not None
        assert other.columns is not None
        assert other.rows is not None
        seen.append((np.square(known.columns - other.columns).mean() ** 0.5 / factors.log().std()).item())
        assert np.abs(known.rows - other.rows).max() < 0.5 * factors.log().std()
    assert 0.7 < np.mean(seen) < 1.1  # the share of small columns is not counted
