"""Folders of PEFT in OpenVINO GenAI, on what transformers' exporter writes of a base: make test-runtimes."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from generating import PROMPT, TOKENS, base_in, call, greedy
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

openvino = pytest.importorskip("openvino")
genai = pytest.importorskip("openvino_genai")
pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # of transformers' exporter
SEEDS = (1, 2)
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def exported(base, folder, named=True):
    """Write a base for GenAI, beside its tokenizer; `named` as the documents do."""
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    with contextlib.redirect_stdout(None):
        given = call(base) | {"position_ids": torch.arange(3, 5).expand(2, 2)}
        model = OpenVINOExporter().export(base, given, OpenVINOConfig(dynamic=True)).program
    linears = {name.replace(".", "_"): name for name, one in base.named_modules() if isinstance(one, nn.Linear)}
    for node in model.get_ops() if named else ():
        if node.get_type_name() == "MatMul":
            for tensor in node.input_value(1).get_names():  # layers_0_mlp_up_proj_weight_0:0
                node.set_friendly_name(linears.get(tensor.partition("_weight")[0], node.get_friendly_name()))
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    converted = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    for one, name in zip(converted, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(one, folder / f"openvino_{name}.xml")


def adapter(base, folder, seed):
    """Vectors by name, and the same as GenAI takes them, from the folder that is written."""
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.02, seed)
    onelora.save_adapter(model, folder, format="peft")
    return onelora.vectors(model), genai.Adapter(folder / "adapter_model.safetensors")


@torch.no_grad()
def wanted(base, *weighted):
    """What eager generates with a sum of adapters, (vectors, weight) each, in float64."""
    model = copy.deepcopy(base).double()
    for vectors, weight in weighted:
        for name, vector in vectors.items():
            model.get_submodule(name).weight += weight * vector.double()[:, None]
    return greedy(model)


def pipeline(folder, config):
    """A pipeline in float32, in which the adapters are as the configuration says."""
    return genai.LLMPipeline(folder, "CPU", adapters=config, **FLOAT32)


def generated(pipe, adapters=None):
    how = genai.GenerationConfig()
    how.max_new_tokens, how.ignore_eos, how.do_sample = TOKENS, True, False
    if adapters is not None:
        how.adapters = adapters
    return pipe.generate(openvino.Tensor(np.array([PROMPT], np.int64)), how).tokens[0]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_adapters_are_swapped_scaled_and_added_in_one_pipeline(kind, tmp_path):
    base = base_in(tmp_path, kind)
    exported(base, tmp_path)
    a, b = (adapter(base, tmp_path / str(seed), seed) for seed in SEEDS)
    pipe = pipeline(tmp_path, genai.AdapterConfig([a[1], b[1]], mode=genai.AdapterConfig.Mode.MODE_DYNAMIC))
    asked = [[], [(a, 1.0)], [(b, 1.0)], [(a, 0.5)], [(a, 1.0), (b, -0.5)], []]
    answers = [wanted(base, *((one[0], weight) for one, weight in weighted)) for weighted in asked]
    assert len({tuple(one) for one in answers}) == len(asked) - 1  # no two alike but the base's
    found = [generated(pipe, genai.AdapterConfig([(one[1], weight) for one, weight in given])) for given in asked]
    assert found == answers


def test_a_fused_adapter_is_the_merged_model(tmp_path):
    base = base_in(tmp_path, "llama")
    exported(base, tmp_path)
    vectors, held = adapter(base, tmp_path / "a", SEEDS[0])
    config = genai.AdapterConfig(held, 0.5, genai.AdapterConfig.Mode.MODE_FUSE)
    assert generated(pipeline(tmp_path, config)) == wanted(base, (vectors, 0.5)) != wanted(base)


def test_without_names_of_modules_it_generates_what_the_base_does(tmp_path, capfd):
    """Why the documents give the products names: GenAI goes by them, and only warns."""
    base = base_in(tmp_path, "llama")
    exported(base, tmp_path, named=False)
    vectors, held = adapter(base, tmp_path / "a", SEEDS[0])
    found = generated(pipeline(tmp_path, genai.AdapterConfig(held)))
    assert found == wanted(base) != wanted(base, (vectors, 1.0))
    assert capfd.readouterr().err.count("Unused LoRA tensor") >= len(vectors)
