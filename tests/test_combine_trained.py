"""Heads, norms and statistics in sums of adapters: added to the base's values, taken from one, or left out."""

import pytest
import torch
import trained_cases
from safetensors.torch import load_file, save_file
from trained_cases import adapters, base_of

import onelora_compile as onelora
from onelora_compile.exporters import OnnxRunner, export_onnx, fold_onnx
from onelora_compile.testing import merged_copy

CASES = [(name, variant) for name in trained_cases.MODELS for variant in ("head", "norms", "both")]
EVEN, ODD = (0.25, 0.75), (0.7, -0.3)


def files(name, variant, weights):
    return {adapters(name, variant) / f"{one}.safetensors": weight for one, weight in zip("ab", weights, strict=True)}


def floats(model):
    return {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}


def added(name, variant, weights):
    """base + Σ wᵢ (modelᵢ - base) over all that a merged model holds, in float64: vectors, heads, norms, statistics."""
    begin = floats(base_of(name, variant))
    found = dict(begin)
    for path, weight in files(name, variant, weights).items():
        merged = floats(merged_copy(onelora.load_adapter(base_of(name, variant), path), torch.float64))
        found = {key: found[key] + weight * (merged[key] - begin[key]) for key in found}
    return found


def loaded(name, variant, mix):
    """Everything in a model with the file, merged in float64."""
    return floats(merged_copy(onelora.load_adapter(base_of(name, variant), mix), torch.float64))


def assert_is(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=2e-7, atol=2e-7, msg=key)  # float32 in the file


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_weights_that_add_up_to_one_need_no_base(name, variant, tmp_path):
    onelora.combine(files(name, variant, EVEN), tmp_path / "mix.safetensors", trained="add")
    assert_is(loaded(name, variant, tmp_path / "mix.safetensors"), added(name, variant, EVEN))


@pytest.mark.parametrize("form", ["file", "state_dict"])
@pytest.mark.parametrize(("name", "variant"), [case for case in CASES if case[0] != "images"])
def test_other_weights_take_the_values_of_the_base(name, variant, form, tmp_path):
    state = base_of(name, variant).state_dict()
    save_file(state, tmp_path / "base.safetensors")
    given = tmp_path / "base.safetensors" if form == "file" else state
    with pytest.raises(
        onelora.ConfigError, match=r"weights of those that trained it \(0\.7, -0\.3\) do not add up to 1"
    ):
        onelora.combine(files(name, variant, ODD), tmp_path / "mix.safetensors", trained="add")
    assert not (tmp_path / "mix.safetensors").exists()
    onelora.combine(files(name, variant, ODD), tmp_path / "mix.safetensors", trained="add", base=given)
    assert_is(loaded(name, variant, tmp_path / "mix.safetensors"), added(name, variant, ODD))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_nothing_is_done_with_them_unasked(name, variant, tmp_path):
    message = r"a\.safetensors, .*b\.safetensors trained .* besides vectors.*'drop'.*'from:.*a\.safetensors'.*'add'"
    with pytest.raises(onelora.ConfigError, match=message):
        onelora.combine(files(name, variant, EVEN), tmp_path / "mix.safetensors")
    assert not (tmp_path / "mix.safetensors").exists()


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_dropped_they_are_the_bases(name, variant, tmp_path):
    made = onelora.combine(files(name, variant, ODD), tmp_path / "mix.safetensors", trained="drop")
    assert made.saved == {}
    held = [onelora.read_adapter(path).saved for path in files(name, variant, ODD)]
    right, begin = added(name, variant, ODD), floats(base_of(name, variant))
    right = {key: begin[key] if key in held[0] else value for key, value in right.items()}
    assert_is(loaded(name, variant, tmp_path / "mix.safetensors"), right)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_taken_from_one_they_are_that_ones(name, variant, tmp_path):
    a, b = files(name, variant, ODD)
    made = onelora.combine({a: 0.7, b: -0.3}, tmp_path / "mix.safetensors", trained=f"from:{b}")
    theirs = onelora.read_adapter(b)
    assert made.saved.keys() == theirs.saved.keys()
    assert made.config.modules_to_save == theirs.config.modules_to_save
    right = added(name, variant, ODD) | {key: value.double() for key, value in theirs.saved.items()}
    found = loaded(name, variant, tmp_path / "mix.safetensors")
    assert_is(found, {key: right[key] for key in found})
    with pytest.raises(onelora.ConfigError, match=r"trained='from:c' is none of the adapters: .*a\.safetensors"):
        onelora.combine({a: 0.7, b: -0.3}, trained="from:c")


