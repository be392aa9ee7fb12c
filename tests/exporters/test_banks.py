"""A bank: the rows of one batch use different adapters; what it can not choose by row is refused by name."""

import copy
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from mode_cases import Case
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import onelora_compile as onelora
from onelora_compile.errors import ExportError, StateError
from onelora_compile.exporters import OnnxRunner, export_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy, perturb_norms


def test_rows_of_one_batch_use_different_adapters(tmp_path):
    case = Case("bert", tmp_path)
    shapes = {name: {0: "batch", 1: "tokens"} for name in case.inputs}
    options: dict[str, Any] = {"adapters": "bank", "bank": case.files, "dynamic_shapes": shapes}
    export_onnx(case.models[0], (), case.path, case.inputs, **options)
    ids = [1, -1, 0, 1]
    inputs = {k: torch.cat([v[:1]] * len(ids)) for k, v in case.inputs.items()}
    runner = OnnxRunner(case.path)
    outputs = runner.run({k: v.numpy() for k, v in inputs.items()}, adapter_ids=ids)[0]
    by_id = {-1: case.base, 0: case.models[0], 1: case.models[1]}
    for row, number in enumerate(ids):
        reference, plain = case.expected(by_id[number], torch.float32)
        assert_parity(torch.from_numpy(outputs[row : row + 1]), reference[:1], plain[:1], factor=4, floor=32)
    for wrong in ([2, 0, 0, 0], [-2, 0, 0, 0]):
        with pytest.raises(ExportError, match="are not all between -1"):
            runner.run({k: v.numpy() for k, v in inputs.items()}, adapter_ids=wrong)


def test_ids_are_whole_numbers_of_any_kind_and_nothing_else(tmp_path):
    case = Case("bert", tmp_path)
    case.place("bank")
    runner, inputs = OnnxRunner(case.path), case.feed(torch.float32)
    rows = len(inputs[0])
    for wrong in (0.9, np.float32(1), True, "0"):
        with pytest.raises(ExportError, match="are not whole numbers"):
            runner.run(inputs, adapter_ids=[wrong] * rows)  # type: ignore[list-item]
    wanted = runner.with_adapter(1).run(inputs)[0]
    for one in (np.int64(1), np.uint8(1)):
        np.testing.assert_array_equal(runner.with_adapter(one).run(inputs)[0], wanted)  # type: ignore[arg-type]
        np.testing.assert_array_equal(runner.run(inputs, adapter_ids=[one] * rows)[0], wanted)  # type: ignore[list-item]


def test_there_is_one_id_for_each_row(tmp_path):
    # ONNX Runtime computes one row with three ids as three rows.
    case = Case("bert", tmp_path)
    case.export("bank")
    runner, inputs = OnnxRunner(case.path), case.feed(torch.float32)
    one = [value[:1] for value in inputs]
    for feed, ids in ((one, [0, 1, 0]), (inputs, [0]), (inputs, []), (inputs, 0), (inputs, [[0] * len(inputs[0])])):
        with pytest.raises(
            ExportError, match=f"are not one for each of the {len(feed[0])} rows of the batch|takes int64"
        ):
            runner.run(feed, adapter_ids=ids)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"takes \[.*\]; \[.*\] are not among the given \['inputs'\]"):
        runner.run({"inputs": inputs[0]})


@pytest.mark.parametrize("mode", ["fold", "load", "input"])
def test_ids_are_for_banks(mode, tmp_path):
    case = Case("bert", tmp_path)
    case.place(mode)
    with pytest.raises(StateError, match="is no bank"):
        OnnxRunner(case.path).run(case.feed(torch.float32), adapter_ids=[0])
    with pytest.raises(StateError, match="is no bank"):
        OnnxRunner(case.path).use(np.int64(0))  # type: ignore[arg-type]


def test_a_bank_refuses_what_it_can_not_choose_by_row(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            return self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model = fill_vectors(onelora.adapt(Flat()), 0.1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    options: dict[str, Any] = {"adapters": "bank", "bank": [tmp_path / "a.safetensors"]}
    with pytest.raises(ExportError, match=r"'linear': its output \[6, 4\] has no axis of the batch size 2"):
        export_onnx(model, (torch.randn(2, 3, 6),), tmp_path / "m.onnx", **options)
    assert not (tmp_path / "m.onnx").exists()


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.linear(x.transpose(0, 1)))).transpose(0, 1)


