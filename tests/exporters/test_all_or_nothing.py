"""Everything that writes files, with a failing system call at each place: all old or all new, and no input changes."""

import dataclasses
import errno
import functools
import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from faults import Fault, content, failing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError, OneLoRAError
from onelora_compile.exporters import OnnxRunner, bundle, convert_adapter, export_onnx, fold_onnx
from onelora_compile.exporters.jetson.device import commands
from onelora_compile.exporters.jetson.device.deployed import Deployed
from onelora_compile.exporters.jetson.device.folder import BundleError, Folder
from onelora_compile.exporters.jetson.device.options import Options
from onelora_compile.exporters.onnx_file.metadata import float32
from onelora_compile.exporters.onnx_file.save import data_files
from onelora_compile.exporters.tensorrt.build import write_engine
from onelora_compile.exporters.tensorrt.manifest import Manifest, digest
from onelora_compile.testing import fill_vectors
from onelora_compile.weights import atomic_write

X = torch.linspace(-1, 1, 60).reshape(3, 20)
SEEDS = {"a.safetensors": 1, "b.safetensors": 2}  # of the vectors in each adapter; 0 is the base
ORT = ("--runtime", "onnxruntime")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12)).eval()


def adapted(seed):
    return fill_vectors(onelora.adapt(network()), 0.3 if seed else 0.0, seed)


@functools.cache
def expected(seed):
    """The function with the vectors of a seed, in float64, of X."""
    model = adapted(seed)
    onelora.merge(model)
    return model.double()(X.double()).detach().numpy()


@functools.cache
def source():
    """A foreign model and its twin with one file of weights, models of two modes, two adapters, and a bundle."""
    folder = Path(tempfile.mkdtemp())
    torch.onnx.export(network(), (X,), folder / "m.onnx", dynamo=True, verbose=False)
    held = onnx.load(folder / "m.onnx")
    onnx.save(held, folder / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    shutil.copy(folder / "m.onnx", folder / "twin.onnx")
    for name, seed in SEEDS.items():
        onelora.save_adapter(adapted(seed), folder / name)
    for mode in ("load", "input"):
        export_onnx(adapted(1), (X,), folder / f"{mode}.onnx", adapters=mode, progress=False)
    packed = [folder / name for name in SEEDS]
    bundle(folder / "input.onnx", folder / "device", adapters=packed, selftest=False, progress=False)
    return folder


def device(here, *arguments):
    if commands.main(["--bundle", str(here / "device"), *ORT, *map(str, arguments)]):
        raise BundleError("exit code 1")


def saved(here, out, name):
    onelora.save_adapter(adapted(SEEDS[name]), here / out)


def folded(here, out, name, base="m.onnx"):
    fold_onnx(here / base, here / name, here / out, progress=False)


def exported(here, out, name, mode="fold", external=True):
    options = {"adapters": mode, "external_data": external, "verify": False, "progress": False}
    export_onnx(adapted(SEEDS[name]), (X,), here / out, **options)


def converted(here, out, name):
    convert_adapter(here / name, here / out, like=here / "load.onnx")


def bundled(here, out, name):
    bundle(here / "load.onnx", here / out, adapters=[here / name], selftest=False, progress=False)


def updated(here, out, name):
    device(here, "update", here / name, "--no-try")


def used(here, out, name):
    device(here, "use", name.removesuffix(".safetensors"))


def built(here, out, name):
    file = onelora.read_adapter(here / name)
    sha = digest({one: float32(value) for one, value in file.tensors.items()})
    about = Manifest("rtx", "1", "input", "m.onnx", "", "", adapter_sha256=sha, initial=f"{out}.safetensors")
    write_engine(here / out, name.encode() * 1000, about, file)


def function(path):
    """What is stored at a path, as the outputs that it gives of X."""
    if path.suffix == ".onnx":
        return OnnxRunner(path).run({"input": X.numpy()})[0] if path.exists() else None
    if path.is_dir():
        assert Folder(str(path)).damaged() == []
        packed = [name for name in Folder(str(path)).packed() if name not in ("default", "base")]
        model = Deployed(str(path), Options(runtime="onnxruntime"), packed[0] if len(packed) == 1 else None)
        return model.run({"input": X.numpy()})["output"].numpy()
    if path.suffix == ".engine":
        about = Manifest.read(path)
        try:
            about.check_file(path)
            about.initial_adapter(path)
        except ExportError:
            return None
        path = path.with_name(about.initial)
    if path.suffix != ".safetensors":
        path = convert_adapter(path, path.parents[1] / "read.safetensors", like=path.parent / "load.onnx")
    return onelora.load_adapter(network(), path)(X).detach().numpy()


def is_function(path, seed):
    found = function(path)
    return found is not None and np.allclose(found, expected(seed), rtol=1e-5, atol=1e-5)


WRITERS = {
    "save": (saved, "s.safetensors"),
    "fold": (folded, "out.onnx"),
    "fold into a file of mode input": (functools.partial(folded, base="input.onnx"), "out.onnx"),
    "export": (exported, "out.onnx"),
    "export one file": (functools.partial(exported, external=False), "out.onnx"),
    "export load": (functools.partial(exported, mode="load"), "out.onnx"),
    "export input": (functools.partial(exported, mode="input"), "out.onnx"),
    "convert for ONNX Runtime": (converted, "c.onnx_adapter"),
    "convert to raw": (converted, "c.vectors"),
    "convert to safetensors": (converted, "c.safetensors"),
    "engine": (built, "m.engine"),
    "bundle": (bundled, "bundle"),
    "update": (updated, "device"),
    "use": (used, "device"),
}


# Tracing takes a second for each call of the system, and is no other one for each mode.
CASES = [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("export") else []) for name in WRITERS]


