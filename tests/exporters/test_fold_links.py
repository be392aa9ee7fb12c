"""fold_onnx where a model or its weights are links: what ONNX Runtime opens is folded, the rest is refused by name."""

import shutil
from pathlib import Path

import pytest
from fold_project import Project, close

from onelora_compile.errors import ExportError
from onelora_compile.exporters import fold_onnx


def hub_cache(project, folder):
    """As Hugging Face's hub keeps files: links to one folder, in which they have other names."""
    (folder / "blobs").mkdir()
    (folder / "snapshot").mkdir()
    for number, name in enumerate(["m.onnx", "m.onnx.data"]):
        shutil.copy(project.folder / name, folder / "blobs" / str(number))
        (folder / "snapshot" / name).symlink_to(Path("..", "blobs", str(number)))
    return folder / "snapshot" / "m.onnx"


def hard_links(project, folder):
    """As copies that share their content."""
    for name in ("m.onnx", "m.onnx.data"):
        (folder / name).hardlink_to(project.folder / name)
    return folder / "m.onnx"


def linked_folder(project, folder):
    (folder / "link").symlink_to(project.folder)
    return folder / "link" / "m.onnx"


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layout", [hub_cache, hard_links, linked_folder])
def test_links_that_onnx_runtime_follows(layout, in_place, tmp_path):
    project = Project(tmp_path, True, sizes=(40, 100, 90, 30))  # biases that lie beside the model too
    (tmp_path / "links").mkdir()
    base = layout(project, tmp_path / "links")
    assert close(project.output(base), project.old)
    kept = project.files(project.folder)
    blobs = project.files(tmp_path / "links" / "blobs") if layout is hub_cache else {}
    out = base if in_place else tmp_path / "out.onnx"
    fold_onnx(base, project.adapter, out, progress=False)
    assert close(project.output(out), project.new)
    if not (in_place and layout is linked_folder):  # the same folder
        assert project.files(project.folder) == kept
    assert all((tmp_path / "links" / "blobs" / name).read_bytes() == content for name, content in blobs.items())


def test_a_link_to_weights_elsewhere_is_refused_as_onnx_runtime_does(tmp_path):
    project = Project(tmp_path, True)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(project.folder / "m.onnx.data", tmp_path / "elsewhere" / "w")
    (project.folder / "m.onnx.data").symlink_to(tmp_path / "elsewhere" / "w")
    with pytest.raises(Exception, match="escapes model directory"):
        project.output(project.base)
    with pytest.raises(
        ExportError, match=r"to the link .*m\.onnx\.data, which leads to .*elsewhere/w, outside the folder"
    ):
        fold_onnx(project.base, project.adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
