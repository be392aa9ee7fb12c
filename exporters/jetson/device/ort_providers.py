"""ONNX Runtime's execution providers: which one runs a bundle's model, and with which options.

ONNX Runtime goes on without a provider that is missing or does not start.  Here that is an error.

local/onnxruntime/timing-<version>/                    kernels that TensorRT has timed
local/onnxruntime/engines-<version>-<model>-<adapter>/  its engines
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from .folder import BundleError, Folder
from .options import Options

NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_FLAGS = {"float16": "trt_fp16_enable", "bfloat16": "trt_bf16_enable"}
_RECORD = "session.record_ep_graph_assignment_info"


def open_session(ort: Any, chosen: Any, path: str, providers: list[Any]) -> Any:
    """A session of which the first provider runs nodes.

    Args:
        ort: the module.
        chosen: `SessionOptions`.
        path: the model.
        providers: of `providers_of`.

    Raises:
        BundleError: the provider is not in this package, does not start, or takes no node of the model.
    """
    first = _name(providers[0])
    if first not in (known := ort.get_available_providers()):
        raise BundleError(
            f"the installed onnxruntime {ort.__version__} has no {first}; it has: {', '.join(known)}. Install a build "
            "with it (x86-64: onnxruntime-gpu; Jetson: a wheel for its JetPack), or choose another --provider"
        )
    for place in _places(providers[0]):
        os.makedirs(place, exist_ok=True)  # the provider makes no folder within one that is missing
    chosen.add_session_config_entry(_RECORD, "1")  # of newer versions; others do not read it
    try:
        session = ort.InferenceSession(path, chosen, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base
        again = ". `build --force` makes the engines that are kept here again" if _places(providers[0]) else ""
        raise BundleError(f"ONNX Runtime can't load {path} with {first}: {error}{again}") from None
    session.disable_fallback()  # of `run`; versions before 1.12 know this call alone
    if first not in (opened := session.get_providers()):
        raise BundleError(
            f"{first} was asked for, and ONNX Runtime {ort.__version__} would run on {', '.join(opened)} instead: the "
            "provider's libraries (CUDA, cuDNN, TensorRT of its version), the driver or the GPU are not there. "
            "--verbose shows what it says"
        )
    if (nodes := nodes_by_provider(session)) and first not in nodes:
        raise BundleError(f"{first} takes no node of the model: all {sum(nodes.values())} are on {', '.join(nodes)}")
    return session


def nodes_by_provider(session: Any) -> dict[str, int]:
    """How many nodes each provider runs; empty where this version does not tell."""
    found: dict[str, int] = {}
    if hasattr(session, "get_provider_graph_assignment_info"):
        for part in session.get_provider_graph_assignment_info():
            found[part.ep_name] = found.get(part.ep_name, 0) + len(part.get_nodes())
    return found


def label_of(ort: Any, session: Any, options: Options) -> str:
    """What runs the model, for people."""
    if options.provider == "cpu":
        return f"ONNX Runtime {ort.__version__} on the CPU (not TensorRT)"
    counts = ", ".join(f"{count} nodes on {name}" for name, count in nodes_by_provider(session).items())
    return f"ONNX Runtime {ort.__version__}, {NAMES[options.provider]}" + (f" ({counts})" if counts else "")


def providers_of(folder: Folder, options: Options, adapter: dict[str, Any], version: str) -> list[Any]:
    """The provider and what takes the nodes that it leaves, as `InferenceSession` wants them.

    Raises:
        BundleError: an option that the provider does not have.
    """
    _refuse_unused(options)
    cuda = (NAMES["cuda"], {} if options.tf32 else {"use_tf32": "0"})
    if options.provider == "cpu":
        return [NAMES["cpu"]]
    if options.provider == "cuda":
        return [cuda, NAMES["cpu"]]
    return [(NAMES["tensorrt"], _tensorrt(folder, options, adapter, version)), cuda, NAMES["cpu"]]


def _name(provider: Any) -> str:
    return str(provider if isinstance(provider, str) else provider[0])


def _places(provider: Any) -> list[str]:
    """The folders that a provider keeps something in."""
    options = {} if isinstance(provider, str) else provider[1]
    return [value for name, value in options.items() if name.endswith("_path")]


def _refuse_unused(options: Options) -> None:
    """An option that does nothing is not taken without a word."""
    builds = options.provider == "tensorrt"
    given = {
        "--sm": options.sm is not None,
        "--workspace-mib": options.workspace_mib is not None and not builds,
        "--optimization-level": options.optimization_level is not None and not builds,
        "--no-tf32": not options.tf32 and options.provider != "cuda",
    }
    if unused := [name for name, is_given in given.items() if is_given]:
        more = "; set NVIDIA_TF32_OVERRIDE=0" if builds and "--no-tf32" in unused else ""
        raise BundleError(f"{', '.join(unused)}: not for --provider {options.provider} of ONNX Runtime{more}")


def _tensorrt(folder: Folder, options: Options, adapter: dict[str, Any], version: str) -> dict[str, str]:
    model, build = folder.manifest["model"], folder.manifest["build"]
    workspace = build["workspace_mib"] if options.workspace_mib is None else options.workspace_mib
    asked = options.optimization_level
    found = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache_of(folder, options, adapter, version),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder.file("local", "onnxruntime", f"timing-{version}"),
        "trt_max_workspace_size": str(workspace << 20),
        "trt_builder_optimization_level": str(build["optimization_level"] if asked is None else asked),
    }
    found.update((_FLAGS[name], "1") for name in model["dtypes"] if name in _FLAGS)
    if build["typing"] == "weak_fp16":
        found[_FLAGS["float16"]] = "1"
    if model["quantized"]:
        found["trt_int8_enable"] = "1"
    if build["profiles"]:
        for index, which in enumerate(("min", "opt", "max")):
            found[f"trt_profile_{which}_shapes"] = shapes_text(build["profiles"], index)
    return found


def shapes_text(profiles: dict[str, Any], index: int) -> str:
    """The smallest, usual or largest shape of each input, as NVIDIA's tools and this provider write them."""
    return ",".join(f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in profiles.items())


