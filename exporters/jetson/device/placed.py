"""The engine where a stock runtime looks for it: Triton, DeepStream's nvinfer, Isaac ROS's TensorRT node.

They know nothing of adapters, so it is a whole engine with the adapter in its weights.  It is written beside and gets
its name in one step; after a cut of power it is the one before or the new one.
"""

from __future__ import annotations

import json
import os
from typing import Any

from .adapters import vectors_of
from .folder import BundleError, Folder, make_folder, sha256_of, sweep, write_atomically
from .measure import inputs_of, references
from .options import Options
from .tensors import Tensor, difference

_RECORD = ("local", "placed.json")  # {"adapter": {name, file, sha256}, "sha256": of the engine}


def place_of(folder: Folder) -> str:
    """The engine's path in the bundle, "triton/model/1/model.plan"; "" in layout plain."""
    return str(folder.manifest.get("layout", {}).get("plan", ""))


def place(folder: Folder, options: Options, adapter: dict[str, Any], check: bool = True) -> str:
    """Put the engine with an adapter into its place; returns the path, or "" if the layout has none.

    Args:
        folder: the bundle.
        options: runtime "tensorrt"; stock runtimes take no engine of another one.
        adapter: of the state.
        check: load a refitted engine once more from what is written, and compare it with the one that was refitted.

    Raises:
        BundleError: there is no engine, or what was written does not compute what it should; nothing has changed then.
    """
    where = place_of(folder)
    if not where or options.runtime != "tensorrt":
        return ""
    path = folder.file(*where.split("/"))
    content = _refitted(folder, options, adapter, check) if folder.traits.refits else _built(folder, options, adapter)
    make_folder(os.path.dirname(path))
    sweep(os.path.dirname(path))
    write_atomically(path, content)
    record = {"adapter": adapter, "sha256": sha256_of(path)}
    write_atomically(folder.file(*_RECORD), json.dumps(record, indent=1).encode())
    return path


def misplaced(folder: Folder) -> str:
    """What is wrong with the engine in its place; "" if it is the one with the adapter in use."""
    path = folder.file(*place_of(folder).split("/"))
    try:
        with open(folder.file(*_RECORD), encoding="utf-8") as file:
            record = json.load(file)
        found = sha256_of(path)
    except FileNotFoundError:
        return "no engine is there: run `build`"
    except ValueError as error:
        return f"{os.path.join(*_RECORD)} is damaged ({error}): run `build`"
    if found != record["sha256"] or record["adapter"] != folder.state()["adapter"]:
        return "the engine there is not the one with the adapter in use: run `build`"
    return ""


def _built(folder: Folder, options: Options, adapter: dict[str, Any]) -> Any:
    from .trt_build import build

    return build(folder, options, adapter).read()


def _refitted(folder: Folder, options: Options, adapter: dict[str, Any], check: bool) -> Any:
    """The engine's bytes after a refit.

    That a refit has worked says nothing about what is written: an engine with the values from before would serve the
    wrong adapter, and nothing would tell.
    """
    from .trt_run import TensorRT

    model = TensorRT(folder, options, adapter)
    model.set_vectors(vectors_of(folder, adapter))
    content = model.engine.serialized()
    if check:
        expected = _outputs(model)
        del model  # there may be no room for both
        _compare(folder, expected, _outputs(TensorRT(folder, options, adapter, content=content)))
    return content


def _outputs(model: Any) -> list[tuple[str, Tensor]]:
    cases = references(model.folder).values()
    return [one for tensors in cases for one in model.run(inputs_of(tensors)).items()]


def _compare(folder: Folder, expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]]) -> None:
    for (name, wanted), (_, value) in zip(expected, found):
        relative = difference(wanted, value)[1]
        if not relative <= folder.manifest["tolerance"][name]:
            raise BundleError(
                f"the engine that TensorRT wrote after the refit computes another {name!r} than the refitted one "
                f"(by {relative:.1e} relative): export with adapters='load', whose engine is built with the adapter"
            )
