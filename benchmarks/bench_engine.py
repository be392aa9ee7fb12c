"""What does TensorRT's compiler make of each mode: kernels, bytes and seconds of a build; and one input or many?

Built by TensorRT-RTX for SM 8.6 without a GPU: nothing is run.  Kernels are counted in the text of the plan.  Forms:
base, fold and bank are export_onnx's modes; load has W + b 1ᵀ in the graph, both constant; inputs has one input for
each vector; packed has all vectors in one input that is split; constants has that graph with vectors as constants.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import models
import onnx_ir as ir
import torch
from environment import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

import onelora_compile as onelora
from onelora_compile.exporters import build_engine, export_onnx
from onelora_compile.exporters.tensorrt.plan_text import kernels
from onelora_compile.testing import fill_vectors

FORMS = ("base", "fold", "load", "inputs", "packed", "constants", "bank")
ROUNDS = 3


def engines(name: str, dtype: torch.dtype, folder: Path) -> list[dict[str, Any]]:
    """One row for each form of a model."""
    base, inputs = models.build(name)
    inputs = {key: value.detach().to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    shapes = {key: {0: "batch"} for key in inputs}
    options: dict[str, Any] = {"kwargs": inputs, "dynamic_shapes": shapes, "verify": False, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = base.to(dtype)
        export_onnx(base, (), folder / "base.onnx", **options)
        model = fill_vectors(onelora.adapt(base), 0.02)
        count = len(onelora.vectors(model))
        files = [folder / "one.safetensors", folder / "two.safetensors"]
        for file in files:
            onelora.save_adapter(model, file)
        for mode in ("fold", "load", "input"):
            export_onnx(model, (), folder / f"{mode}.onnx", adapters=mode, **options)
        export_onnx(model, (), folder / "bank.onnx", adapters="bank", bank=files, **options)
    plain(folder / "input.onnx", folder / "packed.onnx", packed=True)
    plain(folder / "input.onnx", folder / "constants.onnx", packed=False)
    rows = []
    for form in FORMS:
        source = folder / ("input.onnx" if form == "inputs" else f"{form}.onnx")
        sizes = {"batch": (1, 8, 16)}
        built = [
            build_engine(source, folder / "m.engine", flavour="rtx", target="sm_86", shapes=sizes, progress=False)
            for _ in range(ROUNDS)
        ]
        launched = kernels((folder / "m.engine").read_bytes())
        rows.append(
            {
                "model": name,
                "dtype": str(dtype).removeprefix("torch."),
                "form": form,
                "vectors": count,
                "kernels": len(launched),
                "different_kernels": len(set(launched)),
                "plan_bytes": built[0].bytes,
                "build_s": round(min(one.build_seconds for one in built), 3),
                "tensorrt_rtx": built[0].manifest.version,
            }
        )
    return rows


def plain(source: Path, out: Path, packed: bool) -> None:
    """The model of mode "input" with its vectors as constants, or as parts of one input."""
    model = ir.load(source)
    graph = model.graph
    own = [value for value in graph.inputs if value.name in graph.initializers]
    for value in own:
        graph.inputs.remove(value)
    if packed:
        sizes = [value.const_value.size for value in own if value.const_value is not None]
        lengths = ir.tensor(sizes, dtype=ir.DataType.INT64, name="lengths")
        held = ir.Value(
            name="lengths", shape=ir.Shape([len(sizes)]), type=ir.TensorType(lengths.dtype), const_value=lengths
        )
        graph.initializers["lengths"] = held
        whole = ir.Value(name="vectors", shape=ir.Shape([sum(sizes)]), type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(whole)
        split = ir.node("Split", [whole, held], {"axis": 0}, num_outputs=len(own))
        graph.insert_before(graph[0], split)
        for value, part in zip(own, split.outputs, strict=True):
            graph.initializers.pop(str(value.name))
            part.type, part.shape = value.type, value.shape
            value.replace_all_uses_with(part)
    model.metadata_props.clear()
    ir.save(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit", "bert", "llama", "dit"], choices=list(models.MODELS))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        for dtype in track((torch.float32, torch.float16), name):
            with tempfile.TemporaryDirectory() as folder:
                rows += engines(name, dtype, Path(folder))
    columns = ("model", "dtype", "form", "kernels", "different_kernels", "plan_bytes", "build_s")
    table = Table(*columns, title="engines of TensorRT-RTX for SM 8.6")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    save("engine", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
