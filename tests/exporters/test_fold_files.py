"""fold_onnx and the files around it: killed, disk full, read-only, hostile, damaged, large; nothing is ever lost."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fold_project import Project, close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError, OneLoRAError
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors


@pytest.mark.parametrize("external", [True, False], ids=["external", "one file"])
def test_killed_at_any_moment_leaves_the_old_or_the_new_model(external, tmp_path):
    project = Project(tmp_path, external)
    folders = tmp_path / "children"
    folders.mkdir()
    project.children(folders, "m.onnx", "kill", 60)
    seen = {"old": 0, "new": 0}
    for folder in folders.iterdir():
        if not folder.is_dir():
            continue
        output = project.output(folder / "m.onnx")
        state = "old" if np.array_equal(output, project.output(project.base)) else "new"
        assert state == "old" or close(output, project.new)
        seen[state] += 1
        fold_onnx(project.base, project.adapter, folder / "m.onnx", progress=False)  # what was left is no obstacle
        assert close(project.output(folder / "m.onnx"), project.new)
    assert seen["old"] > 20
    assert seen["new"] >= 1
    assert "error.txt" not in {path.name for path in (folders / "whole").iterdir()}


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
import onnx_ir as ir
from onelora_compile.exporters.onnx_file.save import save_model
x, w = (ir.Value(name=name, shape=ir.Shape([100, 100]), type=ir.TensorType(ir.DataType.FLOAT)) for name in "xw")
w.const_value = ir.tensor(np.ones((100, 100), np.float32), name="w")
node = ir.node("MatMul", [x, w])
graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 18}, name="g")
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
save_model(ir.Model(graph, ir_version=9), Path(sys.argv[1]), external_data=True)
"""


def test_arrays_that_the_disk_has_no_room_for_leave_nothing_and_say_why(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "m.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "OSError" in done.stderr
    assert "disk is full" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_can_not_be_written():
    with tempfile.TemporaryDirectory() as shared:  # pytest's own folders are closed to other users
        os.chmod(shared, 0o755)
        project = Project(Path(shared), True)
        project.adapter.chmod(0o644)
        folders = Path(shared) / "children"
        folders.mkdir()
        project.children(folders, "new.onnx", "readonly", 0)
        assert "PermissionError" in (folders / "0" / "error.txt").read_text()
        assert project.files(folders / "0") == project.files(project.folder)


def test_in_place_with_external_data_leaves_no_second_copy_of_the_weights(tmp_path):
    project = Project(tmp_path, True)
    for _ in range(2):
        shutil.copytree(project.folder, tmp_path / "work", dirs_exist_ok=True)
        fold_onnx(tmp_path / "work" / "m.onnx", project.adapter, tmp_path / "work" / "m.onnx")
        assert close(project.output(tmp_path / "work" / "m.onnx"), project.new)
    names = {path.name for path in (tmp_path / "work").iterdir()}
    assert len([name for name in names if name.startswith("m.onnx.")]) <= 2  # the copied base's, and the new one's


def point_outside(path, location):
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, path)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin"])
def test_external_data_outside_the_folder_is_refused(location, tmp_path):
    project = Project(tmp_path, True)
    (tmp_path / "secret.bin").write_bytes(bytes(100_000))
    point_outside(project.base, location)
    before = project.files(project.folder)
    with pytest.raises(ExportError, match="outside the folder of the model; refused"):
        fold_onnx(project.base, project.adapter, tmp_path / "base" / "out.onnx")
    assert project.files(project.folder) == before


def test_missing_and_truncated_weights(tmp_path):
    project = Project(tmp_path, True)
    data = project.folder / "m.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(ExportError, match="the file is damaged, or of another model"):
        fold_onnx(project.base, project.adapter, tmp_path / "out.onnx")
    data.unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.onnx\.data with its weights is missing"):
        fold_onnx(project.base, project.adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x07" * 50, bytes(1000)])
def test_what_is_no_model_is_an_error(content, tmp_path):
    project = Project(tmp_path, False)
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(ExportError, match="not an ONNX model, or is damaged"):
        fold_onnx(tmp_path / "bad.onnx", project.adapter, tmp_path / "out.onnx")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        fold_onnx(tmp_path / "nothing.onnx", project.adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("small"), False, sizes=(5, 7, 4))


def damaged(data, content):
    """Bytes changed, cut off or put in at random places."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        kind = data.draw(st.sampled_from(["change", "cut", "insert", "remove"]))
        if kind == "change" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del content[at : at + data.draw(st.integers(1, 9))]
    return bytes(content)


@pytest.mark.parametrize("which", ["model", "adapter"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_a_clear_error_or_do_no_harm(which, small, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, adapter, out = folder / "m.onnx", folder / "a.safetensors", folder / "out.onnx"
        model.write_bytes(damaged(data, small.base.read_bytes()) if which == "model" else small.base.read_bytes())
        adapter.write_bytes(
            damaged(data, small.adapter.read_bytes()) if which == "adapter" else small.adapter.read_bytes()
        )
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        try:
            fold_onnx(model, adapter, out, progress=False)
        except (OneLoRAError, FileNotFoundError):
            assert not out.exists()
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path != out}
        assert after == before


def test_thousands_of_tensors(tmp_path):
    count = 1500
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(count)))
    make, nodes, arrays = onnx.helper.make_node, [], {}
    for number, linear in enumerate(base):
        nodes.append(make("Gemm", [f"x{number}", f"w{number}", f"c{number}"], [f"x{number + 1}"], transB=1))
        held = {name: value.detach().numpy() for name, value in linear.named_parameters()}
        arrays[f"w{number}"], arrays[f"c{number}"] = held["weight"], held["bias"]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x0", onnx.TensorProto.FLOAT, [2, 6])],
        [info(f"x{count}", onnx.TensorProto.FLOAT, [2, 6])],
        [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "m.onnx")
    model = fill_vectors(onelora.adapt(base, onelora.OneLoRAConfig(target_modules=r"\d+")), 0.1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    report = fold_onnx(tmp_path / "m.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx")
    assert len(report.folded) == count
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "out.onnx").graph.initializer}
    for name, vector in onelora.vectors(model).items():
        expected = arrays[f"w{name}"].astype(np.float64) + vector.detach().double().numpy()[:, None]
        np.testing.assert_allclose(stored[f"w{name}"], expected, rtol=1e-6, atol=1e-7)


BIG = """
import sys
from pathlib import Path
import onnx_ir
from onelora_compile.exporters import fold_onnx

def peak():  # ru_maxrss would begin with that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

Path("/proc/self/clear_refs").write_text("5")
before = peak()
report = fold_onnx(*sys.argv[1:], progress=False)
print(report.bytes, len(report.folded), peak() - before)
"""


@pytest.mark.slow
def test_a_model_above_two_gigabytes_is_streamed(tmp_path):
    base = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(9)))  # 2.4 GB, the largest tensor 268 MB
    export_onnx(base, (torch.randn(1, 8192),), tmp_path / "m.onnx", verify=False)
    onelora.save_adapter(fill_vectors(onelora.adapt(base), 1e-3), tmp_path / "a.safetensors")
    paths = [str(tmp_path / name) for name in ("m.onnx", "a.safetensors", "out.onnx")]
    done = subprocess.run([sys.executable, "-c", BIG, *paths], capture_output=True, text=True, check=True)
    size, folded, peak = map(int, done.stdout.split())
    assert size > 2**31
    assert folded == 9
    assert peak < 300e6 + 8192 * 8192 * 4
