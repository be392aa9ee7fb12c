"""What does putting an adapter into an ONNX model cost, in time and memory?

Against copying the file (`cp`, to the disk as ours is), against onnx.load + numpy + onnx.save of one who knows the
names of the weights, and against PEFT's way: merge_and_unload of the PyTorch model and an export of it.  Every way runs
in a process of its own; times are of the work alone, without imports; memory is the growth of the peak over it.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

WAYS = {
    "stack": ("cp", "fold_onnx", "onnx.load + numpy + onnx.save"),
    "bert": ("cp", "fold_onnx", "onnx.load + numpy + onnx.save", "PEFT merge_and_unload + export"),
}
WIDTH, LAYERS = 4096, 22  # "stack": 22 linears of 67 MB, 1.5 GB


def bert() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A BERT-base with random weights: 85 million numbers in 72 linears."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(), add_pooling_layer=False).eval(), (torch.randint(0, 1000, (1, 16)),)


def prepare(model: str, folder: Path) -> None:
    """The base as ONNX with external data, and adapters of it."""
    import onnx_ir as ir

    from onelora_compile.exporters import export_onnx

    if model == "bert":
        base, args = bert()
        export_onnx(base, args, folder / "base.onnx", external_data=True, verify=False)
        own = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.01)
        onelora.save_adapter(own, folder / "a.safetensors")
        peft_model(base).save_pretrained(folder / "peft")
        return
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    onelora.save_adapter(fill_vectors(onelora.adapt(layers), 0.01), folder / "a.safetensors")
    x = ir.Value(name="x", shape=ir.Shape([1, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    value, nodes, weights = x, [], []
    for number, layer in enumerate(layers):
        tensor = ir.tensor(layer.get_parameter("weight").detach().numpy().T.copy(), name=f"w{number}")
        weights.append(ir.Value(name=tensor.name, shape=ir.Shape([WIDTH, WIDTH]), type=ir.TensorType(tensor.dtype)))
        weights[-1].const_value = tensor
        nodes.append(ir.node("MatMul", [value, weights[-1]]))
        value = nodes[-1].outputs[0]
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([1, WIDTH])
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="stack")
    ir.save(ir.Model(graph, ir_version=9), folder / "base.onnx", external_data="base.onnx.data")


def peft_model(base: nn.Module) -> Any:
    """The same selection under PEFT, by the map that is 1LoRA's."""
    import peft

    names = list(onelora.vectors(onelora.adapt(copy.deepcopy(base))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base), peft.MissConfig(r=1, target_modules=names))


def work(way: str, model: str, folder: Path) -> Callable[[], None]:
    """One way, its imports done."""
    base, out = folder / "base.onnx", folder / "out.onnx"
    if way == "cp":

        def copied() -> None:
            subprocess.run(["cp", base, out], check=True)
            subprocess.run(["cp", f"{base}.data", f"{out}.data"], check=True)
            subprocess.run(["sync", out, f"{out}.data"], check=True)

        return copied
    if way == "fold_onnx":
        import onnx_ir  # noqa: F401

        from onelora_compile.exporters import fold_onnx

        def folded() -> None:
            fold_onnx(base, folder / "a.safetensors", out, progress=False)

        return folded
    if way.startswith("onnx.load"):
        import onnx

        from onelora_compile.weights.adapter_file import read_adapter

        def by_hand() -> None:
            loaded = onnx.load(base)
            held = {tensor.name: tensor for tensor in loaded.graph.initializer}
            vectors = read_adapter(folder / "a.safetensors").vectors
            for name, weight in zip(vectors, names_by_hand(loaded, model), strict=True):
                numbers = onnx.numpy_helper.to_array(held[weight]) + vectors[name].numpy()
                held[weight].CopyFrom(onnx.numpy_helper.from_array(numbers, weight))
            onnx.save(loaded, out, save_as_external_data=True, location="out.onnx.data")
            subprocess.run(["sync", out, f"{out}.data"], check=True)

        return by_hand
    import peft

    plain, args = bert()

    def merged() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = peft.PeftModel.from_pretrained(plain, folder / "peft").merge_and_unload()
            torch.onnx.export(whole, args, out, dynamo=True, external_data=True, verbose=False)
        subprocess.run(["sync", out, f"{out}.data"], check=True)

    return merged


def names_by_hand(loaded: object, model: str) -> list[str]:
    """The names of the weights in the order of the vectors; for BERT as many of the right kind as there are."""
    graph = loaded.graph  # type: ignore[attr-defined]
    held = {tensor.name for tensor in graph.initializer}
    return [node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in held]


def once(way: str, model: str, folder: Path) -> dict[str, float]:
    """Seconds and peak bytes of one way, in a process of its own."""
    for stale in folder.glob("out.onnx*"):
        stale.unlink()
    command = [sys.executable, __file__, "--way", way, "--model", model, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(way: str, model: str, folder: Path) -> None:
    """What `once` starts."""
    run = work(way, model, folder)
    # The peak from here on: ru_maxrss would begin with that of the process that started this one.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _peak(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps({"s": seconds, "peak": _peak() - before}))


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=WAYS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one without")
    arguments = parser.parse_args()
    if arguments.way:
        child(arguments.way, arguments.model, arguments.folder)
        return
    models = [arguments.model] if arguments.model else list(WAYS)
    rows: list[dict[str, object]] = []
    for model in models:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            prepare(model, folder)
            size = sum(file.stat().st_size for file in folder.glob("base.onnx*"))
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[model]}
            for _ in track(range(arguments.rounds), f"rounds of {model}"):
                for way, results in found.items():
                    results.append(once(way, model, folder))
            for way, results in found.items():
                within = [one["s"] / copied["s"] for one, copied in zip(results, found["cp"], strict=True)]
                seconds = statistics.median(one["s"] for one in results)
                row = {"model": model, "bytes": size, "way": way, "rounds": arguments.rounds}
                numbers = {"s": round(seconds, 3), "ratio_to_cp": round(statistics.median(within), 3)}
                low, high = np.quantile(within, [0.2, 0.8])
                spread = {"ratio_p20": round(low, 3), "ratio_p80": round(high, 3)}
                rows.append(row | numbers | spread | {"peak": int(max(one["peak"] for one in results))})
        finally:
            shutil.rmtree(folder)
    table = Table("model", "way", "s", "ratio to cp", "20 %", "80 %", "peak MB", title="an adapter into an ONNX file")
    for row in rows:
        texts = [str(row[key]) for key in ("model", "way", "s", "ratio_to_cp", "ratio_p20", "ratio_p80")]
        table.add_row(*texts, f"{int(str(row['peak'])) / 1e6:.0f}")
    if not arguments.model:
        save("fold", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
