"""The demo starts without lines of other libraries that are about nothing in it."""

import logging
import subprocess
import sys

import pytest

from onelora_compile.examples.imports import import_peft, without_noise_of_torchao


def test_it_starts_in_silence():
    """All that the demo needs is imported at its start."""
    pytest.importorskip("peft")
    code = "from onelora_compile.examples.sentences.run import check_dependencies; check_dependencies()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_only_those_lines_are_left_out(caplog):
    caplog.set_level(logging.WARNING)
    torchao, pytree = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
    pytree.propagate, kept = True, pytree.propagate
    try:
        with without_noise_of_torchao():
            torchao.warning("Failed to load /a/_C_cutlass_90a.abi3.so: it is for another GPU")
            torchao.warning("this model is broken")
            pytree.warning("%s is an Enum subclass and is now natively supported by torch.compile as", str)
            pytree.warning("another warning")
        torchao.warning("Failed to load afterwards")
    finally:
        pytree.propagate = kept
    assert caplog.messages == ["this model is broken", "another warning", "Failed to load afterwards"]
    assert not torchao.filters
    assert not pytree.filters


def test_peft_is_peft():
    assert import_peft().__name__ == "peft"
