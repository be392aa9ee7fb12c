"""What NVIDIA's messages mean, in the options of a bundle's script and in the arguments of build_engine."""

import sys
import time

import pytest

from onelora_compile.exporters.jetson.device.core import messages, progress

# Messages that only other machines give, as their users reported them; what a script and build_engine are told.
SAID = [
    ("Target GPU SM 87 is not supported by this TensorRT release", "10.16.2 or newer", "JetPack 7.2"),
    ("Tactic Device request: 13089MB Available: 9185MB. Requested OutOfMemory", "--workspace-mib 256", "workspace="),
    ("Could not find any implementation for node {ForeignNode[a...b]}", "--optimization-level 1", "level=2"),
    ("Serialization assertion stdVersionRead == kVERSION failed. Version tag does not match", "build it here", "here"),
    ("CUDA initialization failure with error: 35", "--runtime nvidia", None),  # engine_error says more
    ("HW-specific datatypes: fp8_e4m3", "SM 8.9", "SM 8.9"),
    ("Network has dynamic inputs, but no optimization profile has been defined", "make the bundle again", "shapes="),
    ("INT8 layers need the flag enabled", None, "precision='int8'"),  # a script sets it by itself
    ("something else", None, None),
]


@pytest.mark.parametrize(("text", "script", "build"), SAID, ids=[text.split()[0] for text, _, _ in SAID])
def test_what_helps_in_the_words_of_who_asks(text, script, build):
    for words, expected in (("script", script), ("build_engine", build)):
        found = messages.advice(text, words)
        assert len(found) == (expected is not None)
        assert expected is None or expected in found[0]


def test_every_remedy_has_its_words():
    assert messages.WORDS["script"].keys() == messages.WORDS["build_engine"].keys()
    for words in messages.WORDS.values():
        for _, remedy in messages._KNOWN:
            assert "{" not in remedy.format(**words).replace("{'QuantizeBias'", "")


def test_errors_are_told_once_each_and_with_what_helps():
    text = messages.explained(["OutOfMemory", " OutOfMemory\n", "", "b"])
    assert text.splitlines()[:2] == ["  OutOfMemory", "  b"]
    assert text.splitlines()[2].startswith("  -> memory ran out: build with --workspace-mib 256")
    assert messages.explained([]) == "  (no message)"


def test_the_line_of_a_build(monkeypatch, capsys):
    def shown(line):
        with line:
            while not (text := capsys.readouterr().err):  # a thread writes it
                time.sleep(0.01)
        return text, capsys.readouterr().err

    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        line = progress.Line(period=0.01)
        line.start("outer", 4)
        for _ in range(2):
            line.step()
        text, end = shown(line)
        wanted = f"\r\033[K[{'#' * 10}{' ' * 10}] " if terminal else "building: "
        assert text.startswith(wanted + "2/4 outer, 0 s so far")
        assert end.endswith("\r\033[K") == terminal
    for _ in range(6):
        line.step()
    assert line.text() == "4/4 outer, 0 s so far"