@pytest.fixture
def here(tmp_path):
    return Path(shutil.copytree(source(), tmp_path / "work"))


def attempt(here, write, out, name, fault):
    """None if it was done; else the error."""
    with failing(here, fault):
        try:
            write(here, out, name)
        except (OneLoRAError, BundleError, OSError) as error:
            return error
    return None


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", CASES)
def test_a_failure_at_each_call(here, name, lasting):
    write, out = WRITERS[name]
    write(here, out, "b.safetensors")
    old = content(here)
    errors = itertools.cycle((errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS))
    for nth in itertools.count():
        fault = Fault(nth, lasting, next(errors))
        error = attempt(here, write, out, "a.safetensors", fault)
        if not fault.fired:
            break
        check(here, out, old, content(here), error, fault)
        shutil.rmtree(here)
        shutil.copytree(source(), here)
        write(here, out, "b.safetensors")
        old = content(here)
    assert nth > 3
    assert error is None
    assert is_function(here / out, 1)


@pytest.mark.slow
def test_two_folders_can_change_places_in_two_steps(here, monkeypatch):
    monkeypatch.setattr(atomic_write, "_exchange", lambda *_: False)  # a file system without it
    test_a_failure_at_each_call(here, "bundle", False)


def check(here, out, old, new, error, fault):
    """All old or all new; only what could not be removed is left, under a name that begins with a dot."""
    seeds = [1] if error is None else [2, 1] if fault.gone else [2]
    assert any(is_function(here / out, seed) for seed in seeds) or (fault.gone and refused(here / out)), fault
    assert not changes(old, new, fault, error, out), fault
    assert fault.size is None or isinstance(error, OSError | BundleError)
    # It names a file, and one that the user knows.
    assert error is None or str(here) in str(error) or out == "device"
    assert ".onelora-" not in str(error)


def refused(path):
    """Whether this is an engine that is known to be mixed: three files can't get their names in one step."""
    return path.suffix == ".engine" and function(path) is None


def changes(old, new, fault, error, out):
    """Paths with another content that must not have it; what was written may, and begins the names of its parts."""
    written = (out[:200],) if error is None or fault.gone or out == "device" else ()
    left = (".",) if fault.leaves else ()
    changed = {path for path in old.keys() | new.keys() if old.get(path, 0) != new.get(path, 0)}
    return {path for path in changed if not path.startswith((*written, *left))}


