"""A base of the zoo, a file of it that another tool wrote, and what the adapted model is in float64."""

import copy
import warnings

import numpy as np
import onnx_tools as tools
import torch
from architectures import ARCHITECTURES
from architectures.outputs import main_output

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy


class Case:
    """A base model, an adapter file of it, and what base and adapted model compute in float64."""

    def __init__(self, name, folder, scale=0.05):
        base, inputs = ARCHITECTURES[name]()
        if name == "t5":
            base, inputs = base.encoder, {key: inputs[key] for key in ("input_ids", "attention_mask")}
        if name == "whisper":
            base, inputs = base.get_encoder(), {"input_features": inputs["input_features"]}
        if hasattr(base, "config") and hasattr(base, "set_attn_implementation"):
            base.set_attn_implementation("eager")  # what the tools know how to fuse
        self.base, self.inputs, self.folder = base, inputs, folder
        self.model = fill_vectors(onelora.adapt(copy.deepcopy(base)), scale)
        self.vectors = onelora.vectors(self.model)
        self.adapter = folder / "a.safetensors"
        onelora.save_adapter(self.model, self.adapter)
        self.main, self.args = tools.wrapped(base, inputs, main_output)
        self.plain = self.reference(copy.deepcopy(base).double())
        self.exact = self.reference(merged_copy(self.model, torch.float64))

    def reference(self, model):
        wide = {key: v.double() if v.is_floating_point() else v for key, v in self.inputs.items()}
        with torch.no_grad():
            return main_output(model(**wide)).numpy()

    def relative(self, actual, expected):
        return np.abs(actual - expected).max() / np.abs(expected).max()

    def effect(self):
        return self.relative(self.plain, self.exact)


def produced(case, tool):
    path = case.folder / f"{tool.__name__}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tool(case.main, case.args, path)
    return path
