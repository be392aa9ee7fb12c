"""Heads and norms of an adapter: in every mode and every operation the function of the PyTorch model."""

import itertools
import warnings
from contextlib import AbstractContextManager

import numpy as np
import onnx
import pytest
import torch
import trained_cases as cases
from safetensors.torch import load_file, save_file
from trained_cases import MODES, VARIANTS, adapters, expected, exported, inputs

import onelora_compile as onelora
from onelora_compile.errors import AdapterFileError, BaseMismatchError, ConfigError, ExportError, StateError
from onelora_compile.exporters import OnnxRunner, bundle, convert_adapter, fold_onnx
from onelora_compile.exporters.jetson.device.deployed import Deployed
from onelora_compile.exporters.jetson.device.options import Options


def kind(models, modes):
    """Every model, variant and mode; by default those that show most."""
    cells = []
    for name, variant, mode in itertools.product(models, VARIANTS, modes):
        slow = (name, variant) not in {("pooled", "both"), ("pooled", "dropped")}
        marks = pytest.mark.slow if slow else ()
        cells.append(pytest.param(name, variant, mode, marks=marks, id=f"{name}-{variant}-{mode}"))
    return cells


def close(outputs, name, variant, adapter, x, factor=1.0):
    want = expected(name, variant, adapter, x)
    assert np.abs(outputs - want).max() <= factor * 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("name", "variant", "mode"), kind(cases.MODELS, MODES[2:]))
def test_an_adapter_is_swapped(name, variant, mode):
    path, files, x = exported(name, variant, mode), adapters(name, variant), inputs(name)
    runner = OnnxRunner(path, files / "a.safetensors")
    for adapter in "aba":
        runner.use(files / f"{adapter}.safetensors")
        close(runner.run([x.numpy()])[0], name, variant, adapter, x)
    runner.use(None)
    close(runner.run([x.numpy()])[0], name, variant, None if mode == "bank" else "a", x)
    if mode == "bank":
        mixed = runner.run([x.numpy()], adapter_ids=[1, -1])[0]
        close(mixed[:1], name, variant, "b", x[:1])
        close(mixed[1:], name, variant, None, x[1:])


@pytest.mark.parametrize(("name", "variant", "mode"), kind(cases.MODELS, MODES[2:4]))
def test_an_adapter_is_converted(name, variant, mode, tmp_path):
    path, files, x = exported(name, variant, mode), adapters(name, variant), inputs(name)
    between = tmp_path / ("b.vectors" if mode == "load" else "b.onnx_adapter")
    convert_adapter(files / "b.safetensors", between, like=path)
    convert_adapter(between, tmp_path / "again.safetensors", like=path)
    close(OnnxRunner(path, tmp_path / "again.safetensors").run([x.numpy()])[0], name, variant, "b", x)
    model = onelora.load_adapter(cases.base_of(name, variant), tmp_path / "again.safetensors").eval()
    close(model(x).detach().numpy(), name, variant, "b", x)


@pytest.mark.parametrize(("name", "variant", "mode"), kind(cases.MODELS, MODES))
def test_an_adapter_is_folded_into_every_mode(name, variant, mode, tmp_path):
    """Into the base of a model that carries vectors; on top of a folded one only where it was trained on that."""
    path, files, x = exported(name, variant, mode), adapters(name, variant), inputs(name)
    fold = lambda: fold_onnx(path, files / "b.safetensors", tmp_path / "out.onnx", progress=False)  # noqa: E731
    moved = name == "images"  # its batch norm's statistics travel too, and are merged into the convolution of the base
    refused: AbstractContextManager[object]
    if mode == "fold":
        refused = pytest.raises(BaseMismatchError, match="holds an adapter already")
    elif mode == "bank" and (variant != "vectors" or moved):
        refused = pytest.raises(ExportError, match="are rows of tables: nothing can be folded into it")
    elif mode == "base" and moved:
        refused = pytest.raises(ExportError, match=r"batch_norm.running_mean.* merged it with something")
    else:
        report = fold()
        runner = OnnxRunner(tmp_path / "out.onnx")
        assert (runner.mode, runner.metadata.adapters, runner.input_names) == ("fold", ("b",), ["x"])
        assert [file.name for file in report.files] == ["out.onnx"]
        saved = onelora.read_adapter(files / "b.safetensors").saved
        assert set(report.replaced) == {one for one, value in saved.items() if value.is_floating_point()}
        close(runner.run([x.numpy()])[0], name, variant, "b", x)
        return
    with refused:
        fold()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "variant", "mode"), kind(["pooled", "images"], MODES[2:]))