def note_of(folder: Folder, options: Options) -> str:
    """What a user should know of the types in the provider's engine; "" if they are the model's."""
    narrow = [name for name in folder.manifest["model"]["dtypes"] if name in _FLAGS]
    if options.provider != "tensorrt" or not (narrow or folder.manifest["build"]["typing"] == "weak_fp16"):
        return ""
    wide = ", also where the model has float32 on purpose" if "float32" in folder.manifest["model"]["dtypes"] else ""
    return f"the provider lets TensorRT choose {' or '.join(narrow or ['float16'])} for any layer{wide}: run `selftest`"


# ---- engines ----------------------------------------------------------------------------------------------------


def cache_of(folder: Folder, options: Options, adapter: dict[str, Any], version: str) -> str:
    """Where the provider keeps the engines of a model with an adapter.

    It finds them by the names in the graph alone: those of another adapter in the weights would be taken for the same.
    """
    own = options.engine_each(folder.traits)
    return folder.file("local", "onnxruntime", f"engines-{version}-{_model(folder)}-{_key(adapter) if own else 'all'}")


def prune(folder: Folder) -> None:
    """Remove engines of this model with adapters that are neither in use nor the one before."""
    state = folder.state()
    kept = {"all", *(_key(one) for one in [state["adapter"], *state["previous"][:1]])}
    for path in caches(folder):
        *_, model, key = os.path.basename(path).rsplit("-", 2)
        if model == _model(folder) and key not in kept:
            shutil.rmtree(path, ignore_errors=True)


def caches(folder: Folder) -> list[str]:
    """The folders with engines that are here."""
    place = folder.file("local", "onnxruntime")
    names = sorted(os.listdir(place)) if os.path.isdir(place) else []
    found = [os.path.join(place, name) for name in names if name.startswith("engines-")]
    return [path for path in found if os.listdir(path)]


def _model(folder: Folder) -> str:
    return str(folder.manifest["model"]["sha256"])[:16]


def _key(adapter: dict[str, Any]) -> str:
    return str(adapter["sha256"])[:16] or "base"
