"""The Dockerfile of a bundle: what can be known of it without Docker."""

import re
import shlex
import subprocess

import bundles
import pytest
from bundles import call

from onelora_compile.exporters import bundle
from onelora_compile.exporters.jetson.container import IMAGES
from onelora_compile.exporters.jetson.releases import JETPACKS

# With the instructions that Docker knows; a misspelt one is an error of its parser.
KNOWN = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "VOLUME", "ENTRYPOINT", "CMD"}


def instructions(text):
    """(instruction, rest) of each, continued lines joined, as Docker reads them."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


@pytest.fixture
def made(tmp_path):
    folder = bundles.fresh("input", tmp_path)
    return folder, (folder / "Dockerfile").read_text()


def test_every_instruction_is_one_of_dockers(made):
    found = instructions(made[1])
    assert {name for name, _ in found} == KNOWN
    assert [name for name, _ in found][:2] == ["ARG", "FROM"]
    asked = {rest.split("=")[0] for name, rest in found if name == "ARG"}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(rest for _, rest in found)))
    assert used == asked == {"BASE", "PACKAGES"}


def test_its_shell_is_one(made):
    (script,) = [rest for name, rest in instructions(made[1]) if name == "RUN"]
    assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
    environment = {"PATH": "/nowhere", "PACKAGES": ""}  # nothing is installed where nothing was asked for
    assert subprocess.run(["/bin/sh", "-c", script], env=environment, check=False).returncode == 0


def test_the_image_holds_the_whole_bundle_and_nothing_of_this_device(made, tmp_path):
    folder, text = made
    (copied,) = [rest for name, rest in instructions(text) if name == "COPY"]
    assert copied == ". ."
    ignored = (folder / ".dockerignore").read_text().split()
    assert "local" in ignored
    held = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
    assert not held & set(ignored)  # every file that `status` checks is copied
    (volume,) = [rest for name, rest in instructions(text) if name == "VOLUME"]
    assert volume == "/bundle/local"
    (entry,) = [rest for name, rest in instructions(text) if name == "ENTRYPOINT"]
    assert (folder / entry.strip("[]").split(", ")[1].strip('"')).is_file()


def test_the_commands_that_it_names_are_the_programs(made, capsys):
    folder, text = made
    lines = [line[1:].strip() for line in text.splitlines() if "docker run" in line]
    named = [shlex.split(line)[shlex.split(line).index("model") + 1] for line in lines]
    assert named == ["build", "selftest", "update"]
    for name in (*named, "status"):
        with pytest.raises(SystemExit) as end:
            call(folder, name, "--help")
        assert end.value.code == 0
    capsys.readouterr()


def test_it_says_what_nobody_has_tried(made):
    said = "\n".join(line for line in made[1].splitlines() if line.startswith("#"))
    assert "not run" in said
    assert "looked up" in said  # the tag of its image, in a registry


def test_every_jetpack_has_an_image_of_its_kind():
    assert set(IMAGES) == set(JETPACKS)
    for version, image in IMAGES.items():
        l4t = re.fullmatch(r"nvcr\.io/nvidia/l4t-jetpack:r(\d+)\.(\d+)\.\d+", image)
        if version.startswith("7"):
            assert re.fullmatch(r"nvcr\.io/nvidia/tensorrt:\d\d\.\d\d-py3", image)
        else:
            wanted = JETPACKS[version].l4t.split(".")
            assert l4t is not None
            assert l4t.group(1) == wanted[0]
            assert wanted[1] in ("x", l4t.group(2))


def test_what_is_asked_of_the_runtime_differs_from_jetpack_7_on(tmp_path):
    for version, said in (("6.2", False), ("7.2", True)):
        folder = bundle(
            bundles.sources() / "fold.onnx", tmp_path / version, jetpack=version, shapes=bundles.SHAPES
        ).folder
        text = (folder / "Dockerfile").read_text()
        assert ("--gpus all" in text) == said
        assert IMAGES[version] in text
        assert "model update" not in text  # a model that takes no adapter files