@pytest.mark.parametrize("name", CASES)
def test_a_full_disk(here, name):
    write, out = WRITERS[name]
    write(here, out, "b.safetensors")
    old = content(here)
    largest = max(len(value) for value in old.values() if value)
    for size in (0, 1, 100, *(largest * part // 16 for part in range(1, 17)), 4 * largest):
        fault = Fault(size=size)
        error = attempt(here, write, out, "a.safetensors", fault)
        if error is None:
            break
        check(here, out, old, content(here), error, fault)
    assert error is None
    assert is_function(here / out, 1)


FAULTS = st.none() | st.builds(Fault, st.integers(0, 40), st.booleans()) | st.builds(Fault, size=st.integers(0, 4000))
MODES = ("fold", "load", "input")
NAMES = st.sampled_from(["out.onnx", "link.onnx", "n" * 250 + ".onnx", "m.onnx", "twin.onnx"])
BASES = st.sampled_from(["m.onnx", "twin.onnx", "input.onnx", "out.onnx"])


class Files(RuleBasedStateMachine):
    """A folder, and which function each file of it must be; a fault may hit any write."""

    adapters = Bundle("adapters")

    @initialize(target=adapters)
    def start(self):
        self.outer = Path(tempfile.mkdtemp())
        self.here = Path(shutil.copytree(source(), self.outer / "work"))
        (self.here / "link.onnx").symlink_to("out.onnx")
        self.seeds = {**SEEDS, "m.onnx": 0, "twin.onnx": 0, "load.onnx": 1, "input.onnx": 1, "device": 1}
        # Weights of models that the user removed or replaced by hand, and those that another tool wrote.
        self.left = {"m.onnx.data"}
        self.foreign = (self.here / "m.onnx.data").read_bytes()
        return multiple(*SEEDS)

    def teardown(self):
        shutil.rmtree(self.outer)

    def write(self, function, out, name, fault, refusable=False):
        """Run one writer and compare everything in the folder with what it was; whether it was done."""
        old, before = content(self.here), self.seeds.get(out)
        replaced = {path.name for path in data_files(self.here / out)} if (self.here / out).is_file() else set()
        fault = dataclasses.replace(fault) if fault else Fault()
        error = attempt(self.here, function, out, name, fault)
        full = fault.size is not None and isinstance(error, OSError | BundleError)
        assert error is None or fault.fired or full or refusable, error
        if error is None:
            self.seeds[out] = self.seeds[name]
        elif fault.gone and before is not None:
            found = [seed for seed in (before, self.seeds[name]) if is_function(self.here / out, seed)]
            assert found or refused(self.here / out)
            self.seeds[out] = found[0] if found else None
        new = content(self.here)
        assert not changes(old, new, fault, error, out)
        if fault.leaves:  # what could not be removed
            self.left |= new.keys() - old.keys()
        if fault.keeps:
            self.left |= replaced
        return error is None

    @rule(base=BASES, adapter=adapters, out=NAMES, fault=FAULTS)
    def fold(self, base, adapter, out, fault):
        if base in self.seeds:
            refusable = self.seeds[base] != 0 and base != "input.onnx"  # no base any more
            self.write(functools.partial(folded, base=base), out, adapter, fault, refusable)

    @rule(adapter=adapters, fault=FAULTS)
    def fold_over_an_input(self, adapter, fault):
        assert not self.write(folded, adapter, adapter, fault, refusable=True)
        assert not self.write(folded, "m.onnx.data", adapter, fault, refusable=True)

    @rule(adapter=st.sampled_from(sorted(SEEDS)), out=NAMES, mode=st.sampled_from(MODES), fault=FAULTS)
    def export(self, adapter, out, mode, fault):
        self.write(functools.partial(exported, mode=mode), out, adapter, fault)

    @rule(adapter=st.sampled_from(sorted(SEEDS)), fault=FAULTS, target=adapters)
    def save(self, adapter, fault):
        return "s.safetensors" if self.write(saved, "s.safetensors", adapter, fault) else adapter

    @rule(adapter=adapters, ending=st.sampled_from(["onnx_adapter", "vectors", "safetensors"]), fault=FAULTS)
    def convert(self, adapter, ending, fault):
        self.write(converted, f"c.{ending}", adapter, fault)

    @rule(adapter=adapters, out=st.sampled_from(["bundle", "m.engine"]), fault=FAULTS)
    def deploy(self, adapter, out, fault):
        self.write(bundled if out == "bundle" else built, out, adapter, fault)

    @rule(adapter=adapters, fault=FAULTS)
    def update(self, adapter, fault):
        self.write(updated, "device", adapter, fault)

    @rule(name=NAMES, other=st.sampled_from(["copy.onnx", "m.onnx"]))
    def copy(self, name, other):
        if name in self.seeds and name != other:
            self.left |= (
                {path.name for path in data_files(self.here / other)} if (self.here / other).exists() else set()
            )
            shutil.copy(self.here / name, self.here / other)
            self.seeds[other] = self.seeds[name]

    @rule(name=st.sampled_from(["out.onnx", "copy.onnx"]))
    def remove(self, name):
        if (self.here / name).exists():
            self.left |= {path.name for path in data_files(self.here / name)}
            (self.here / name).unlink()
            del self.seeds[name]

    @invariant()
    def every_file_is_what_was_written_last(self):
        if not hasattr(self, "here"):
            return
        for name, seed in self.seeds.items():
            assert refused(self.here / name) if seed is None else is_function(self.here / name, seed), name

    @invariant()
    def nothing_is_left_over(self):
        if not hasattr(self, "here"):
            return
        assert (self.here / "m.onnx.data").read_bytes() == self.foreign
        named = {path.name for model in self.here.glob("*.onnx") if model.exists() for path in data_files(model)}
        for path in self.here.iterdir():
            if path.suffix == ".data" or path.name.startswith(".onelora-"):
                assert path.name in named | self.left, path.name


@pytest.mark.parametrize("examples", [4, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_any_sequence_of_writers(examples):
    options = {"deadline": None, "stateful_step_count": 12, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(Files, settings=settings(max_examples=examples, **options))
