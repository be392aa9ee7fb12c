"""Names of adapters that arrive on a device: taken twice, packed already, hard to print, of any language."""

import json
import shutil
from pathlib import Path

import bundles
import numpy as np
import pytest
import torch
from bundles import active, call, changed
from signed import own_keys

import onelora_compile as onelora
from onelora_compile.exporters import bundle, export_onnx, sign_adapter
from onelora_compile.weights.adapter_file import read_adapter


def test_a_name_that_is_packed_does_not_hide_the_packed_one(tmp_path):
    folder, sources = bundles.fresh("input", tmp_path), bundles.sources()
    shutil.copy(sources / "new.safetensors", tmp_path / "a.safetensors")
    assert call(folder, "update", tmp_path / "a.safetensors", "--no-try") == 0
    assert active(folder).startswith("a-")
    assert call(folder, "use", "a") == 0
    state = json.loads((folder / "local" / "state.json").read_text())
    assert state["adapter"]["file"] == "adapters/a.safetensors"


def test_adapters_of_many_names_do_not_fill_the_disk(tmp_path):
    folder = bundles.fresh("input", tmp_path)
    for number in range(20):
        head = {"head": torch.full((5,), float(number))}
        path = changed(bundles.sources() / "new.safetensors", tmp_path / f"day-{number}.safetensors", head)
        assert call(folder, "update", path, "--no-try") == 0
    assert len(list((folder / "local" / "adapters").glob("*.safetensors"))) == 9
    assert len(json.loads((folder / "local" / "adapters" / "index.json").read_text())) == 9
    for number in range(18, 10, -1):
        assert call(folder, "rollback") == 0
        assert active(folder) == f"day-{number}"
    assert call(folder, "rollback") == 1
    assert call(folder, "use", "day-19") == 0  # taken back, not forgotten


@pytest.mark.parametrize("lost", ["nothing", "the index"])
def test_two_updates_of_one_name_are_two_adapters(lost, tmp_path, capsys):
    folder, source = bundles.fresh("input", tmp_path), bundles.sources() / "new.safetensors"
    heads, names, x = {}, [], np.ones((1, 16, 12), np.float32)
    for number in range(3):
        path = changed(source, tmp_path / "nightly.safetensors", {"head": torch.full((5,), float(number))})
        assert call(folder, "update", path, "--no-try") == 0
        names.append(active(folder))
        heads[names[-1]] = read_adapter(path).vectors["head"].numpy()
        if lost == "the index":
            (folder / "local" / "adapters" / "index.json").unlink()
    assert names[0] == "nightly"
    assert len(set(names)) == 3
    deployed = bundles.device(folder, "deployed")

    def head():
        model = deployed.Deployed(str(folder), deployed.Options(runtime="onnxruntime"))
        assert model.run({"x": x})
        return model.engine.vectors["head"].numpy()

    for expected in (names[1], names[0]):
        assert call(folder, "rollback") == 0
        assert f"in use: {expected}\n" in capsys.readouterr().out
        np.testing.assert_array_equal(head(), heads[expected])
    for name in names if lost == "nothing" else ():
        assert call(folder, "use", name) == 0
        np.testing.assert_array_equal(head(), heads[name])
    assert call(folder, "update", path, "--no-try") == 0  # the last once more
    assert active(folder) == names[2]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a, b", "", "\u202ea", "-v", ".a", " a", "a$(b)", "a\\b"])
def test_a_name_that_can_not_be_printed_or_typed_is_refused(name, tmp_path, capsys):
    folder = bundles.fresh("input", tmp_path)
    arrived = shutil.copy(bundles.sources() / "new.safetensors", tmp_path / f"{name}.safetensors")
    assert call(folder, "update", arrived) == 1
    assert "rename the file" in (told := capsys.readouterr().err)
    assert told.count("\n") == 1
    assert not (folder / "local" / "adapters").exists()
    with pytest.raises(onelora.errors.ConfigError, match="rename the file"):
        sign_adapter(arrived, tmp_path / "key.pem")
    with pytest.raises(onelora.errors.ConfigError, match="rename the file"):
        bundle(bundles.sources() / "input.onnx", tmp_path / "b", shapes=bundles.SHAPES, adapters=[arrived])
    bank = tmp_path / "bank.onnx"
    with pytest.raises(onelora.errors.ConfigError, match="rename the file"):
        export_onnx(bundles.base_model(), (torch.ones(1, 16, 12),), bank, adapters="bank", bank=[arrived])


@pytest.mark.parametrize("name", ["rückfahrt v2 (1)", "夜間モデル", "हिन्दी", "a+b=c@d"])
def test_a_name_that_people_give_is_signed_packed_and_used(name, tmp_path, capsys):
    folder = bundles.fresh("input", tmp_path)
    arrived = Path(shutil.copy(bundles.sources() / "new.safetensors", tmp_path / f"{name}.safetensors"))
    assert call(folder, "update", arrived) == 0
    assert active(folder) == name
    assert call(folder, "rollback") == 0
    assert call(folder, "use", name) == 0
    assert f"in use: {name}\n" in capsys.readouterr().out
    assert sign_adapter(arrived, own_keys()[0]).name == f"{name}.safetensors.sig"
    report = bundle(bundles.sources() / "input.onnx", tmp_path / "b", shapes=bundles.SHAPES, adapters=[arrived])
    assert name in report.adapters
    assert call(tmp_path / "b", "use", name) == 0
