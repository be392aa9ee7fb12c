"""The programs of the documents run as they are printed, their commands parse, and their links lead somewhere.

The blocks of a page are one program. A `text` block right after a Python block is what that block prints, `...` any
part of it. `<!-- run: slow -->` before a block leaves it out of the default run, `<!-- run: runtimes -->` too;
`<!-- run: gpu -->` needs a GPU, and the blocks before it.
"""

import contextlib
import doctest
import importlib
import io
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import onelora_compile as onelora
from onelora_compile.cli import app

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
BLOCK = re.compile(
    r"(?:<!-- run: (?P<mark>\w+) -->\n)?^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<prints>.*?)^```\n)?",
    re.M | re.S,
)
RANKS = [None, "slow", "runtimes", "gpu"]  # a program holds the blocks of the lower ones
COMMANDS: Any = typer.main.get_command(app)


def programs():
    for name, text in PAGES.items():
        marks = {block["mark"] for block in BLOCK.finditer(text)}
        for mark in sorted(marks, key=lambda one: one or ""):
            yield pytest.param(
                name, mark, id=f"{name}-{mark or 'as printed'}", marks=[getattr(pytest.mark, mark)] if mark else []
            )


@pytest.mark.parametrize(("name", "mark"), list(programs()))
def test_the_program_of_a_page(name, mark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "__main__"}
    text = PAGES[name]
    if ".aot_compile(" in text and torch.__version__ < "2.12":
        pytest.skip("functions have aot_compile since torch 2.12")
    for block in BLOCK.finditer(text):
        if RANKS.index(block["mark"]) > RANKS.index(mark):
            continue
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(ROOT / name), "exec")  # errors name the line of the page
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            if mark == "runtimes":
                warnings.simplefilter("ignore")  # theirs
            warnings.simplefilter("default", onelora.OneLoRAWarning)  # pages tell of them
            warnings.filterwarnings("ignore", "Specified provider '.*' is not in available", UserWarning)
            exec(code, scope)
        if block["prints"] is not None:
            same = doctest.OutputChecker().check_output(block["prints"], printed.getvalue(), doctest.ELLIPSIS)
            assert same, f"{name}:{line} prints\n{printed.getvalue()}"


def commands():
    for name, text in PAGES.items():
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
            for line in block.splitlines():
                if line.startswith("onelora "):
                    yield pytest.param(line, id=f"{name}: {line.partition('#')[0].strip()}")


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_has_these_arguments(line):
    _, name, *arguments = shlex.split(line, comments=True)
    command = COMMANDS.commands[name]
    # Whether a file is there is not asked: an argument that must exist would be an error of its own.
    command.make_context(name, list(arguments))


@pytest.mark.parametrize("name", list(PAGES))
def test_links(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if not link.startswith(("https://", "#")):
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path
            assert target.is_file(), link
            slugs = {
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            }
            assert not anchor or anchor in slugs, link


@pytest.mark.parametrize("name", list(PAGES))
def test_names_are_real(name):
    for used in re.findall(r"\bonelora\.([a-zA-Z_]+)\(", PAGES[name]):
        assert hasattr(onelora, used), used


def test_every_row_about_a_device_says_whether_it_was_run():
    tables = re.findall(r"(?:^\|.*\n)+", PAGES["docs/deploy.md"], re.M)
    assert len(tables) > 5
    for table in tables:
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        assert head[-1] == "run", head
        assert {row[-1] for row in rows} <= {"run here", "run on a GPU", "not run"}, head


@pytest.mark.parametrize("name", list(PAGES))
def test_files_of_tests_that_a_page_names_are_there(name):
    for used in re.findall(r"\btest_[\w*]+\.py", PAGES[name]):
        assert list((ROOT / "tests").rglob(used)), used


def test_every_decision_is_in_the_index():
    folder = ROOT / "docs" / "decisions"
    named = re.findall(r"\((\d{3}-[\w-]+\.md)\)", PAGES["docs/decisions/index.md"])
    assert named == sorted(path.name for path in folder.glob("[0-9]*.md"))
    for name in named:
        heads = re.findall(r"^## (.*)$", (folder / name).read_text(), re.M)
        assert heads == ["Context", "Decision", "Measurement", "Rejected"], name


def test_first_pages_are_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900
    assert len((ROOT / "ARCHITECTURE.md").read_bytes()) <= 6000


@pytest.mark.parametrize(
    ("package", "page"),
    [
        ("onelora_compile", "api"),
        ("onelora_compile.passes", "passes"),
        ("onelora_compile.exporters", "exporters"),
    ],
)
def test_the_reference_has_every_public_name(package, page):
    names = {f"{package}.{name}" for name in importlib.import_module(package).__all__ if not name.startswith("__")}
    text = PAGES[f"docs/reference/{page}.md"]
    entries = set(re.findall(r"^::: (\S+)$", text, re.M))  # made from docstrings, which constants have none of
    entries |= {f"{package}.{name}" for line in re.findall(r"^## (.*)$", text, re.M) for name in line.split(", ")}
    assert names - entries == set()