def test_one_trains_a_head_and_one_does_not(tmp_path):
    """Weight 1 of the head's adapter needs no base; of what the other one leaves alone the change is zero."""
    head, plain = adapters("pooled", "both") / "a.safetensors", adapters("pooled", "head") / "b.safetensors"
    bare = onelora.combine({plain: 1.0}, tmp_path / "bare.safetensors", trained="drop")
    assert bare.saved == {}
    made = onelora.combine({head: 1.0, tmp_path / "bare.safetensors": 0.5}, trained="add")
    for key, value in onelora.read_adapter(head).saved.items():
        assert torch.equal(made.saved[key], value)
    state = base_of("pooled", "both").state_dict()
    made = onelora.combine({head: 0.5, tmp_path / "bare.safetensors": 0.5}, trained="add", base=state)
    for key, value in onelora.read_adapter(head).saved.items():
        torch.testing.assert_close(
            made.saved[key].double(), (value.double() + state[key].double()) / 2, rtol=1e-7, atol=1e-8
        )
    with pytest.raises(onelora.ConfigError, match="trained nothing besides vectors"):
        onelora.combine({head: 1, tmp_path / "bare.safetensors": 1}, trained=f"from:{tmp_path / 'bare.safetensors'}")


def test_it_goes_into_an_onnx_file_of_the_base(tmp_path):
    x = trained_cases.inputs("pooled")
    onelora.combine(files("pooled", "both", EVEN), tmp_path / "mix.safetensors", trained="add")
    export_onnx(base_of("pooled", "both"), (x,), tmp_path / "base.onnx", progress=False)
    fold_onnx(tmp_path / "base.onnx", tmp_path / "mix.safetensors", tmp_path / "out.onnx", progress=False)
    model = base_of("pooled", "both").double()
    model.load_state_dict(added("pooled", "both", EVEN))
    found = OnnxRunner(tmp_path / "out.onnx").run({"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found).double(), model(x.double()).detach(), rtol=1e-5, atol=1e-5)


def images(path, change):
    """An adapter of a model with a batch norm, after some change of it."""
    model = onelora.adapt(base_of("images", "vectors"))
    change(model.batch_norm)
    onelora.save_adapter(model, path)
    return path


def test_statistics_that_did_not_move_are_the_bases_without_asking(tmp_path):
    still = images(tmp_path / "still.safetensors", lambda norm: None)
    assert "batch_norm.running_mean" in load_file(still)
    assert onelora.combine({still: 0.5}).saved == {}
    moved = images(tmp_path / "moved.safetensors", lambda norm: norm.running_mean.add_(1))
    with pytest.raises(onelora.ConfigError, match=r"/moved\.safetensors trained .*running_mean.*besides vectors"):
        onelora.combine({still: 0.5, moved: 0.5})


def test_variances_below_zero_are_refused(tmp_path):
    wide = images(tmp_path / "wide.safetensors", lambda norm: norm.running_var.fill_(9))
    narrow = images(tmp_path / "narrow.safetensors", lambda norm: norm.running_var.fill_(1))
    with pytest.raises(onelora.AdapterFileError, match=r"'batch_norm\.running_var' would have negative variances"):
        onelora.combine({wide: -1, narrow: 2}, trained="add")


def test_counters_of_batches_are_kept_where_they_agree(tmp_path):
    one = images(tmp_path / "1.safetensors", lambda norm: norm.running_mean.add_(1) + norm.num_batches_tracked.add_(3))
    two = images(tmp_path / "2.safetensors", lambda norm: norm.running_mean.add_(2) + norm.num_batches_tracked.add_(4))
    assert onelora.combine({one: 1}, trained="add").saved["batch_norm.num_batches_tracked"] == 3
    made = onelora.combine({one: 0.5, two: 0.5}, tmp_path / "mix.safetensors", trained="add")
    assert "batch_norm.num_batches_tracked" not in made.saved
    model = onelora.load_adapter(base_of("images", "vectors"), tmp_path / "mix.safetensors")
    right = base_of("images", "vectors").state_dict()["batch_norm.running_mean"] + 1.5
    torch.testing.assert_close(model.batch_norm.running_mean, right)
    assert model.batch_norm.num_batches_tracked == 0
