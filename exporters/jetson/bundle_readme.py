"""The README of a bundle: one screen for the person at the device."""

from __future__ import annotations

from typing import Any

from onelora_compile.exporters.jetson.device.core.modes import MODES

_SWAP = {
    "input": "A new adapter is in use from the next run on: the vectors are inputs of the engine, nothing is rebuilt.",
    "refit": "A new adapter is written into the engine (refit of its vectors alone), nothing is rebuilt.",
    "load": "A new adapter is folded into the weights by building the engine again here; the old one stays until then.",
    "bank": "The engine holds all adapters; `use` chooses one, and `adapter_ids` one for each row of a batch.",
    "fold": "The adapter is in the weights: another adapter needs another bundle.",
    "base": "The model has no adapter.",
}
_STOCK = {
    "triton": "Triton, `--model-repository=triton`; it takes a new engine with `--model-control-mode=poll`, or when "
    "asked to load `model`",
    "deepstream": "DeepStream's `nvinfer`; it takes a new engine when its property `model-engine-file` is set again",
    "isaac-ros": "Isaac ROS's `TensorRTNode`, which takes a new engine when it starts",
}
_POLYGRAPHY = (
    "- `./polygraphy.sh` builds it with Polygraphy, on the stored inputs, and compares with the stored outputs;",
    "  `BACKEND=--onnxrt ./polygraphy.sh` without TensorRT. `polygraphy inspect model model.onnx` shows the model.",
)
_SIGNED = (
    "#   only with its signature, new.safetensors.sig, by the key of this bundle, and only if that is newer than all",
    "#   that were taken here: an old file is refused, also after `rollback`. `status` shows the number that was taken",
)


def readme(manifest: dict[str, Any], types: str) -> str:
    """Markdown."""
    device, model, mode = manifest["device"], manifest["model"], manifest["model"]["mode"]
    names = ", ".join(f"`{entry['name']}`" for entry in manifest["adapters"])
    run = "python3 build_and_run.py"
    lines = [
        f"# {model['file']} for JetPack {device['jetpack']}",
        "",
        f"For L4T {device['l4t']}, TensorRT {device['tensorrt']}, Python {device['python']}, GPUs of SM "
        f"{', '.join(device['sm'])}. Computes in: {types}. Copy this folder to the device and run there:",
        "",
        "```sh",
        f"{run} build        # seconds to many minutes; needs no network",
    ]
    if manifest["reference"]:
        lines += [f"{run} selftest     # compares with stored tensors", f"{run} bench        # latency p50, p99"]
    lines += [f"{run} status", "```", "", f"Adapters: {names}. {_SWAP[mode]}"]
    if MODES[mode].takes_files:
        lines += [
            "",
            "```sh",
            f"{run} update new.safetensors --sha256 …   # checks base, shapes and numbers, tries it, switches",
            *(_SIGNED if manifest["update_key"] else ()),
            f"{run} use default                         # one that is here",
            f"{run} rollback                            # the one before",
            "```",
            "",
            "A cut of power at any moment leaves the old adapter or the new one. A file that is damaged, or was",
            "trained on another base, is refused.",
        ]
    if stock := manifest.get("layout"):
        lines += [
            "",
            f"For {_STOCK[stock['name']]}: `{stock['file']}`. `build`, `update`, `use` and `rollback`",
            f"put the engine with the adapter in use at `{stock['plan']}`, in one step, and `status` checks it.",
        ]
    lines += [
        "",
        "From Python, with this folder in PYTHONPATH (`model.refresh()` takes over what `update` did meanwhile):",
        "",
        "```python",
        "from onelora_device import Deployed",
        'model = Deployed("/path/of/this/folder")',
        "outputs = model.run({...})              # NumPy arrays by name; outputs[name].numpy()",
        "```",
        "",
        "- No memory: `build --workspace-mib 256 --optimization-level 2`, no desktop, swap.",
        "- NaN, or one class everywhere: `selftest --layers` finds the layer where it starts.",
        "- `No module named tensorrt`: use the system's python3, or `python3 -m venv --system-site-packages`.",
        f"- `./trtexec.sh` builds and times the same model with NVIDIA's tool, flags of TensorRT {device['tensorrt']}.",
        *(_POLYGRAPHY if manifest["reference"] else ()),
        "- In a container: `Dockerfile`, whose first lines say how.",
        "- With onnxruntime: `--runtime onnxruntime --provider cpu` (`cuda`, `tensorrt`) before any of these commands.",
        "",
    ]
    return "\n".join(lines)