def test_an_adapter_is_bundled(name, variant, mode, tmp_path):
    path, files, x = exported(name, variant, mode), adapters(name, variant), inputs(name)
    shapes = {"x": (tuple(x.shape),) * 3}
    given = [] if mode == "bank" else [files / "a.safetensors", files / "b.safetensors"]
    report = bundle(path, tmp_path / "bundle", adapters=given, shapes=shapes, progress=False)
    assert report.checks
    assert ("base" in report.adapters) == (mode == "bank" or (variant == "vectors" and name != "images"))
    for adapter in "ab":
        model = Deployed(str(tmp_path / "bundle"), Options(runtime="onnxruntime"), adapter)
        (output,) = model.run({"x": x.numpy()}).values()
        close(output.numpy(), name, variant, adapter, x)


def stripped(path, out):
    """A copy without a name that says where anything comes from."""
    model = onnx.load(path)
    names = {one.name: f"w{number}" for number, one in enumerate(model.graph.initializer)}
    for one in model.graph.initializer:
        one.name = names[one.name]
    for node in model.graph.node:
        node.name = ""
        node.ClearField("metadata_props")
        node.input[:] = [names.get(one, one) for one in node.input]
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("exporter", ["dynamo", pytest.param("script", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("names", [True, False])
def test_bases_of_other_exporters(exporter, variant, names, tmp_path):
    """Numbers find heads without a name; norms that look alike are then refused by name."""
    x, files = inputs("pooled"), adapters("pooled", variant)
    path = exported("pooled", variant, "base")
    if exporter == "script":
        path = tmp_path / "script.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(cases.base_of("pooled", variant), (x,), path, dynamo=False, opset_version=17)
    path = path if names else stripped(path, tmp_path / "stripped.onnx")
    if not names and "train_norms" in VARIANTS[variant]:
        with pytest.raises(ExportError, match=r"norm.weight: its base value is at w\d+, and neither names nor"):
            fold_onnx(path, files / "a.safetensors", tmp_path / "out.onnx", progress=False)
        return
    fold_onnx(path, files / "a.safetensors", tmp_path / "out.onnx", progress=False)
    close(OnnxRunner(tmp_path / "out.onnx").run([x.numpy()])[0], "pooled", variant, "a", x)


def test_a_new_head_has_other_numbers_in_every_process(tmp_path):
    """The base was written by a process that drew another head."""
    x, files, model = inputs("pooled"), adapters("pooled", "both"), cases.base_of("pooled", "both")
    torch.manual_seed(99)
    model.classifier.reset_parameters()
    onelora.exporters.export_onnx(model, (x,), tmp_path / "base.onnx", progress=False)
    fold_onnx(tmp_path / "base.onnx", files / "a.safetensors", tmp_path / "out.onnx", progress=False)
    close(OnnxRunner(tmp_path / "out.onnx").run([x.numpy()])[0], "pooled", "both", "a", x)


def test_one_of_two_norms_that_share_a_constant(tmp_path):
    """The exporter merges equal norms; the other one stays as it is."""
    x, path = inputs("pooled"), exported("pooled", "vectors", "base")
    model = onelora.adapt(cases.base_of("pooled", "vectors"), onelora.OneLoRAConfig(modules_to_save=["last"]))
    with torch.no_grad():
        for parameter in onelora.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    want = model.eval()(x).detach().numpy()
    assert np.abs(OnnxRunner(tmp_path / "out.onnx").run([x.numpy()])[0] - want).max() < 1e-5
    stripped(path, tmp_path / "stripped.onnx")
    with pytest.raises(ExportError, match=r"last.weight: its base value is at"):
        fold_onnx(tmp_path / "stripped.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)


class Tied(torch.nn.Module):
    """A head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.a = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.a(self.embed(ids)))


def test_a_tied_head_is_replaced_at_both_ends(tmp_path):
    """The exporter writes the embedding, and the same numbers transposed for the head."""
    torch.manual_seed(0)
    base, ids = Tied(), torch.arange(10).reshape(2, 5)
    onelora.exporters.export_onnx(base, (ids,), tmp_path / "base.onnx", progress=False)
    config = onelora.OneLoRAConfig(target_modules=["a"], modules_to_save=["head"])
    model = onelora.adapt(base, config)
    with torch.no_grad():
        for parameter in onelora.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert onelora.read_adapter(tmp_path / "a.safetensors").aliases == {"head.weight": ("embed.weight",)}
    fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    want = model.eval()(ids).detach().numpy()
    assert np.abs(OnnxRunner(tmp_path / "out.onnx").run([ids.numpy()])[0] - want).max() < 1e-4


def older(source, out):
    """An adapter as versions before this one wrote it."""
    import safetensors

    with safetensors.safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    for key in ("saved_fingerprints", "saved_aliases"):
        metadata.pop(key)
    save_file(load_file(source), out, metadata)
    return out


@pytest.mark.parametrize("variant", ["both", "dropped"])
def test_adapters_of_older_versions(variant, tmp_path):
    files, x = adapters("pooled", variant), inputs("pooled")
    file = older(files / "b.safetensors", tmp_path / "b.safetensors")
    close(OnnxRunner(exported("pooled", variant, "input"), file).run([x.numpy()])[0], "pooled", variant, "b", x)
    model = onelora.load_adapter(cases.base_of("pooled", variant), file).eval()
    close(model(x).detach().numpy(), "pooled", variant, "b", x)
    path = exported("pooled", variant, "base")
    if variant == "dropped":
        with pytest.raises(ExportError, match=r"classifier.bias: .* older version, without its base value: save it"):
            fold_onnx(path, file, tmp_path / "out.onnx", progress=False)
        return
    fold_onnx(path, file, tmp_path / "out.onnx", progress=False)
    close(OnnxRunner(tmp_path / "out.onnx").run([x.numpy()])[0], "pooled", variant, "b", x)


def test_adapters_that_trained_something_else():
    files = {variant: adapters("pooled", variant) / "a.safetensors" for variant in VARIANTS}
    for mode in ("load", "input"):
        with pytest.raises(AdapterFileError, match=r"no trained values for last\.bias, last\.weight"):
            OnnxRunner(exported("pooled", "both", mode), files["head"])
        with pytest.raises(AdapterFileError, match=r"also trained last\.bias.* holds as constants"):
            OnnxRunner(exported("pooled", "dropped", mode), files["both"])
        with pytest.raises(AdapterFileError, match=r"has no place for vectors of the adapter: classifier"):
            OnnxRunner(exported("pooled", "both", mode), files["vectors"])
    with pytest.raises(StateError, match="are in its weights"):
        OnnxRunner(exported("pooled", "both", "fold"), files["both"])


@pytest.mark.parametrize("variant", ["both", pytest.param("vectors", marks=pytest.mark.slow)])
def test_a_banks_adapter_is_known_by_its_content(variant, tmp_path):
    path, files, x = exported("pooled", variant, "bank"), adapters("pooled", variant), inputs("pooled")
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes((files / "b.safetensors").read_bytes())
    close(OnnxRunner(path, renamed).run([x.numpy()])[0], "pooled", variant, "b", x)
    close(OnnxRunner(path, onelora.read_adapter(renamed)).run([x.numpy()])[0], "pooled", variant, "b", x)
    other = tmp_path / "a.safetensors"
    onelora.save_adapter(cases.trained("pooled", variant, 7), other)
    with pytest.raises(AdapterFileError, match=r"no adapter of .* has the values of this file, whatever its name"):
        OnnxRunner(path, other)
    with pytest.raises(AdapterFileError, match="whatever its name"):  # the same vectors, and a head more
        OnnxRunner(exported("pooled", "dropped", "bank"), adapters("pooled", "both") / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        OnnxRunner(path, tmp_path / "missing.safetensors")
    model = onnx.load(path)
    kept = [one for one in model.metadata_props if one.key != "onelora.digests"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "old.onnx")
    close(OnnxRunner(tmp_path / "old.onnx", "b").run([x.numpy()])[0], "pooled", variant, "b", x)
    with pytest.raises(AdapterFileError, match="an older version wrote it: give the adapter's name"):
        OnnxRunner(tmp_path / "old.onnx", renamed)


def test_what_was_folded_one_after_the_other_is_named(tmp_path):
    """The second adapter was trained on the model that the first was merged into."""
    first = cases.trained("pooled", "vectors", 1)
    onelora.save_adapter(first, tmp_path / "first.safetensors")
    onelora.merge(first)
    second = onelora.adapt(first, onelora.OneLoRAConfig(modules_to_save=["classifier"], exclude_modules=["a"]))
    with torch.no_grad():
        for parameter in onelora.trainable_parameters(second):
            parameter.add_(0.1 * torch.randn_like(parameter))
    onelora.save_adapter(second, tmp_path / "second.safetensors")
    out, x = tmp_path / "out.onnx", inputs("pooled")
    fold_onnx(exported("pooled", "vectors", "base"), tmp_path / "first.safetensors", out, progress=False)
    fold_onnx(out, tmp_path / "second.safetensors", out, progress=False)
    metadata = OnnxRunner(out).metadata
    assert metadata.adapters == ("first", "second")
    assert {"a", "b", "classifier.weight"} <= set(metadata.vectors)
    want = second.eval()(x).detach().numpy()
    assert np.abs(OnnxRunner(out).run([x.numpy()])[0] - want).max() < 1e-5


@pytest.mark.parametrize("mode", ["base", "fold", "bank"])
def test_convert_is_for_models_that_take_files(mode, tmp_path):
    with pytest.raises(ConfigError, match=r"takes no adapter file|says nothing of vectors"):
        convert_adapter(
            adapters("pooled", "both") / "a.safetensors",
            tmp_path / "a.onnx_adapter",
            like=exported("pooled", "both", mode),
        )
