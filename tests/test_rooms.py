"""Rooms import in one direction, and each says what lives in it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("onelora_compile", "passes", "exporters")
# From low to high: whatever is here imports only from what stands before it.  "" is the package's own __init__.
ORDER = (
    "errors file_names version printable table sharded kinds torch_versions ops progress kernels looking dynamo "
    "passes/sites passes/graph weight_uses adapting many_adapters weights testing passes/lowerings passes "
    "passes/exported backend report"
).split()
ORDER += [
    "",
    *(
        "exporters/jetson/device/core exporters/onnx_file exporters/calls exporters/opsets exporters/onnx_runtime "
        "exporters/quantized exporters/fold exporters/half exporters/faults exporters/to_program exporters/to_onnx "
        "exporters/tensorrt exporters/jetson exporters examples cli __main__"
    ).split(),
]
DEVICE = ROOT / "exporters" / "jetson" / "device"  # a program of its own, with relative imports
PROGRAM = [DEVICE, DEVICE / "core"]
FOLDERS = sorted({path.parent for top in TOPS for path in (ROOT / top).rglob("*.py")} - set(PROGRAM))
SHORT = {"onelora_compile", "onelora_compile/kernels"}  # ARCHITECTURE.md tells of these
ROOMS = [room for room in FOLDERS if room.relative_to(ROOT).as_posix() not in SHORT and "examples" not in room.parts]
ROOMS += PROGRAM


def named(folder):
    return folder.relative_to(ROOT).as_posix()


def room_of(module):
    """The room of a dotted name below the package: the longest that the order has."""
    parts = module.split(".")[1:]
    return next(name for n in range(len(parts), -1, -1) if (name := "/".join(parts[:n])) in ORDER)


def module_of(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "onelora_compile" else ["onelora_compile", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for folder in FOLDERS for path in folder.glob("*.py")} | {module_of(DEVICE / "__init__.py")}


def imported(path):
    """Modules of this package that a file imports, wherever it does, but for annotations."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "onelora_compile":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_a_room_imports_only_from_lower_ones(folder):
    for path in folder.glob("*.py"):
        own = room_of(module_of(path))
        for module in imported(path):
            assert ORDER.index(room_of(module)) <= ORDER.index(own), f"{named(path)} imports {module}"


def test_the_devices_program_imports_itself_and_its_core_nothing_else():
    for folder in PROGRAM:
        for path in folder.glob("*.py"):
            steps = {node.level for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
            assert steps <= {0, 1}, named(path)  # what else may be imported: test_jetson.py
            assert not list(imported(path)), named(path)


@pytest.mark.parametrize("room", ROOMS, ids=named)
def test_a_room_names_every_file_in_it(room):
    text = (room / "README.md").read_text()
    assert len(text.splitlines()) <= 20
    files = {path.name for path in room.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert [name for name in sorted(files) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in PROGRAM], ids=named)
def test_a_room_says_which_others_it_imports(room):
    (line,) = re.findall("Imports of other rooms: (.*)", (room / "README.md").read_text())
    if line in ("everything.", "its own."):
        return
    said = {one if one in ORDER else f"exporters/{one}" for one in re.findall("`(.+?)`", line)}
    rooms = {room_of(module_of(folder / "__init__.py")) for folder in [*FOLDERS, *PROGRAM]} - {""}
    used = {room_of(module) for path in room.glob("*.py") for module in imported(path)} & rooms
    used.discard(room_of(module_of(room / "__init__.py")))
    assert said <= used
    assert {one for one in used - said if one.partition("/")[0] not in said} == set()  # `passes` is its rooms too


@pytest.mark.parametrize("folder", [one for one in FOLDERS if (one / "__init__.py").exists()], ids=named)
def test_no_public_name_hides_a_module(folder):
    body = ast.parse((folder / "__init__.py").read_text()).body
    package = module_of(folder / "__init__.py")
    names = {
        alias.asname or alias.name
        for node in body
        if isinstance(node, ast.ImportFrom)
        if node.module != package
        for alias in node.names
    }
    names |= {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names & modules == set()
