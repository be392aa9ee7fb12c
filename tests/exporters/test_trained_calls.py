"""Heads and norms that a model calls twice, and frozen copies of them: right in every file, or refused by name."""

import copy

import onnx
import onnx_tools as tools
import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors

FIRST = {"modules_to_save": ["blocks.0.norm"]}
HEAD, NORMS = {"modules_to_save": ["head"]}, {"train_norms": True}


class Twice(nn.Module):
    """The head, or the norm, of two inputs."""

    def __init__(self, ones):
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        if not ones:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x):
        x = self.norm(self.fc(torch.sin(self.norm(x))))
        return self.head(torch.tanh(x)) + self.head(torch.cos(x))


class Copied(nn.Module):
    """A head and what it was before training."""

    def __init__(self, name="frozen"):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.add_module(name, copy.deepcopy(self.head))
        self.frozen_name = name

    def forward(self, x):
        x = torch.tanh(self.fc(x))
        return self.head(x) - 2 * self.get_submodule(self.frozen_name)(x * x)


def trained(base, config):
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(**config)), 0.3)
    vectors = {id(vector) for vector in onelora.vectors(model).values()}
    with torch.no_grad():
        for parameter in onelora.trainable_parameters(model):
            if id(parameter) not in vectors:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def folded(base, model, writer, tmp_path, strip=None):
    x = torch.randn(4, 8)
    path = writer(base, (x,), tmp_path / "m.onnx")
    if strip is not None:
        file = onnx.load(path)
        strip(file)
        onnx.save(file, path)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    plain, exact = model(x), copy.deepcopy(model).double()(x.double())
    assert_parity(torch.from_numpy(tools.run(tmp_path / "out.onnx", (x,))).float(), exact, plain)


def without_op_names(file):
    for node in file.graph.node:
        node.name = ""
        del node.metadata_props[:]


def without_names(file):
    """Other names of constants too."""
    without_op_names(file)
    names = {one.name: f"t{index}" for index, one in enumerate(file.graph.initializer)}
    for one in file.graph.initializer:
        one.name = names[one.name]
    for node in file.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


@pytest.mark.parametrize("writer", [tools.torchscript, tools.torchscript_plain, tools.dynamo])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("config", [HEAD, NORMS, HEAD | NORMS], ids=["head", "norms", "both"])
def test_every_call_of_what_was_trained_gets_it(config, ones, writer, tmp_path):
    torch.manual_seed(0)
    base = Twice(ones).eval()
    folded(base, trained(base, config), writer, tmp_path)


@pytest.mark.parametrize("name", ["frozen", "head_1"])  # the second is what TorchScript calls a second call
@pytest.mark.parametrize("chosen", ["with a vector", "excluded", "not chosen"])
@pytest.mark.parametrize("writer", [tools.torchscript, tools.dynamo, tools.slim, tools.simplified])
def test_the_copy_of_a_head_keeps_its_values(writer, chosen, name, tmp_path):
    torch.manual_seed(0)
    base = Copied(name).eval()
    config = {"excluded": {"exclude_modules": [name]}, "not chosen": {"target_modules": ["fc"]}}.get(chosen, {})
    model = trained(base, HEAD | config)
    if chosen == "not chosen" and name == "head_1" and writer in (tools.slim, tools.simplified):
        with pytest.raises(ExportError, match=r"head.weight: head_1 may be a later call, and the model had one call"):
            folded(base, model, writer, tmp_path)
        assert not (tmp_path / "out.onnx").exists()
    else:
        folded(base, model, writer, tmp_path)


@pytest.mark.parametrize("strip", [without_op_names, without_names])
@pytest.mark.parametrize("writer", [tools.torchscript, tools.dynamo])
def test_a_frozen_head_that_no_name_tells_is_refused(writer, strip, tmp_path):
    torch.manual_seed(0)
    base = Copied().eval()
    with pytest.raises(ExportError, match=r"head.weight: its base value is at .* tell which use is its own"):
        folded(base, trained(base, HEAD | {"exclude_modules": ["frozen"]}), writer, tmp_path, strip)
    assert not (tmp_path / "out.onnx").exists()


class Block(nn.Module):
    """A norm `norm`, and one of another name."""

    def __init__(self, beside):
        super().__init__()
        self.norm, self.fc, self.beside = nn.LayerNorm(8), nn.Linear(8, 8), beside
        self.add_module(beside, nn.LayerNorm(8))

    def forward(self, x):
        return x + torch.sin(self.fc(self.norm(x))) * self.get_submodule(self.beside)(torch.cos(x))


class Norms(nn.Module):
    """Norms whose names are alike; all are new, so that exporters write one constant for them."""

    def __init__(self, beside):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList([Block(beside), Block(beside)]), nn.LayerNorm(8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@pytest.mark.parametrize("writer", [tools.torchscript, tools.dynamo])
@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["blocks.0.norm"]}, {"modules_to_save": ["blocks.1.norm"]}, NORMS]
)
def test_a_norm_whose_name_ends_as_a_trained_ones_is_another(config, writer, tmp_path):
    torch.manual_seed(0)
    base = Norms("second").eval()
    folded(base, trained(base, config), writer, tmp_path)


def test_a_norm_named_as_a_later_call_is_told_where_the_exporter_tells_it(tmp_path):
    torch.manual_seed(0)
    base = Norms("norm_1").eval()
    for config in (FIRST, NORMS):
        for writer in (tools.dynamo, tools.torchscript):
            folded(base, trained(base, config), writer, tmp_path)


@pytest.mark.parametrize("writer", [tools.slim, tools.simplified])  # which take the names of equal norms away
def test_a_norm_that_may_be_a_later_call_is_refused(writer, tmp_path):
    torch.manual_seed(0)
    base = Norms("norm_1").eval()
    with pytest.raises(ExportError, match=r"blocks.0.norm.weight: its base value is at .* tell which use is its own"):
        folded(base, trained(base, FIRST), writer, tmp_path)
    assert not (tmp_path / "out.onnx").exists()
