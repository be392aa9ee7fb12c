"""Sums of adapters: against exact fractions, float64 models and PEFT's own addition; what can't be added is named."""

import copy
from fractions import Fraction
from pathlib import Path

import numpy as np
import peft
import peft_folders
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from summed import LAYERS, adapter, base, two_adapters

import onelora_compile as onelora
from onelora_compile.exporters import OnnxRunner, convert_adapter, export_onnx, fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


@pytest.fixture
def pair(tmp_path, monkeypatch):
    return two_adapters(tmp_path, monkeypatch)


def exact(parts):
    """Σ wᵢ bᵢ without any rounding, and Σ |wᵢ bᵢ|, as lists of fractions."""
    products = [[Fraction(weight) * Fraction(x) for x in vector.tolist()] for weight, vector in parts]
    return [sum(column) for column in zip(*products, strict=True)], [
        sum(map(abs, c)) for c in zip(*products, strict=True)
    ]


def assert_rounded_once(found, parts):
    """Half a unit in the last place of float32, and what float64 loses where the terms cancel."""
    sums, sizes = exact(parts)
    for value, right, size in zip(found.tolist(), sums, sizes, strict=True):
        unit = Fraction(float(np.spacing(np.float32(abs(right)))))
        assert abs(Fraction(value) - right) <= unit / 2 + size / 2**48


SAID = ("config", "producer", "aliases", "uses", "layers", "base_model", "task_type", "parts")
WEIGHTS = st.one_of(st.sampled_from([0, 1, -1, 0.5, 1 / 3]), st.floats(-8, 8, allow_subnormal=False))
TERMS = st.lists(
    st.tuples(WEIGHTS, st.sets(st.sampled_from(LAYERS), min_size=1), st.integers(0, 99)), min_size=1, max_size=4
)


@settings(max_examples=40)
@given(terms=TERMS)
@pytest.mark.filterwarnings("ignore:whether all adapters are of one base")
def test_any_sum_over_any_layers_is_the_exact_one(terms, tmp_path_factory):
    here = tmp_path_factory.mktemp("sum")
    for number, (_, layers, seed) in enumerate(terms):
        adapter(here / f"{number}.safetensors", sorted(layers), seed)
    weights = {here / f"{number}.safetensors": weight for number, (weight, _, _) in enumerate(terms)}
    made = onelora.combine(weights, here / "mix.safetensors")
    read = onelora.read_adapter(here / "mix.safetensors")
    files = [(weight, load_file(path)) for path, weight in weights.items()]
    assert [getattr(made, name) for name in SAID] == [getattr(read, name) for name in SAID]
    assert set(read.vectors) == {layer for _, layers, _ in terms for layer in layers}
    model = onelora.load_adapter(base(), here / "mix.safetensors")
    onelora.merge(model)
    for name, vector in read.vectors.items():
        parts = [(float(weight), tensors[name]) for weight, tensors in files if name in tensors]
        assert vector.dtype == torch.float32
        assert torch.equal(vector, made.vectors[name])
        assert_rounded_once(vector, parts)
        # W + Σ wᵢ bᵢ 1ᵀ in float64, against float32 with one rounding of the vector and one of the weight
        update = np.sum([weight * vector.double().numpy() for weight, vector in parts], 0)[:, None]
        merged, right = (
            model[int(name)].weight.detach().numpy(),
            base()[int(name)].weight.detach().double().numpy() + update,
        )
        assert (abs(merged - right) <= np.spacing(abs(np.float32(merged))) + np.spacing(np.float32(abs(update)))).all()


@pytest.mark.parametrize("weight", [1, 1.0, np.float32(1), Fraction(1)])
def test_one_adapter_with_weight_one_is_itself(pair, weight):
    made = onelora.combine({"a.safetensors": weight}, Path("c.safetensors"))
    theirs = onelora.read_adapter("a.safetensors")
    assert load_file("c.safetensors").keys() == theirs.vectors.keys()
    for name, vector in load_file("c.safetensors").items():
        assert np.array_equal(vector.numpy().view("u4"), theirs.vectors[name].numpy().view("u4"))
    assert made.config == theirs.config
    assert made.layers == theirs.layers
    assert made.uses == theirs.uses


