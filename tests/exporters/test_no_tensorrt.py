"""A machine without TensorRT, or with one that does not load: what is missing, and how to get it."""

import sys

import engines
import pytest

import onelora_compile as onelora
from onelora_compile.exporters import build_engine
from onelora_compile.exporters.tensorrt import library


def test_no_tensorrt_at_all(tmp_path, monkeypatch):
    path, _ = engines.linear(tmp_path)
    monkeypatch.setattr(library, "_api", library._api.__wrapped__)
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(onelora.MissingExtraError, match=r"pip install 'onelora-compile\[tensorrt-rtx\]'"):
        build_engine(path, tmp_path / "m.engine", progress=False)
    with pytest.raises(onelora.MissingExtraError, match=r"TensorRT comes from NVIDIA's package index"):
        build_engine(path, tmp_path / "m.engine", flavour="tensorrt", progress=False)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("", r"has no builder and no ONNX parser: it is another package of that name"),
        ("raise OSError('libnvdla_compiler.so: cannot open')", r"does not load: libnvdla_compiler.so"),
        ("import no_such_library", r"tensorrt: No module named 'no_such_library'"),
    ],
)
def test_a_tensorrt_that_does_not_load(source, match, tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # so that it is as before afterwards
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(onelora.MissingExtraError, match=match):
        library.find_api("tensorrt")


def test_a_jetson_is_told_of_system_site_packages(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(onelora.MissingExtraError, match="--system-site-packages"):
        library.find_api("tensorrt")
