"""Adapter files of another base, incomplete or damaged: refused by name, and nothing changes."""

import copy
import json

import adapter_files
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

NO_NUMBER = '{"shape": [%s, 12], "dtype": "float32", "norm": %s, "sketch": "AAAAAA=="}'  # a fingerprint


@pytest.fixture
def saved(tmp_path):
    return adapter_files.saved(tmp_path)


def rewrite(path, change=lambda tensors: tensors, **metadata):
    """The same file with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    header = {key: value for key, value in (header | metadata).items() if value is not None}
    save_file(change(load_file(path)), path, header)


def unchanged(model, before):
    return all(torch.equal(vector, before[name]) for name, vector in onelora.vectors(model).items())


def values(model):
    return {name: vector.detach().clone() for name, vector in onelora.vectors(model).items()}


@pytest.mark.parametrize("damage", ["other seed", "one row", "five percent of one layer", "merged"])
def test_another_base_is_refused_and_left_alone(saved, damage):
    base, model, path, inputs = saved
    with torch.no_grad():
        if damage == "other seed":
            for parameter in base.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        elif damage == "one row":
            base.blocks[1].fc1.weight[17] *= 1.5
        elif damage == "five percent of one layer":
            base.blocks[1].fc2.weight.mul_(1.05)
        else:
            twin = copy.deepcopy(model)
            onelora.merge(twin)
            base = twin
    expected = base(**inputs)
    kind = type(base.embed)
    with pytest.raises(onelora.BaseMismatchError, match=r"another base.*(blocks\.1|embed)"):
        onelora.load_adapter(base, path)
    assert type(base.embed) is kind
    assert onelora.vectors(base) == {}
    assert torch.equal(base(**inputs), expected)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(1.05),
        lambda weight: weight.data.mul_(1.05),
        lambda weight: weight.detach().numpy().__imul__(1.05),
        lambda weight: setattr(weight, "data", weight.data * 1.05),
    ],
    ids=["in place", "through .data", "through NumPy", "another .data"],
)
def test_a_base_that_was_written_to_since_the_last_adapter_is_another(write, saved):
    # No version counter and no address tells of the second and the third: `.data` is how PEFT merges.
    base, _, path, _ = saved
    onelora.load_adapter(base, path, adapter_name="a")
    with torch.no_grad():
        write(base.blocks[1].fc2.weight)
    with pytest.raises(onelora.BaseMismatchError, match=r"blocks\.1\.fc2 \(differs"):
        onelora.load_adapter(base, path, adapter_name="b")
    assert list(onelora.adapters(base)) == ["a"]


def test_a_model_without_the_layers_names_them(saved):
    _, _, path, _ = saved
    other = zoo.TinyViT(depth=1)
    with pytest.raises(onelora.AdapterFileError, match=r"does not have: blocks\.1\.fc1"):
        onelora.load_adapter(other, path)
    assert onelora.vectors(other) == {}


def test_another_width_is_an_error_with_both_shapes(saved):
    _, _, path, _ = saved
    with pytest.raises(onelora.AdapterFileError, match=r"\[48, 12\].*\[24, 12\]"):
        onelora.load_adapter(zoo.TinyViT(width=24), path)


def test_missing_and_extra_vectors_are_named(saved):
    base, _, path, _ = saved
    fewer = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(exclude_modules=["embed"]))
    with pytest.raises(onelora.AdapterFileError, match=r"Missing in the model: embed"):
        onelora.load_adapter(fewer, path)
    onelora.save_adapter(fill_vectors(fewer), path)
    full = fill_vectors(onelora.adapt(copy.deepcopy(base)), seed=5)
    before = values(full)
    with pytest.raises(onelora.AdapterFileError, match=r"Missing in the file: embed"):
        onelora.load_adapter(full, path)
    assert unchanged(full, before)


def test_a_vector_dropped_from_the_file(saved):
    base, _, path, _ = saved
    rewrite(path, lambda tensors: {name: t for name, t in tensors.items() if name != "embed"})
    with pytest.raises(onelora.AdapterFileError, match="does not hold: embed"):
        onelora.load_adapter(base, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_both_ways(saved, value, tmp_path):
    base, model, path, _ = saved
    content = path.read_bytes()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        onelora.vectors(twin)["embed"][3] = value
    with pytest.raises(onelora.AdapterFileError, match="NaN or infinity in embed"):
        onelora.save_adapter(twin, path)
    assert path.read_bytes() == content

    def poison(tensors):
        tensors["embed"][3] = value
        return tensors

    rewrite(path, poison)
    before = values(model)
    with pytest.raises(onelora.AdapterFileError, match="NaN or infinity in embed"):
        onelora.load_adapter(model, path)
    assert unchanged(model, before)
    with pytest.raises(onelora.AdapterFileError):
        onelora.load_adapter(base, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "3"}, "format version '3'.*upgrade"),
        ({"format_version": "one"}, "format version 'one'"),
        ({"format": "pt"}, "not an adapter of onelora"),
        ({"format": None}, "not an adapter of onelora"),
        ({"config": "{"}, "damaged metadata"),
        ({"config": '{"rank": 3}'}, "damaged metadata.*'rank'"),
        ({"config": "[" * 100_000}, "damaged metadata"),
        ({"fingerprints": "[]"}, "damaged metadata"),
        ({"fingerprints": '{"embed": {"shape": [48]}}'}, "damaged metadata"),
        ({"fingerprints": "{}"}, "holds no vector"),
        ({"layers": '{"gone": ["linear", [3]]}'}, "damaged metadata: layers of no vector: gone"),
        ({"layers": '{"embed": ["magic", [12]]}'}, "damaged metadata: layers of no known kind"),
        ({"layers": '{"embed": ["linear", [-12]]}'}, "damaged metadata: layers of no known kind or size"),
        ({"layers": '{"embed": 3}'}, "damaged metadata"),
        ({"base_model": "3"}, "damaged metadata"),
        ({"fingerprints": f'{{"embed": {NO_NUMBER % ("Infinity", "1")}}}'}, "damaged metadata"),
        ({"fingerprints": f'{{"embed": {NO_NUMBER % ("48", "9" * 400)}}}'}, "damaged metadata"),
        ({"uses": '{"embed": [1, Infinity]}'}, "damaged metadata"),
        ({"layers": '{"embed": ["linear", [Infinity]]}'}, "damaged metadata"),
    ],
)
def test_wrong_metadata(saved, change, message):
    base, _, path, _ = saved
    rewrite(path, **change)
    with pytest.raises(onelora.AdapterFileError, match=message):
        onelora.load_adapter(base, path)
    assert onelora.vectors(base) == {}


def test_a_vector_of_the_wrong_shape_or_dtype(saved):
    base, _, path, _ = saved
    original = path.read_bytes()
    for change in (lambda v: v[:-1].clone(), lambda v: v.half(), lambda v: v[None].clone()):
        shape = r"\[1, 48\] of 'embed'.*takes \[48\]"
        path.write_bytes(original)
        rewrite(path, lambda tensors, change=change: tensors | {"embed": change(tensors["embed"])})
        with pytest.raises(onelora.AdapterFileError, match=rf"vector of 'embed'.*needs torch\.float32 \[48\]|{shape}"):
            onelora.load_adapter(base, path)


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 not this", b"\xff" * 64, b"\x00" * 4096])
def test_not_a_safetensors_file(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(onelora.AdapterFileError, match="safetensors"):
        onelora.load_adapter(zoo.MLP(), path)


def test_no_such_file_and_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter file .*nothing\.safetensors"):
        onelora.load_adapter(zoo.MLP(), tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"folder .*missing does not exist"):
        onelora.save_adapter(onelora.adapt(zoo.MLP()), tmp_path / "missing" / "a.safetensors")
    with pytest.raises(IsADirectoryError):
        onelora.save_adapter(onelora.adapt(zoo.MLP()), tmp_path)


@given(st.data())
def test_any_damage_is_a_clear_error_and_loads_nothing(data):
    import tempfile
    from pathlib import Path

    torch.manual_seed(0)
    model = fill_vectors(onelora.adapt(zoo.MLP()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        onelora.save_adapter(model, path)
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans(), "truncate"):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            for _ in range(data.draw(st.integers(1, 8))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        before = values(model)
        try:
            onelora.load_adapter(model, path)
        except onelora.AdapterFileError:
            assert unchanged(model, before)


def test_load_does_not_evaluate_the_files_patterns(saved):
    # A hostile file could name a pattern that takes for ever to match; the vectors' names alone count.
    base, _, path, _ = saved
    config = json.loads(onelora.OneLoRAConfig().to_json()) | {"target_modules": "(a+)+b" * 20}
    rewrite(path, config=json.dumps(config))
    onelora.load_adapter(base, path)
