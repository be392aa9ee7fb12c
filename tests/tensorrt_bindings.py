"""The names that real versions of TensorRT's Python module have, and how many arguments their methods take.

The binding wheels (1 MB) import on any Linux machine when the libraries that they need are there by name; a few empty
functions do.  So classes, enums and signatures are NVIDIA's own, and nothing can be run.  `tensorrt_names.json` is a
record of them, for tests without a network; this file makes it anew:

    .venv/bin/python tests/tensorrt_bindings.py
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("tensorrt_names.json")
# The wheels on PyPI nearest to what each JetPack ships; 8.5 is on no public index.
WHEELS = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3": "tensorrt-cu12-bindings==10.13.3.9",
    "10.16.1": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu12-bindings==11.4.0.106",
}
RECORDED = ("8.6.1", "10.3.0", "11.4.0.106")
RTX = "rtx 1.7.1.116"

_CLASSES = (
    "Builder INetworkDefinition IBuilderConfig OnnxParser ParserError Runtime ICudaEngine IExecutionContext Refitter "
    "ILogger IProgressMonitor IOptimizationProfile ITimingCache IHostMemory ITensor ILayer Weights ISerializationConfig"
).split()
_ENUMS = (
    "BuilderFlag NetworkDefinitionCreationFlag MemoryPoolType DeviceType DataType LayerType SerializationFlag "
    "ComputeCapability ErrorCode TensorIOMode"
).split()


def names(module):
    """Of the module, of the classes and of the enums that an engine needs; of methods the numbers of arguments."""
    found: dict[str, Any] = {"module": sorted(name for name in dir(module) if not name.startswith("_"))}
    for name in _ENUMS:
        if hasattr(module, name):
            found[name] = sorted(getattr(module, name).__members__)
    for name in _CLASSES:
        if hasattr(module, name):
            members = {key: arguments(getattr(getattr(module, name), key)) for key in dir(getattr(module, name))}
            found[name] = {key: value for key, value in members.items() if not key.startswith("_") or key == "__init__"}
    return found


def arguments(member):
    """The fewest and the most arguments of each overload, without self; None of what is no method."""
    if not callable(member) or isinstance(member, type):
        return None
    lines = re.findall(r"^(?:\d+\. )?\w+\((self: [^\n]*)\) -> ", member.__doc__ or "", re.MULTILINE)
    return [_count(line) for line in lines if "*args" not in line] or None


def _count(signature):
    depth, parts = 0, [""]
    for letter in signature:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    given = [part for part in parts[1:] if part.strip() not in ("*", "/")]
    return [sum(" = " not in part for part in given), len(given)]


def unpacked(version):
    """The folder of a wheel, with libraries that hold the functions it asks for and do nothing; kept between runs."""
    python = f"{sys.version_info[0]}{sys.version_info[1]}"
    place = Path.home() / ".cache" / "onelora-compile-tests" / f"bindings-{python}" / version
    if (place / "ready").is_file():
        return place
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", "--target", place]
    subprocess.run([*pip, WHEELS[version]], check=True)
    (bound,) = place.glob("*/tensorrt.so")
    needed = subprocess.run(["readelf", "-d", bound], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["nm", "-D", "--undefined-only", bound], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    own = [name for name in names if name.startswith(("createInfer", "createNv", "get", "initLib", "_ZN1"))]
    own = [name for name in own if name.isidentifier() and "@" not in name]
    (place / "stub.c").write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in own))
    for line in needed.splitlines():
        if "libnv" in line:
            library = line.split("[")[1].rstrip("]")
            flags = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}", "-o", place / library]
            subprocess.run(["cc", *flags, place / "stub.c"], check=True)
    (place / "ready").touch()
    return place


def names_of_wheel(version):
    """The names in a wheel, read in a process of its own."""
    place = unpacked(version)
    code = (
        f"import sys; sys.path[:0] = [{str(place)!r}]\nimport json, tensorrt_bindings\n"
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('reader', {str(Path(__file__))!r})\n"
        "reader = u.module_from_spec(spec); spec.loader.exec_module(reader)\n"
        "print(json.dumps(reader.names(tensorrt_bindings)))\n"
    )
    environment = {"LD_LIBRARY_PATH": str(place), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main():
    """Write the record."""
    import tensorrt_rtx_bindings

    record = {RTX: names(tensorrt_rtx_bindings)}
    for version in RECORDED:
        record[version] = names_of_wheel(version)
    lines = [f" {json.dumps(version)}: {json.dumps(found, sort_keys=True)}" for version, found in record.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
