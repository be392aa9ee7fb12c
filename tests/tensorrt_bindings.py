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
import tempfile
import zipfile
from pathlib import Path

RECORD = Path(__file__).with_name("tensorrt_names.json")
WHEELS = {"8.6.1": "tensorrt-bindings", "10.3.0": "tensorrt-cu12-bindings", "11.4.0.106": "tensorrt-cu12-bindings"}
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
    found = {"module": sorted(name for name in dir(module) if not name.startswith("_"))}
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


def names_of_wheel(version, folder):
    """Download a wheel into a folder, give it empty libraries, and read its names in a process of its own."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d", folder]
    subprocess.run([*command, f"{WHEELS[version]}=={version}"], check=True, capture_output=True)
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    (library,) = Path(folder).glob("tensorrt_bindings/tensorrt.so")
    _empty_libraries(library, version.split(".")[0], Path(folder))
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}]\nimport json, tensorrt_bindings\n"
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('reader', {str(Path(__file__))!r})\n"
        "reader = u.module_from_spec(spec); spec.loader.exec_module(reader)\n"
        "print(json.dumps(reader.names(tensorrt_bindings)))\n"
    )
    environment = {"LD_LIBRARY_PATH": str(folder), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _empty_libraries(library, major, folder):
    """Libraries of the names that a binding asks for, with its missing functions, empty."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    missing = [line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()]
    own = [name for name in missing if re.search(r"_INTERNAL$|PluginRegistry$|OnnxParserVersion$|InferPlugins$", name)]
    own += [name for name in missing if re.match(r"_ZN\d+nv(uff|caffe)parser", name)]
    source = folder / "empty.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in own))
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin", "nvparsers"):
        file = f"lib{name}.so.{major}"
        subprocess.run(["cc", "-shared", f"-Wl,-soname,{file}", "-o", folder / file, source], check=True)


def main():
    """Write the record."""
    import tensorrt_rtx_bindings

    record = {RTX: names(tensorrt_rtx_bindings)}
    for version in WHEELS:
        with tempfile.TemporaryDirectory() as folder:
            record[version] = names_of_wheel(version, folder)
    lines = [f" {json.dumps(version)}: {json.dumps(found, sort_keys=True)}" for version, found in record.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
