"""Decoders with each kind of cache: in every mode, with no past, with a window, beside an encoder."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import OnnxRunner, export_onnx, verify
from onelora_compile.testing import fill_vectors

transformers = pytest.importorskip("transformers")
DYNAMIC = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "past + sequence"},
    "past_key_values": {0: "batch", 2: "past"},
}


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2,
        loss_type="ForCausalLMLoss",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def mistral():
    config = transformers.MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=64, max_position_embeddings=64, sliding_window=8,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config)


def adapted(make):
    torch.manual_seed(0)
    return fill_vectors(onelora.adapt(make().eval()))


def tokens(*shape):
    return torch.randint(3, 64, shape)


@torch.no_grad()
def filled(model, cache, batch, past):
    model(input_ids=tokens(batch, past), past_key_values=cache)
    return cache


def step(model, batch, past, sequence, mask=True):
    """A call with `past` tokens in a dynamic cache."""
    cache = filled(model, transformers.DynamicCache(config=model.config), batch, past)
    given = {"input_ids": tokens(batch, sequence), "past_key_values": cache}
    if mask:
        given["attention_mask"] = torch.ones(batch, past + sequence, dtype=torch.long)
        given["attention_mask"][0, 0] = 0
    return given


def names(prefix):
    return [f"{prefix}.{layer}.{part}" for layer in range(2) for part in ("key", "value")]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fold", "input", "load", "bank"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_dynamic_cache_of_any_length(make, mode, tmp_path):
    model = adapted(make)
    given = step(model, 2, 3, 2)
    more: dict[str, Any] = {}
    held = copy.deepcopy(given["past_key_values"])
    if mode == "bank":
        onelora.save_adapter(model, tmp_path / "a.safetensors")
        more["bank"] = [tmp_path / "a.safetensors"]
    export_onnx(model, (), tmp_path / "m.onnx", given, adapters=mode, dynamic_shapes=DYNAMIC, **more)
    for before, after in zip(held.layers, given["past_key_values"].layers, strict=True):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)
    runner = OnnxRunner(tmp_path / "m.onnx")
    if mode == "bank":
        runner.use(0)
    assert sorted(runner.input_names) == sorted(["input_ids", "attention_mask", *names("past_key_values")])
    assert runner.output_names == ["logits", *names("present")]
    shapes = {one.name: one.shape for one in (*runner.session.get_inputs(), *runner.session.get_outputs())}
    assert shapes["past_key_values.1.value"][::2] == ["batch", "past"]
    assert shapes["present.1.value"][::2] == ["batch", "past + sequence"]
    for size in ((1, 1, 1), (3, 7, 1), (2, 5, 4)):
        assert verify(runner, model, (), step(model, *size)).passed, size
    # The first call has no past, and feeds what it returns into the next.
    empty = {name: np.zeros([2, shapes[name][1], 0, shapes[name][3]], np.float32) for name in names("past_key_values")}
    ids = tokens(2, 6)
    first = runner.run({"input_ids": ids[:, :4], "attention_mask": np.ones((2, 4), np.int64), **empty})
    past = dict(zip(names("past_key_values"), first[1:], strict=True))
    second = runner.run({"input_ids": ids[:, 4:], "attention_mask": np.ones((2, 6), np.int64), **past})
    with torch.no_grad():
        whole = model(input_ids=ids).logits
    torch.testing.assert_close(
        torch.cat([torch.tensor(first[0]), torch.tensor(second[0])], 1), whole, atol=1e-5, rtol=0
    )


def test_a_static_cache(tmp_path):
    model = adapted(llama)

    def call(batch, past):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        return {"input_ids": tokens(batch, 1), "past_key_values": filled(model, cache, batch, past)}

    given = call(2, 3)
    held = copy.deepcopy(given["past_key_values"])
    export_onnx(model, (), tmp_path / "m.onnx", given, dynamic_shapes="batch")
    for before, after in zip(held.layers, given["past_key_values"].layers, strict=True):
        assert torch.equal(before.keys, after.keys)
        assert int(before.cumulative_length) == int(after.cumulative_length) == 3
    runner = OnnxRunner(tmp_path / "m.onnx")
    assert set(names("past_key_values")) < set(runner.input_names)
    assert set(names("present")) < set(runner.output_names)
    for size in ((2, 3), (3, 9), (1, 1)):
        assert verify(runner, model, (), call(*size)).passed, size


@pytest.mark.slow
def test_a_first_call_and_one_token_at_a_time(tmp_path):
    """An empty cache, one token, a batch of one, no mask."""
    model = adapted(llama)
    empty = transformers.DynamicCache(config=model.config)
    shapes = {"*": "batch", "input_ids": {1: "sequence"}}
    export_onnx(
        model, (), tmp_path / "m.onnx", {"input_ids": tokens(1, 4), "past_key_values": empty}, dynamic_shapes=shapes
    )
    assert empty.get_seq_length() == 0
    runner = OnnxRunner(tmp_path / "m.onnx")
    assert (runner.input_names, runner.output_names) == (["input_ids"], ["logits", *names("present")])
    for size in ((1, 4), (3, 7)):
        assert verify(runner, model, (), {"input_ids": tokens(*size), "use_cache": True}).passed
    shapes = {"*": "batch", "past_key_values": {2: "past"}}
    export_onnx(model, (), tmp_path / "m.onnx", step(model, 1, 3, 1, mask=False), dynamic_shapes=shapes)
    for lengths in ((1, 4, 1), (3, 7, 1)):
        assert verify(tmp_path / "m.onnx", model, (), step(model, *lengths, mask=False)).passed


@pytest.mark.slow
def test_an_encoder_decoder(tmp_path):
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=64,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = adapted(lambda: transformers.T5ForConditionalGeneration(config))

    def call(batch, past, source):
        with torch.no_grad():
            out = model(input_ids=tokens(batch, source), decoder_input_ids=tokens(batch, past), use_cache=True)
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        return {
            "encoder_outputs": encoded,
            "decoder_input_ids": tokens(batch, 1),
            "past_key_values": out.past_key_values,
        }

    shapes = {
        "*": "batch",
        "encoder_outputs": {1: "source"},
        **{f"past_key_values.{i}.decoder": {2: "past"} for i in range(2)},
        **{f"past_key_values.{i}.encoder": {2: "source"} for i in range(2)},
    }
    export_onnx(model, (), tmp_path / "m.onnx", call(2, 3, 5), dynamic_shapes=shapes)
    runner = OnnxRunner(tmp_path / "m.onnx")
    assert "past_key_values.1.encoder.key" in runner.input_names
    assert "present.1.decoder.value" in runner.output_names
    for size in ((2, 3, 5), (3, 6, 4), (1, 1, 7)):
        assert verify(runner, model, (), call(*size)).passed


@pytest.mark.slow
def test_a_sliding_window(tmp_path):
    """Its layers count tokens in Python: right inside the window, refused beyond it."""
    model = adapted(mistral)
    shapes = {"*": "batch", "past_key_values": {2: "past"}}
    with pytest.raises(ExportError, match=r"layer 0 of the cache 'past_key_values' .* counts its tokens as a Python"):
        export_onnx(model, (), tmp_path / "m.onnx", step(model, 2, 12, 1, mask=False), dynamic_shapes=shapes)
    assert not (tmp_path / "m.onnx").exists()
    export_onnx(model, (), tmp_path / "m.onnx", step(model, 2, 3, 1, mask=False), dynamic_shapes=shapes)
    for size in ((2, 3, 1), (1, 6, 1)):
        assert verify(tmp_path / "m.onnx", model, (), step(model, *size, mask=False)).passed