def test_negation_is_exact_and_gives_the_base_with_the_adapter(pair):
    onelora.combine({"a.safetensors": -1.0}, "minus.safetensors")
    for name, vector in load_file("minus.safetensors").items():
        assert torch.equal(vector, -load_file("a.safetensors")[name])
    onelora.combine({"a.safetensors": 1, "minus.safetensors": 1}, "zero.safetensors")
    model, x = onelora.load_adapter(base(), "zero.safetensors"), torch.randn(6, 3)
    assert torch.equal(model(x), base()(x))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_does_not_matter_to_what_is_said_of_the_base(pair, seed):
    adapter("half.safetensors", of=base().bfloat16(), seed=seed)
    one = onelora.combine({"half.safetensors": 0.5, "a.safetensors": 0.5}, "one.safetensors")
    other = onelora.combine({"a.safetensors": 0.5, "half.safetensors": 0.5})
    assert {name: known.dtype for name, known in one.fingerprints.items()} == dict.fromkeys(LAYERS, "float32")
    assert {name: known.dtype for name, known in other.fingerprints.items()} == dict.fromkeys(LAYERS, "float32")
    onelora.load_adapter(base().bfloat16(), "one.safetensors")
    onelora.load_adapter(base(), "one.safetensors")


def test_peft_adds_the_same(tmp_path):
    """Its "cat" is exact: lora_A and lora_B of both beside each other, of rank 2."""
    foundation, inputs = zoo.tiny_vit()
    for seed, name in enumerate("ab", 1):
        model = fill_vectors(onelora.adapt(copy.deepcopy(foundation)), seed=seed)
        onelora.save_adapter(model, tmp_path / f"{name}.safetensors")
        onelora.save_adapter(model, tmp_path / name, format="peft")
    theirs = peft_folders.loaded(copy.deepcopy(foundation), tmp_path / "a")
    theirs.load_adapter(str(tmp_path / "b"), "b")
    theirs.add_weighted_adapter(["default", "b"], [0.7, -0.3], "mix", combination_type="cat")
    theirs.set_adapter("mix")
    mix = tmp_path / "mix.safetensors"
    onelora.combine({tmp_path / "a.safetensors": 0.7, tmp_path / "b.safetensors": -0.3}, mix)
    ours = onelora.load_adapter(copy.deepcopy(foundation), mix)
    expected = merged_copy(ours, torch.float64)(inputs["x"].double())
    with torch.no_grad():
        assert_parity(ours(**inputs), expected, theirs(**inputs), floor=4)
    onelora.merge(ours)
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, merged[name])
    folders = onelora.combine({tmp_path / "a": 0.7, f"{tmp_path}/b/": -0.3})  # folders of PEFT with our metadata
    for name, vector in load_file(mix).items():
        assert torch.equal(folders.vectors[name], vector)
    assert folders.parts[0].digest == onelora.read_adapter(mix).parts[0].digest


def test_every_reader_takes_it(pair):
    x = torch.randn(6, 3)
    weights = {"a.safetensors": 0.7, "b.safetensors": -0.3}
    onelora.combine(weights, "mix.safetensors")
    right = base().double()
    for path, weight in weights.items():
        for name, vector in load_file(path).items():
            right[int(name)].weight.data += weight * vector.double()[:, None]
    expected = right(x.double()).detach().numpy()

    torch.onnx.export(base(), (x,), "base.onnx", dynamo=True, verbose=False)
    fold_onnx("base.onnx", "mix.safetensors", "folded.onnx", progress=False)
    export_onnx(onelora.load_adapter(base(), "a.safetensors"), (x,), "input.onnx", adapters="input", progress=False)
    convert_adapter("mix.safetensors", "mix.onnx_adapter", like="input.onnx")
    convert_adapter("mix.safetensors", "folder")
    convert_adapter("folder", "back.safetensors")
    convert_adapter("mix.onnx_adapter", "from_ort.safetensors", like="input.onnx")
    given = {"input": x.numpy()}
    outputs = {
        "loaded": onelora.load_adapter(base(), "mix.safetensors")(x).detach().numpy(),
        "folded": OnnxRunner("folded.onnx").run(given)[0],
        "run": OnnxRunner("input.onnx").with_adapter("mix.safetensors").run(given)[0],
        "converted": OnnxRunner("input.onnx").with_adapter("from_ort.safetensors").run(given)[0],
        "from PEFT": onelora.load_adapter(base(), "folder")(x).detach().numpy(),
    }
    for name, found in outputs.items():
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    parts = onelora.read_adapter("mix.safetensors").parts
    assert [(part.weight, part.name, part.compared) for part in parts] == [
        (0.7, "a.safetensors", True),
        (-0.3, "b.safetensors", True),
    ]
    assert onelora.read_adapter("back.safetensors").parts == parts
    again = onelora.combine({"mix.safetensors": 2.0}).parts[0]
    assert again.digest not in (part.digest for part in parts)
    assert OnnxRunner("folded.onnx").metadata.sha256 == again.digest  # what onelora inspect shows of the model


def test_a_model_that_was_loaded_and_trained_on_says_no_more_what_it_was_made_of(pair):
    onelora.combine({"a.safetensors": 0.7, "b.safetensors": -0.3}, "mix.safetensors")
    onelora.save_adapter(fill_vectors(onelora.load_adapter(base(), "mix.safetensors")), "new.safetensors")
    assert onelora.read_adapter("new.safetensors").parts == ()


