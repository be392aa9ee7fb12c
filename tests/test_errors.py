"""Which exceptions this package raises: its own, or those that docs/reference/api.md names."""

import ast
import builtins
from pathlib import Path

import onelora_compile
from onelora_compile.errors import HubError, OneLoRAError

ROOT = Path(onelora_compile.__file__).parents[1]
ROOMS = [ROOT / name for name in ("onelora_compile", "passes", "exporters")]
# File and exception -> why no caller sees it.
INNER = {
    ("onelora_compile/__init__.py", "AttributeError"): "Python's own word for a name that a module lacks",
    ("onelora_compile/looking/outside.py", "RuntimeError"): "what the looked-at code is stopped with",
    ("onelora_compile/looking/undo.py", "RuntimeError"): "what the looked-at code is stopped with",
    ("onelora_compile/printable.py", "NotImplementedError"): "an abstract method",
    ("onelora_compile/weights/fingerprint.py", "ValueError"): "an AdapterFileError, once the file is known",
    ("onelora_compile/weights/adapter_metadata.py", "ValueError"): "an AdapterFileError, once the file is known",
    ("exporters/tensorrt/library.py", "ImportError"): "a MissingExtraError, once more places were tried",
    ("exporters/tensorrt/manifest.py", "ValueError"): "an ExportError, once the file is known",
    ("passes/graph/emit.py", "KeyError"): "caught by its own caller",
}


def raised(tree):
    """The names of the exceptions that code makes and raises."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(made, ast.Name):
                yield made.id


def test_what_is_raised_is_ours_or_documented():
    found = set()
    for path in (path for room in ROOMS for path in room.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("exporters/jetson/device/"):  # runs without this package
            continue
        for one in raised(ast.parse(path.read_text())):
            kind = getattr(builtins, one, None)
            if isinstance(kind, type) and not issubclass(kind, OSError | TypeError):
                found.add((name, one))
    assert found == set(INNER)


def test_each_error_is_a_built_in_one_too():
    kinds = OneLoRAError.__subclasses__()
    assert len(kinds) >= 8
    assert all(
        issubclass(kind, OSError if kind is HubError else ValueError | RuntimeError | ImportError) for kind in kinds
    )