@pytest.mark.parametrize("sizes", [(3, 3), (3, 2), (1, 1), (1, 3)])
@pytest.mark.parametrize("dynamic", [None, "batch"])
def test_the_batch_is_not_taken_for_another_axis_of_its_size(sizes, dynamic, tmp_path):
    torch.manual_seed(0)
    base, x = SequenceFirst(), torch.randn(*sizes, 6)
    files, models = [], list[nn.Module]([base])
    for seed in range(2):
        model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig("all-linear")), 0.5, seed=seed)
        files.append(tmp_path / f"{seed}.safetensors")
        onelora.save_adapter(model, files[-1])
        models.append(merged_copy(model))
    options: dict[str, Any] = {"adapters": "bank", "bank": files, "dynamic_shapes": dynamic}
    if sizes == (3, 3) and dynamic is None:
        with pytest.raises(ExportError, match=r"'linear': its output \[3, 3, 5\] has 2 axes of the batch size 3"):
            export_onnx(base, (x,), tmp_path / "m.onnx", **options)
        assert not (tmp_path / "m.onnx").exists()
        return
    export_onnx(base, (x,), tmp_path / "m.onnx", **options)
    ids = [1, -1, 0][: len(x)]
    outputs = OnnxRunner(tmp_path / "m.onnx").run([x.numpy()], adapter_ids=ids)[0]
    for row, number in enumerate(ids):
        chosen = models[number + 1]
        exact = copy.deepcopy(chosen).double()(x.double())[row]
        assert_parity(torch.from_numpy(outputs[row]), exact, chosen(x)[row])


def test_a_bank_of_a_model_that_is_not_adapted_and_of_adapters_of_different_layers(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(4, 6)
    expected, files = [base(x)], []
    for seed, targets in enumerate((["2"], ["0", "2"], ["0"])):
        config = onelora.OneLoRAConfig(target_modules=targets)
        model = fill_vectors(onelora.adapt(copy.deepcopy(base), config), 0.5, seed=seed)
        files.append(tmp_path / f"{seed}.safetensors")
        onelora.save_adapter(model, files[-1])
        expected.append(model(x))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    flags = [parameter.requires_grad for parameter in base.parameters()]
    report = export_onnx(base, (x,), tmp_path / "m.onnx", adapters="bank", bank=files)
    assert report.vectors == 2
    assert {name: value.tolist() for name, value in base.state_dict().items()} == {
        k: v.tolist() for k, v in before.items()
    }
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert onelora.vectors(base) == {}
    outputs = OnnxRunner(tmp_path / "m.onnx").run([x.numpy()], adapter_ids=[-1, 0, 1, 2])[0]
    for row, one in enumerate(expected):
        np.testing.assert_allclose(outputs[row], one[row].detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["load", "input", "bank"])
@pytest.mark.parametrize("name", ["adapter_ids", "val_0", "linear"])
def test_a_layer_may_be_called_as_what_an_export_adds(name, mode, tmp_path):
    torch.manual_seed(0)
    layers = OrderedDict([(name, nn.Linear(6, 5)), ("act", nn.Tanh()), ("last", nn.Linear(5, 4))])
    base, x = nn.Sequential(layers), torch.randn(4, 6)
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.5)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    options: dict[str, Any] = {"bank": [tmp_path / "a.safetensors"]} if mode == "bank" else {}
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode, **options)
    (outputs,) = OnnxRunner(tmp_path / "m.onnx", tmp_path / "a.safetensors").run([x.numpy()])
    assert_parity(torch.from_numpy(outputs), merged_copy(model, torch.float64)(x.double()), merged_copy(model)(x))


@pytest.mark.parametrize("mode", ["load", "input", "bank"])
def test_checkpoint_wrappers_are_not_in_the_names_of_a_file(mode, tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)).eval(), torch.randn(4, 6)
    config = onelora.OneLoRAConfig(target_modules=["0", "2"], train_norms=True)
    model = perturb_norms(fill_vectors(onelora.adapt(copy.deepcopy(base), config), 0.5))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    plain = copy.deepcopy(model)
    apply_activation_checkpointing(model, check_fn=lambda one: isinstance(one, (nn.Linear, nn.LayerNorm)))
    options: dict[str, Any] = {"bank": [tmp_path / "a.safetensors"]} if mode == "bank" else {}
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode, **options)
    (outputs,) = OnnxRunner(tmp_path / "m.onnx", tmp_path / "a.safetensors").run([x.numpy()])
    assert_parity(torch.from_numpy(outputs), merged_copy(plain, torch.float64)(x.double()), merged_copy(plain)(x))