def test_the_selection_is_kept_where_all_have_the_same(pair):
    adapter("one.safetensors", ["0", "2"], exclude_modules=["2"])
    adapter("two.safetensors", ["0", "2"], exclude_modules=["2"], seed=2)
    made = onelora.combine({"one.safetensors": 1, "two.safetensors": 1})
    assert made.config.target_modules == ("0", "2")
    assert made.config.exclude_modules == ("2",)
    made = onelora.combine({"one.safetensors": 1, "a.safetensors": 1})
    assert made.config.target_modules == LAYERS
    assert made.config.exclude_modules is None


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ([None, None], None),
        ([None, torch.bfloat16], None),
        ([torch.bfloat16, torch.bfloat16], torch.bfloat16),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float64, None], torch.float64),
    ],
)
def test_vectors_get_the_widest_dtype(dtypes, widest, tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path, dtype in zip(paths, dtypes, strict=True):
        adapter(path, vector_dtype=dtype)
    assert onelora.combine(dict.fromkeys(paths, 0.5), tmp_path / "mix.safetensors").config.vector_dtype == widest
    loaded = onelora.vectors(onelora.load_adapter(base(), tmp_path / "mix.safetensors"))
    assert {vector.dtype for vector in loaded.values()} == {widest or torch.float32}


# What does not belong together


def without_fingerprints(path, out):
    """A folder as PEFT would write it."""
    convert_adapter(path, out, format="peft")
    peft_folders.edit_tensors(out, lambda tensors: None)


def test_that_a_base_could_not_be_checked_is_said(pair):
    without_fingerprints("b.safetensors", "peft")
    with pytest.warns(onelora.OneLoRAWarning, match=r"could not be checked: no .* with peft \(PEFT keeps none\)"):
        made = onelora.combine({"a.safetensors": 1, "a2.safetensors": 1, "peft": 1} | _copied("a2.safetensors"))
    assert [part.compared for part in made.parts] == [True, True, False]
    assert set(made.fingerprints) == set(LAYERS)
    with pytest.warns(onelora.OneLoRAWarning, match=r"common with a\.safetensors, peft"):
        assert [part.compared for part in onelora.combine({"a.safetensors": 1, "peft": 1}).parts] == [False, False]


def _copied(name):
    Path(name).write_bytes(Path("a.safetensors").read_bytes())
    return {name: -1.0}


def test_two_groups_without_a_layer_in_common_could_not_be_checked(pair):
    for seed, (name, layers) in enumerate({"q1": ["0"], "q2": ["0", "2"], "q3": ["2"], "m": ["4"]}.items()):
        adapter(f"{name}.safetensors", layers, seed)
    chain = {"q1.safetensors": 1.0, "q3.safetensors": 2.0, "q2.safetensors": 3.0}
    assert all(part.compared for part in onelora.combine(chain).parts)  # q2 has a layer of each
    chain = {name: chain[name] for name in ("q2.safetensors", "q3.safetensors", "q1.safetensors")}
    assert all(part.compared for part in onelora.combine(chain).parts)
    with pytest.warns(onelora.OneLoRAWarning, match=r"in common with m\.safetensors"):
        onelora.combine({"m.safetensors": 1.0, **chain})


def test_adapters_of_peft_alone_stay_unknown(pair):
    for name in "ab":
        without_fingerprints(f"{name}.safetensors", name)
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        made = onelora.combine({"a": 0.5, "b": 0.5}, "mix.safetensors")
    assert made.unknown == list(LAYERS)
    with pytest.warns(onelora.OneLoRAWarning, match=r"mix\.safetensors has no fingerprints"):
        onelora.load_adapter(base(), "mix.safetensors")


def test_what_peft_trained_itself_is_refused_taken_or_left_out(tmp_path):
    """A head in modules_to_save, of which PEFT keeps no value from before training."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = peft.MissConfig(r=1, target_modules=["0", "2"], modules_to_save=["4"])
        peft_folders.written(base(), tmp_path / name, config)
    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(onelora.ConfigError, match=r"a, .*b trained 4\.(bias|weight).* besides vectors"):
        onelora.combine({a: 0.5, b: 0.5})
    with pytest.raises(onelora.AdapterFileError, match=r"a, .*b does not tell from which values '4\."):
        onelora.combine({a: 0.5, b: 0.5}, trained="add")
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        made = onelora.combine({a: 0.5, b: 0.5}, trained=f"from:{b}/")
    assert torch.equal(made.saved["4.weight"], onelora.read_adapter(b).saved["4.weight"])
