"""More adapters for a bank that runs: each is what its merged model is, and nothing else changes."""

import copy
import json
import threading

import numpy as np
import onnx
import pytest
import torch
import trained_cases as cases
from safetensors.torch import load_file
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import AdapterFileError, BaseMismatchError, ConfigError, ExportError, StateError
from onelora_compile.exporters import OnnxRunner, export_onnx
from onelora_compile.exporters.onnx_file.metadata import TableSource
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


def grown(tmp_path, count=6, room=8):
    """A bank of two adapters of a small model, files of `count`, and their merged models in float64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    files, merged = [], []
    for seed in range(count):
        model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.5, seed=seed)
        files.append(tmp_path / f"{seed}.safetensors")
        onelora.save_adapter(model, files[-1])
        merged.append(merged_copy(model, torch.float64))
    shapes = ({0: "batch"},)
    path = tmp_path / "m.onnx"
    export_onnx(base, (torch.randn(4, 6),), path, adapters="bank", bank=files[:2], dynamic_shapes=shapes)
    return OnnxRunner(path, room=room), files, [*merged, copy.deepcopy(base).double()]


def check(runner, merged, ids, seed=0):
    """Each row against the merged model of its adapter; -1 is the last of them, the base."""
    x = torch.randn(len(ids), 6, generator=torch.Generator().manual_seed(seed))
    (y,) = runner.run([x.numpy()], adapter_ids=ids)
    rows = [(merged[number], x[row : row + 1]) for row, number in enumerate(ids)]
    want = torch.cat([model(one.double()) for model, one in rows])
    plain = torch.cat([copy.deepcopy(model).float()(one) for model, one in rows])
    assert_parity(torch.from_numpy(y), want, plain)


def test_adapters_are_added_one_after_another(tmp_path):
    runner, files, merged = grown(tmp_path)
    session, before = runner.session, (tmp_path / "m.onnx").read_bytes()
    beside = runner.with_adapter("1")
    for number in range(2, 6):
        assert runner.add_adapter(files[number]) == number
        check(runner, merged, [*range(number + 1), -1])
    assert runner.session is session
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert runner.metadata.adapters == beside.metadata.adapters == tuple("012345")
    check(beside, merged, [5, -1, 2])
    renamed = tmp_path / "other.safetensors"
    renamed.write_bytes(files[4].read_bytes())
    assert (runner.adapter_id(renamed), runner.adapter_id("5")) == (4, 5)
    with pytest.raises(ExportError, match=r"between -1 \(the base\) and 5"):
        runner.run([np.zeros((1, 6), np.float32)], adapter_ids=[6])
    assert OnnxRunner(tmp_path / "m.onnx").metadata.adapters == ("0", "1")
    assert runner.add_adapter(onelora.read_adapter(files[0]), "again") == 6


def test_threads_run_while_adapters_come(tmp_path):
    """Bit for bit what the full bank gives, as what is drawn depends on when each adapter comes."""
    runner, files, merged = grown(tmp_path, 40, 38)
    full = OnnxRunner(tmp_path / "m.onnx", room=38)
    for file in files[2:]:
        full.add_adapter(file)
    check(full, merged, [*range(40), -1])
    x = torch.randn(8, 6).numpy()
    expected = np.stack([full.run([x], adapter_ids=[number] * 8)[0] for number in range(-1, 40)])
    wrong: list[BaseException] = []
    done = threading.Event()

    def serve(seed):
        order = np.random.default_rng(seed)
        try:
            while not done.is_set():
                ids = order.integers(-1, len(runner.metadata.adapters), 8)
                (y,) = runner.run([x], adapter_ids=ids.tolist())
                np.testing.assert_array_equal(y, expected[ids + 1, np.arange(8)])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for file in files[2:]:
        runner.add_adapter(file)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    check(runner, merged, [*range(40), -1])


def test_what_does_not_fit_changes_nothing(tmp_path):
    runner, files, merged = grown(tmp_path, 4, 1)
    other = fill_vectors(onelora.adapt(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))), 0.1)
    onelora.save_adapter(other, tmp_path / "other.safetensors")
    larger = fill_vectors(onelora.adapt(nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))), 0.1)
    onelora.save_adapter(larger, tmp_path / "larger.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(files[2].read_bytes()[:-40])
    for file, name, error, match in (
        ("other", None, BaseMismatchError, "trained on another base"),
        ("larger", None, AdapterFileError, "no place for vectors of the adapter: 1, 3"),
        ("cut", None, AdapterFileError, "is not a safetensors file, or is damaged"),
        ("nowhere", None, FileNotFoundError, "there is no adapter file"),
        ("2", "1", StateError, "has an adapter '1' already"),
        ("2", "", ConfigError, "not empty"),
        ("2", "x.safetensors", ConfigError, "not that of a file"),
    ):
        with pytest.raises(error, match=match):
            runner.add_adapter(tmp_path / f"{file}.safetensors", name)
        assert runner.metadata.adapters == ("0", "1")
    with pytest.raises(ConfigError, match="has a name"):
        runner.add_adapter(onelora.read_adapter(files[2]))
    runner.add_adapter(files[2])
    with pytest.raises(StateError, match="no room for '3': it was opened for 1 more"):
        runner.add_adapter(files[3])
    check(runner, merged, [0, 1, 2, -1])


def test_room_is_refused_where_there_is_none(tmp_path):
    path = grown(tmp_path, 3)[0].path
    with pytest.raises(StateError, match=r"opened without room .*room=1000"):
        OnnxRunner(path).add_adapter(tmp_path / "2.safetensors")
    with pytest.raises(ConfigError, match="from 0 on"):
        OnnxRunner(path, room=-1)
    with pytest.raises(ConfigError, match="copied or compiled"):
        OnnxRunner(path, room=1, providers=["XnnpackExecutionProvider", "CPUExecutionProvider"])
    export_onnx(nn.Linear(3, 2), (torch.randn(1, 3),), tmp_path / "base.onnx")
    with pytest.raises(StateError, match="only a bank takes more"):
        OnnxRunner(tmp_path / "base.onnx").add_adapter(tmp_path / "2.safetensors")
    with pytest.raises(StateError, match="only a bank has room"):
        OnnxRunner(tmp_path / "base.onnx", room=1)
    model = onnx.load(path)
    kept = [one for one in model.metadata_props if one.key != "onelora.tables"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(StateError, match="Export the bank again"):
        OnnxRunner(tmp_path / "old.onnx", room=1)
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = ["renamed" if one == "2" else one for one in node.input]
    for one in model.graph.initializer:
        one.name = "renamed" if one.name == "2" else one.name
    onnx.save(model, tmp_path / "renamed.onnx")
    OnnxRunner(tmp_path / "renamed.onnx")
    with pytest.raises(StateError, match="no table '2' of all its adapters: a tool rewrote it"):
        OnnxRunner(tmp_path / "renamed.onnx", room=1)


def test_the_base_and_an_adapter_of_some_linears(tmp_path):
    runner, _, merged = grown(tmp_path, 2)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    model = fill_vectors(onelora.adapt(base, onelora.OneLoRAConfig(target_modules=["2"])), 0.5, seed=9)
    onelora.save_adapter(model, tmp_path / "part.safetensors")
    runner.add_adapter(tmp_path / "part.safetensors")
    check(runner, [*merged[:2], merged_copy(model, torch.float64), merged[2]], [2, -1, 0, 2])


@pytest.mark.parametrize("name", cases.MODELS)
@pytest.mark.parametrize("variant", ["vectors", "both", "dropped"])
def test_heads_and_norms(name, variant, tmp_path):
    """Tables of weights that are turned round, of statistics, of norms."""
    files, x = cases.adapters(name, variant), cases.inputs(name)
    model = cases.trained(name, variant, 1)
    path = tmp_path / "m.onnx"
    export_onnx(model, (x,), path, adapters="bank", bank=[files / "a.safetensors"], progress=False)
    runner = OnnxRunner(path, room=3)
    assert runner.add_adapter(files / "b.safetensors") == 1
    mixed = runner.run([x.numpy()], adapter_ids=[1, -1])[0]
    for row, adapter in enumerate(["b", None]):
        want = cases.expected(name, variant, adapter, x[row : row + 1])
        assert np.abs(mixed[row : row + 1] - want).max() <= 1e-5 * np.abs(want).max()


class Packed(nn.Module):
    """One weight for q, k and v, which is used in parts; a head and a norm."""

    def __init__(self):
        super().__init__()
        self.packed, self.norm, self.head = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x, memory):
        weights, biases = self.packed.weight.chunk(3), self.packed.bias.chunk(3)
        q, k, v = (nn.functional.linear(*one) for one in zip((x, memory, memory), weights, biases, strict=True))
        return self.head(self.norm((q @ k.mT).softmax(-1) @ v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_of_a_packed_weight(dtype, tmp_path):
    """What is added is bit for bit what the exporter writes."""
    torch.manual_seed(0)
    base, files, merged = Packed().eval(), [], []
    config = onelora.OneLoRAConfig(modules_to_save=["head"], train_norms=True)
    for seed in range(2):
        model = onelora.adapt(copy.deepcopy(base), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in onelora.trainable_parameters(model):
                parameter.add_(0.3 * torch.randn_like(parameter))
        files.append(tmp_path / f"{seed}.safetensors")
        onelora.save_adapter(model, files[-1])
        merged.append(merged_copy(model, torch.float64))
    inputs = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    for name, bank in (("one", files[:1]), ("both", files)):
        options = {"adapters": "bank", "bank": bank, "dtype": dtype}
        export_onnx(model, inputs, tmp_path / f"{name}.onnx", **options)
    runner, both = OnnxRunner(tmp_path / "one.onnx", room=1), OnnxRunner(tmp_path / "both.onnx")
    offsets = {(source.name, source.offset) for source in runner.metadata.tables.values()}
    assert {("packed", 0), ("packed", 8), ("packed", 16)} <= offsets
    runner.add_adapter(files[1])
    assert runner.metadata.digests == both.metadata.digests
    given = [one.to(dtype).numpy() for one in inputs]
    for ids in ([1, -1], [0, 1]):
        np.testing.assert_array_equal(runner.run(given, ids)[0], both.run(given, ids)[0])
    want = merged[1](*(one.double() for one in inputs))[1].detach()
    if dtype is torch.float32:
        plain = copy.deepcopy(merged[1]).float()(*inputs)[1]
        assert_parity(torch.from_numpy(runner.run(given, [0, 1])[0][1]), want, plain)


def test_sources_say_which_part_of_a_tensor_a_row_is(tmp_path):
    tensor = np.arange(24.0).reshape(6, 4)
    assert TableSource("w", 4, (1,)).row(tensor, (4,)).tolist() == [4, 5, 6, 7]
    assert np.array_equal(TableSource("w", 0, (1, 4)).row(tensor, (4, 6)), tensor.T)
    runner, files, _ = grown(tmp_path, 2)
    sources = json.loads(runner.session.get_modelmeta().custom_metadata_map["onelora.tables"])
    assert sources == {"0": ["0", 0, [1]], "2": ["2", 0, [1]]}
    held = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(runner.path).graph.initializer}
    for name, rows in load_file(files[1]).items():
        np.testing.assert_array_equal(held[name], [load_file(files[0])[name], rows, np.zeros_like(rows)])
