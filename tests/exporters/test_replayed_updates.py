"""Signed updates that are sent again: an attacker has every file that was ever sent, and sends what he likes."""

import json
import os
import shutil
import time
from pathlib import Path

import bundles
import pytest
import signed
from bundles import active, call
from command_line import run
from signed import arrived, kept, openssl, own_keys, refused, taken

import onelora_compile as onelora
from onelora_compile.exporters import sign_adapter

pytestmark = signed.needs_openssl


@pytest.fixture
def folder(tmp_path):
    return signed.fresh(tmp_path)


def update(folder, path, *args):
    return call(folder, "update", path, "--no-try", *args)


def without_number(path):
    """The signature that the version before wrote."""
    openssl("pkeyutl", "-sign", "-rawin", "-inkey", own_keys()[0], "-in", path, "-out", f"{path}.sig")
    return path


def test_an_older_update_that_is_sent_again_changes_nothing(folder, tmp_path, capsys):
    older, newer = arrived(tmp_path, "new"), arrived(tmp_path, "c")
    assert update(folder, older) == 0
    assert update(folder, newer) == 0
    refused(folder, older, still="c")
    assert "is older than what was taken here: its sequence number is 1" in capsys.readouterr().err
    other_name = shutil.copy(older, tmp_path / "inbox" / "tomorrow.safetensors")
    refused(folder, other_name, "--signature", f"{older}.sig", still="c")


def test_a_rollback_lets_nothing_old_in_and_the_next_update(folder, tmp_path, capsys):
    older, newer = arrived(tmp_path, "new"), arrived(tmp_path, "c")
    for path in (older, newer):
        assert update(folder, path) == 0
    number = taken(folder)
    assert call(folder, "rollback") == 0
    assert (active(folder), taken(folder)) == ("new", number)
    refused(folder, older, still="new")
    assert call(folder, "rollback") == 0
    refused(folder, older)
    assert call(folder, "use", "new") == 0  # the person at the device may
    assert taken(folder) == number
    capsys.readouterr()
    before = kept(folder)
    assert update(folder, newer) == 0  # what was taken back does not come back by itself
    assert kept(folder) == before
    assert "there already" in (text := capsys.readouterr().out)
    assert "in use: new" in text
    assert update(folder, arrived(tmp_path, "a")) == 0
    assert active(folder).startswith("a")
    assert taken(folder)["sequence"] > number["sequence"]


def test_the_same_update_twice_is_no_error_and_changes_nothing(folder, tmp_path, capsys):
    path = arrived(tmp_path)
    assert update(folder, path) == 0
    before = kept(folder)
    assert call(folder, "update", path) == 0
    assert kept(folder) == before
    assert "there already" in capsys.readouterr().out
    refused(folder, path, "--sha256", "0" * 64, still="new")


def test_an_old_adapter_under_a_new_number_is_an_update(folder, tmp_path):
    for name in ("new", "c", "new"):
        assert update(folder, arrived(tmp_path, name)) == 0
        assert active(folder) == name
    number = taken(folder)["sequence"]
    assert update(folder, arrived(tmp_path, "new")) == 0  # the one in use, signed once more
    assert taken(folder)["sequence"] > number
    assert call(folder, "rollback") == 0
    assert active(folder) == "c"


def test_two_files_with_one_number_are_not_both_taken(folder, tmp_path, capsys):
    first, second = (arrived(tmp_path, name, sequence=5) for name in ("new", "c"))
    assert update(folder, first) == 0
    refused(folder, second, still="new")
    assert "has the sequence number 5 of another file" in capsys.readouterr().err


@pytest.mark.parametrize("edit", ["larger", "longer", "leading", "stripped", "cut", "no line", "spaces", "later line"])
def test_a_number_that_was_edited_changes_nothing(edit, folder, tmp_path, capsys):
    assert update(folder, arrived(tmp_path, "c", sequence=8)) == 0
    path = arrived(tmp_path, sequence=7)
    place = path.with_name("new.safetensors.sig")
    line, signature = place.read_bytes().split(b"\n", 1)
    place.write_bytes(
        {
            "larger": line[:-1] + b"9\n" + signature,
            "longer": line + b"0\n" + signature,
            "leading": line[:-1] + b"07\n" + signature,
            "stripped": signature,
            "cut": (line + b"\n" + signature)[:-1],
            "no line": line + signature,
            "spaces": line[:-1] + b" 9\n" + signature,
            "later line": line + b"\n" + line[:-1] + b"9\n" + signature,
        }[edit]
    )
    refused(folder, path, still="c")
    text = capsys.readouterr().err
    assert "the file or number is another" in text or "is no signature" in text


def test_a_line_that_was_moved_into_the_file_changes_nothing(folder, tmp_path, capsys):
    """What was signed is the line and the file: as a file with a signature that has no number it is no adapter."""
    path = arrived(tmp_path, sequence=7)
    place = path.with_name("new.safetensors.sig")
    line, signature = place.read_bytes().split(b"\n", 1)
    path.write_bytes(line + b"\n" + path.read_bytes())
    place.write_bytes(signature)
    refused(folder, path)
    assert "safetensors" in capsys.readouterr().err


