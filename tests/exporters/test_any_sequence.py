"""Any sequence of writers in one folder, with faults: a file is what was written last, and nothing is left over."""

import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, content
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
from writers import (
    SEEDS,
    attempt,
    built,
    bundled,
    changes,
    converted,
    exported,
    folded,
    is_function,
    refused,
    saved,
    source,
    updated,
)

from onelora_compile.exporters.jetson.device.folder import BundleError
from onelora_compile.exporters.onnx_file.save import data_files

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
        self.seeds: dict[str, int | None] = {
            **SEEDS,
            "m.onnx": 0,
            "twin.onnx": 0,
            "load.onnx": 1,
            "input.onnx": 1,
            "device": 1,
        }
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
    options: dict[str, Any] = {"deadline": None, "stateful_step_count": 12, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(Files, settings=settings(max_examples=examples, **options))
