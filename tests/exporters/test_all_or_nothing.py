"""Everything that writes files, with a failing system call at each place: all old or all new, and no input changes."""

import errno
import itertools
import shutil
from pathlib import Path

import pytest
from faults import Fault, content
from writers import WRITERS, attempt, changes, is_function, refused, source

from onelora_compile.exporters.jetson.device.folder import BundleError
from onelora_compile.weights import atomic_write

# Tracing takes a second for each call of the system, and is no other one for each mode; a bundle makes many calls.
LONG = ("export", "bundle")
CASES = [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(LONG) else []) for name in WRITERS]


@pytest.fixture
def here(tmp_path):
    return Path(shutil.copytree(source(), tmp_path / "work"))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", CASES)
def test_a_failure_at_each_call(here, name, lasting):
    write, out = WRITERS[name]
    write(here, out, "b.safetensors")
    old = content(here)
    errors = itertools.cycle((errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS))
    for nth in itertools.count():
        fault = Fault(nth, lasting, next(errors))
        error = attempt(here, write, out, "a.safetensors", fault)
        if not fault.fired:
            break
        check(here, out, old, content(here), error, fault)
        shutil.rmtree(here)
        shutil.copytree(source(), here)
        write(here, out, "b.safetensors")
        old = content(here)
    assert nth > 3
    assert error is None
    assert is_function(here / out, 1)


@pytest.mark.slow
def test_two_folders_can_change_places_in_two_steps(here, monkeypatch):
    monkeypatch.setattr(atomic_write, "_exchange", lambda *_: False)  # a file system without it
    test_a_failure_at_each_call(here, "bundle", False)


def check(here, out, old, new, error, fault):
    """All old or all new; only what could not be removed is left, under a name that begins with a dot."""
    seeds = [1] if error is None else [2, 1] if fault.gone else [2]
    assert any(is_function(here / out, seed) for seed in seeds) or (fault.gone and refused(here / out)), fault
    assert not changes(old, new, fault, error, out), fault
    assert fault.size is None or isinstance(error, OSError | BundleError)
    # It names a file, and one that the user knows.
    assert error is None or str(here) in str(error) or out == "device"
    assert ".onelora-" not in str(error)
    assert str(error).count("can't write") < 2


@pytest.mark.parametrize("name", CASES)
def test_a_full_disk(here, name):
    write, out = WRITERS[name]
    write(here, out, "b.safetensors")
    old = content(here)
    largest = max(len(value) for value in old.values() if value)
    for size in (0, 1, 100, *(largest * part // 16 for part in range(1, 17)), 4 * largest):
        fault = Fault(size=size)
        error = attempt(here, write, out, "a.safetensors", fault)
        if error is None:
            break
        check(here, out, old, content(here), error, fault)
    assert error is None
    assert is_function(here / out, 1)
