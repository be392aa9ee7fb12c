"""Small instances of real architectures: every linear op adapted or left out for a known reason, and the same function
in eager, compiled and in float64; gradients of the vectors; no compilation for other values.

`architectures/table.json` records, for each, how many weights are adapted, which other linear ops there are and why.
After a deliberate change: ONELORA_UPDATE_TABLE=1 pytest tests/test_zoo.py -m "slow or not slow" -k counts
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from architectures.outputs import main_output
from oracle import row_sums

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, gradients, merged_copy

# What the libraries themselves warn of, which would be errors inside Dynamo.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

TABLE = Path(__file__).parent / "architectures" / "table.json"
# One of each kind, for the default run; the others are marked slow.
FIRST = {"albert", "clip", "deberta_v2", "dit", "gpt2", "mamba", "mixtral", "transformer", "whisper", "xlnet"}
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(ARCHITECTURES)]


def doubled(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def weighted(out):
    generator = torch.Generator().manual_seed(1)
    return (out * torch.randn(out.shape, generator=generator).to(out)).sum()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_counts(name):
    model, _ = ARCHITECTURES[name]()
    onelora.adapt(model)
    summary = onelora.summary(model)
    found = {
        "adapted": len(summary.sites),
        "numbers": summary.vector_parameters,
        "skipped": dict(Counter(summary.skipped.values())),
        "not linear": dict(Counter(summary.not_linear.values())),
    }
    table = json.loads(TABLE.read_text())
    if os.environ.get("ONELORA_UPDATE_TABLE"):
        table = dict(sorted({**table, name: found}.items()))
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    assert table[name] == found


@pytest.mark.parametrize("name", NAMES)
def test_eager_compiled_and_float64_agree(name):
    model, inputs = ARCHITECTURES[name]()
    base = main_output(model(**inputs)).detach()
    fill_vectors(onelora.adapt(model), 0.02)
    reference = merged_copy(model, torch.float64)
    with torch.no_grad():
        exact, plain = main_output(reference(**doubled(inputs))), main_output(merged_copy(model)(**inputs))
    graphs = []

    def count(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend="onelora", options={"inner": count})
    out = main_output(model(**inputs))
    fast = main_output(compiled(**inputs))
    assert_parity(out, exact, plain, "eager", floor=64)
    assert_parity(fast, exact, plain, "compiled", floor=64)
    assert (out - base).abs().max() > 10 * (out - exact).abs().max()

    # Gradients of every vector: the row sums of the gradient of the reference's weight.
    vectors = onelora.vectors(model)
    expected = row_sums(model, reference, lambda one: weighted(main_output(one(**doubled(inputs)))))
    baseline = row_sums(model, merged_copy(model), lambda one: weighted(main_output(one(**inputs))))
    for run in (model, compiled):
        for key, gradient in gradients(weighted(main_output(run(**inputs))), vectors).items():
            # factor: detr's decoder has gradients that cancel to 1e-7, where either error is luck
            assert_parity(gradient, expected[key], baseline[key], key, factor=3, floor=256)

    before = len(graphs)
    fill_vectors(model, 0.02, seed=5)
    assert_parity(
        main_output(compiled(**inputs)),
        main_output(merged_copy(model, torch.float64)(**doubled(inputs))),
        main_output(merged_copy(model)(**inputs)),
        "swapped",
        floor=256,
    )
    assert len(graphs) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIRST - {"albert", "gpt2"}))
def test_inductor_agrees_with_eager(name):
    model, inputs = ARCHITECTURES[name]()
    fill_vectors(onelora.adapt(model), 0.02)
    outputs = [main_output(run(**inputs)) for run in (model, torch.compile(model, backend="onelora"))]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)
    vectors = onelora.vectors(model)
    eager, fast = (gradients(weighted(out), vectors) for out in outputs)
    torch.testing.assert_close(fast, eager, rtol=1e-3, atol=1e-3)


# xlnet and packed_slices are not here: torch.onnx 2.13 can't convert them, adapted or not.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["albert", "beit", "clip", "deberta_v2", "gpt_oss", "mamba", "mixtral", "sd3", "switch_moe", "t5", "whisper"],
)
def test_every_vector_folds_into_onnx(name, tmp_path):
    from onelora_compile.exporters import export_onnx

    model, inputs = ARCHITECTURES[name]()
    fill_vectors(onelora.adapt(model), 0.02)
    report = export_onnx(model, (), tmp_path / "m.onnx", kwargs=inputs)  # verified in ONNX Runtime
    assert set(report.losses) == set(onelora.vectors(model))
    assert not report.unused
