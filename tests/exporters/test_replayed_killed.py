"""A signed update that is killed at any of its calls of the system: the number is that of the adapter."""

import shutil

import bundles
import pytest
import signed
from bundles import ORT, active, call
from killer import calls_of, killed
from signed import arrived, refused, taken

pytestmark = signed.needs_openssl


@pytest.mark.parametrize("first", [True, False])
def test_killed_at_any_moment_the_number_is_that_of_the_adapter(first, tmp_path):
    """The first numbered update of a device, and a later one."""
    (tmp_path / "tmp").mkdir()
    before, old = "default", arrived(tmp_path, "c", sequence=10)
    old_number = None
    new = arrived(tmp_path, "new", sequence=11)

    def device():
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        folder = signed.fresh(tmp_path)
        if not first:
            assert call(folder, "update", "--no-try", old) == 0
        return folder

    if not first:
        before, old_number = "c", 10
    folder = device()
    command, inside = (folder, *ORT, "update", new, "--no-try"), {"TMPDIR": str(tmp_path / "tmp")}
    total = calls_of(*command, **inside)
    assert total > 12
    seen = []
    for calls in range(1, total + 1):
        folder = device()
        assert killed(calls, *command, **inside)[0] == -9
        state = bundles.device(folder, "folder").Folder(str(folder)).state()
        seen.append((state["adapter"]["name"], state["taken"] and state["taken"]["sequence"]))
        assert call(folder, "update", "--no-try", new) == 0  # it is sent until it is taken
        assert (active(folder), taken(folder)["sequence"]) == ("new", 11)
        refused(folder, old, still="new")
    assert set(seen) == {(before, old_number), ("new", 11)}
    assert seen == sorted(seen, key=lambda one: one[0] == "new")
