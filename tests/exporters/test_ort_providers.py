"""ONNX Runtime as a bundle's runtime: its providers, their options, and that none is replaced by another in silence.

The CPU provider runs.  Of the others, what they are given and how they are refused is seen here.
"""

import inspect
import json

import bundles
import numpy as np
import onnxruntime
import pytest
from bundles import ORT, active, run

from onelora_compile.exporters.jetson.device.ort_providers import NAMES

CPU = (*ORT, "--provider", "cpu")
TRT = (*ORT, "--provider", "tensorrt")


class Refused(Exception):
    pass


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What sessions are asked for, in a package that says that it has every provider."""
    for mode in bundles.MODES:  # they are made once in a process, in ONNX Runtime itself
        bundles.fresh(mode, tmp_path / "made")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*NAMES.values()])
    found = []

    def session(path, options, providers, **more):
        found.append({"providers": providers, **more})
        raise Refused("no GPU")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return found


def options_of(asked):
    (name, options), (cuda, _), cpu = asked[-1]["providers"]
    assert (name, cuda, cpu) == (NAMES["tensorrt"], NAMES["cuda"], NAMES["cpu"])
    return options


@pytest.mark.parametrize("mode", bundles.MODES)
def test_every_command_on_the_cpu_provider(mode, tmp_path, capsys):
    folder, sources = bundles.fresh(mode, tmp_path), bundles.sources()
    np.save(tmp_path / "x.npy", np.zeros((3, 16, 12), np.float32))
    for command in (["build"], ["selftest"], ["bench", "--runs", "3"], ["run", f"x={tmp_path / 'x.npy'}"]):
        more = ["-o", str(tmp_path)] if command[0] == "run" else []
        assert run(folder, *CPU, *command, *more) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "on the CPU (not TensorRT) needs no engine: nothing to build" in text
    assert "with copies: p50" in text
    takes = mode in ("input", "load", "refit")
    assert run(folder, *CPU, "update", sources / "new.safetensors") == (0 if takes else 1)
    assert run(folder, *CPU, "use", "a") == (1 if mode == "fold" else 0)
    assert run(folder, *CPU, "rollback") == (1 if mode == "fold" else 0)
    assert not takes or active(folder) == "new"


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
@pytest.mark.parametrize("command", ["build", "selftest", "bench"])
def test_a_provider_that_is_not_installed_is_named(command, provider, tmp_path, capsys):
    folder = bundles.fresh("fold", tmp_path)
    assert run(folder, *ORT, "--provider", provider, command) == 1
    text = capsys.readouterr().err
    assert f"onnxruntime {onnxruntime.__version__} has no {NAMES[provider]}; it has: " in text
    assert "CPUExecutionProvider. Install" in text


def test_an_update_on_a_provider_that_is_not_installed_changes_nothing(tmp_path):
    folder = bundles.fresh("input", tmp_path)
    before = active(folder)
    assert run(folder, *ORT, "--provider", "cuda", "update", bundles.sources() / "new.safetensors") == 1
    assert active(folder) == before


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_cpu_in_its_place_is_an_error(provider, tmp_path, capsys, monkeypatch):
    # onnxruntime lists what it was built with, not what starts: the session then is one of the CPU, without an error.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*NAMES.values()])
    folder = bundles.fresh("input", tmp_path)
    with pytest.warns(UserWarning, match="is not in available provider names"):
        assert run(folder, *ORT, "--provider", provider, "selftest") == 1
    text = capsys.readouterr().err
    assert f"{NAMES[provider]} was asked for" in text
    assert "would run on CPUExecutionProvider instead" in text


def test_a_session_that_fails_is_not_tried_again_on_the_cpu(asked, tmp_path, capsys):
    folder = bundles.fresh("input", tmp_path)
    assert run(folder, *ORT, "--provider", "cuda", "selftest") == 1
    assert "with CUDAExecutionProvider: no GPU" in capsys.readouterr().err
    assert asked[0]["enable_fallback"] == 0
    assert asked[0]["providers"] == [(NAMES["cuda"], {}), NAMES["cpu"]]
    assert run(folder, *ORT, "--provider", "cuda", "selftest", "--no-tf32") == 1
    assert asked[-1]["providers"][0] == (NAMES["cuda"], {"use_tf32": "0"})


def test_the_real_session_knows_the_switch_against_its_own_fallback():
    assert "enable_fallback" in inspect.getsource(onnxruntime.InferenceSession)
    assert hasattr(onnxruntime.InferenceSession, "disable_fallback")


def test_the_tensorrt_provider_is_given_what_the_bundle_says(asked, tmp_path, capsys):
    folder = bundles.fresh("bank", tmp_path)
    assert run(folder, *TRT, "build") == 1
    assert "`build --force` makes the engines" in capsys.readouterr().err
    options = options_of(asked)
    assert options["trt_profile_min_shapes"] == "x:1x16x12,adapter_ids:1"
    assert options["trt_profile_max_shapes"] == "x:4x16x12,adapter_ids:4"
    assert (options["trt_max_workspace_size"], options["trt_builder_optimization_level"]) == (str(512 << 20), "3")
    assert not {"trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"} & set(options)
    for name in ("trt_engine_cache", "trt_timing_cache"):
        assert options[f"{name}_enable"] == "1"
        assert str(folder / "local") in options[f"{name}_path"]
    assert run(folder, *TRT, "build", "--workspace-mib", "64", "--optimization-level", "0") == 1
    assert options_of(asked)["trt_max_workspace_size"] == str(64 << 20)
    assert options_of(asked)["trt_builder_optimization_level"] == "0"


@pytest.mark.parametrize(
    ("model", "build", "flags"),
    [
        ({"dtypes": ["float16", "float32"]}, {}, {"trt_fp16_enable"}),
        ({"dtypes": ["bfloat16"]}, {}, {"trt_bf16_enable"}),
        ({"quantized": True}, {}, {"trt_int8_enable"}),
        ({}, {"typing": "weak_fp16"}, {"trt_fp16_enable"}),
    ],
)
def test_the_types_of_the_model_are_allowed(model, build, flags, asked, tmp_path):
    folder = bundles.fresh("fold", tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"].update(model)
    manifest["build"].update(build)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(folder, *TRT, "build") == 1
    assert {name for name in options_of(asked) if name.split("_")[1] in ("fp16", "bf16", "int8")} == flags


@pytest.mark.parametrize("mode", ["input", "load", "refit"])
def test_engines_of_another_adapter_are_kept_apart_where_they_hold_it(mode, asked, tmp_path):
    # The provider finds an engine by names in the graph, which are the same with every adapter.
    folder = bundles.fresh(mode, tmp_path)
    places = set()
    for name in ("a", "b"):
        state = {"adapter": bundles.device(folder, "folder").Folder(str(folder)).find(name), "previous": []}
        (folder / "local").mkdir(exist_ok=True)
        (folder / "local" / "state.json").write_text(json.dumps(state))
        assert run(folder, *TRT, "build") == 1
        places.add(options_of(asked)["trt_engine_cache_path"])
    assert len(places) == (1 if mode == "input" else 2)


def test_engines_are_made_before_an_adapter_is_in_use(asked, tmp_path):
    folder = bundles.fresh("load", tmp_path)
    assert run(folder, *TRT, "update", "--no-try", bundles.sources() / "new.safetensors") == 1
    assert asked
    assert active(folder) == "default"


def test_engines_of_adapters_that_are_gone_are_removed(tmp_path):
    folder = bundles.fresh("load", tmp_path)
    held = bundles.device(folder, "folder").Folder(str(folder))
    model = held.manifest["model"]["sha256"][:16]
    made = {}
    assert run(folder, *CPU, "use", "a") == 0
    for name in ("default", "a", "b", "base"):
        key = held.find(name)["sha256"][:16] or "base"
        made[name] = folder / "local" / "onnxruntime" / f"engines-1.0-{model}-{key}"
        made[name].mkdir(parents=True)
        (made[name] / "x.engine").touch()
    assert run(folder, *CPU, "use", "b") == 0
    assert {name for name, path in made.items() if path.exists()} == {"a", "b"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--provider", "cuda", "selftest"], "--provider cuda is for --runtime onnxruntime, and this is tensorrt"),
        ([*ORT, "build", "--sm", "86"], "--sm: not for --provider cpu"),
        ([*ORT, "--provider", "cuda", "build", "--workspace-mib", "9"], "--workspace-mib: not for --provider cuda"),
        ([*TRT, "build", "--no-tf32"], "not for --provider tensorrt of ONNX Runtime; set NVIDIA_TF32_OVERRIDE=0"),
        ([*CPU, "bench", "--cuda-graph", "--runs", "1"], "has no CUDA graphs"),
    ],
)
def test_what_would_do_nothing_is_refused(arguments, said, tmp_path, capsys):
    assert run(bundles.fresh("fold", tmp_path), *arguments) == 1
    assert said in capsys.readouterr().err


def test_the_engines_that_hold_an_adapter_are_each_tested_alone(tmp_path):
    options = bundles.device(bundles.fresh("load", tmp_path), "options").Options
    modes = bundles.device(bundles.fresh("input", tmp_path), "core.modes").MODES
    for provider, apart in (("cpu", set()), ("cuda", set()), ("tensorrt", {"load", "refit"})):
        chosen = options(runtime="onnxruntime", provider=provider)
        assert {name for name, mode in modes.items() if chosen.engine_each(mode)} == apart