def test_without_a_number_until_the_first_that_has_one(folder, tmp_path, capsys):
    plain = without_number(arrived(tmp_path, "c"))
    assert update(folder, plain) == 0
    assert call(folder, "use", "default") == 0
    assert update(folder, plain) == 0
    assert call(folder, "status") == 0
    assert "sequence  none: any signed adapter is taken" in capsys.readouterr().out
    assert update(folder, arrived(tmp_path, "new", sequence=12)) == 0
    refused(folder, plain, still="new")
    assert "is signed without a sequence number, and this device has taken 12" in capsys.readouterr().err
    assert call(folder, "status") == 0
    assert "sequence  12" in capsys.readouterr().out


def test_a_device_whose_state_is_of_the_version_before(folder, tmp_path):
    assert update(folder, without_number(arrived(tmp_path, "c"))) == 0
    place = folder / "local" / "state.json"
    state = json.loads(place.read_text())
    del state["taken"]
    place.write_text(json.dumps(state))
    assert update(folder, arrived(tmp_path, "new", sequence=3)) == 0
    assert taken(folder)["sequence"] == 3
    assert call(folder, "rollback") == 0
    assert active(folder) == "c"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"adapter": {}, "previous": [], "taken": {"sequence": "9"}}'])
def test_a_damaged_state_is_refused_and_its_repair_keeps_the_number(damage, folder, tmp_path, capsys):
    older, newer = arrived(tmp_path, "new"), arrived(tmp_path, "c")
    for path in (older, newer):
        assert update(folder, path) == 0
    number, place = taken(folder), folder / "local" / "state.json"
    place.write_bytes(damage)
    before = kept(folder)
    for path in (older, newer):
        assert update(folder, path) == 1
    assert kept(folder) == before
    assert "is damaged" in (text := capsys.readouterr().err)
    assert "remove it to start with the bundle's own adapter" in text
    place.unlink()  # or lost
    refused(folder, older)
    assert update(folder, newer) == 0
    assert (active(folder), taken(folder)) == ("c", number)
    refused(folder, older, still="c")


def test_a_choice_after_the_state_was_lost_keeps_the_number(folder, tmp_path):
    older, newer = arrived(tmp_path, "new"), arrived(tmp_path, "c")
    for path in (older, newer):
        assert update(folder, path) == 0
    number = taken(folder)
    (folder / "local" / "state.json").unlink()
    assert call(folder, "use", "new") == 0
    assert taken(folder) == number
    refused(folder, older, still="new")


def test_a_damaged_index_says_what_helps(folder, tmp_path, capsys):
    older, newer = arrived(tmp_path, "new"), arrived(tmp_path, "c")
    for path in (older, newer):
        assert update(folder, path) == 0
    index = folder / "local" / "adapters" / "index.json"
    index.write_bytes(b"{")
    third = arrived(tmp_path, "a")
    assert update(folder, third) == 1
    assert "index.json is damaged" in (text := capsys.readouterr().err)
    assert "remove it: the adapter in use and those to go back to stay" in text
    index.unlink()
    refused(folder, older, still="c")
    assert call(folder, "rollback") == 0
    assert active(folder) == "new"
    assert update(folder, third) == 0


def test_an_update_that_fails_its_try_leaves_the_number(folder, tmp_path):
    """What was never in use does not stand in the way of what is."""
    first = arrived(tmp_path, "new")
    assert update(folder, first) == 0
    model = folder / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    later = arrived(tmp_path, "c")
    assert call(folder, "update", later) == 1
    model.write_bytes(whole)
    assert (active(folder), update(folder, first)) == ("new", 0)
    assert update(folder, later) == 0
    assert active(folder) == "c"


def test_without_a_key_nothing_is_counted(tmp_path):
    folder = bundles.fresh("input", tmp_path / "plain")
    older, newer = arrived(tmp_path, "new"), arrived(tmp_path, "c")
    for path, name in ((older, "new"), (newer, "c"), (older, "new")):
        assert update(folder, path) == 0
        assert active(folder) == name
    assert taken(folder) is None


def test_where_an_engine_is_built_for_each_adapter(tmp_path):
    folder = signed.fresh(tmp_path, "load")
    older, newer = arrived(tmp_path, "new"), arrived(tmp_path, "c")
    assert update(folder, newer) == 0
    refused(folder, older, still="c")


def test_the_command_line_says_which_number(folder, tmp_path):
    path = Path(shutil.copy(bundles.sources() / "new.safetensors", tmp_path))
    place = path.with_name("new.safetensors.sig")
    for words, number in ((["--sequence", 5], 5), ([], None)):
        before = time.time_ns() // 1000
        done = run("sign", path, "--key", own_keys()[0], *words)
        assert done.exit_code == 0, done.output
        signed_with = int(place.read_bytes().split(b"\n")[0].split()[-1])
        assert signed_with == number or before <= signed_with <= time.time_ns() // 1000
        assert f"sequence {signed_with}:" in done.output
        assert update(folder, path) == 0
        assert taken(folder)["sequence"] == signed_with


@pytest.mark.parametrize("sequence", [0, -1, True, 1.0, "7", 10**18])
def test_numbers_that_can_not_be_meant(sequence, tmp_path):
    path = shutil.copy(bundles.sources() / "new.safetensors", tmp_path)
    with pytest.raises(onelora.ConfigError, match="sequence must be a whole number from 1 to 9"):
        sign_adapter(path, own_keys()[0], sequence=sequence)
    assert not os.path.exists(f"{path}.sig")


def test_the_largest_number_is_one(folder, tmp_path):
    assert update(folder, arrived(tmp_path, "c", sequence=10**18 - 1)) == 0
    assert taken(folder)["sequence"] == 10**18 - 1
    refused(folder, arrived(tmp_path), still="c")
