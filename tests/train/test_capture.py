"""Capturing attention tensors: equal to a plain forward, and refusals."""

import pytest
import torch
from transformers import BitsAndBytesConfig

from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.capture import (
    ActivationError,
    captured_attention,
    check_rotary,
    check_supported,
)

ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def _ids(num_sequences=2, length=19):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (num_sequences, length), generator=generator)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_capture_equals_a_plain_forward(tiny_model, architecture):
    model = tiny_model(architecture)
    plain = model(_ids(), use_cache=True)
    seen = {}

    def keep(layer, query, key, value):
        assert layer not in seen
        seen[layer] = (query.clone(), key.clone(), value.clone())

    with captured_attention(model, keep):
        logits = model(_ids(), use_cache=False).logits
    assert torch.equal(logits, plain.logits)
    assert list(seen) == [0, 1, 2]
    for layer, (query, key, value) in seen.items():
        assert query.shape == (2, 8, 19, 8) and key.shape == value.shape == (2, 4, 19, 8)
        # The cache holds keys after RoPE, KV heads not repeated.
        torch.testing.assert_close(key, plain.past_key_values.layers[layer].keys)
        torch.testing.assert_close(value, plain.past_key_values.layers[layer].values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_captured_queries_give_the_attention_output(tiny_model, architecture):
    model = tiny_model(architecture)
    outputs, inputs = {}, {}

    def attend(layer, query, key, value):
        outputs[layer] = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    for layer, block in enumerate(model.model.layers):
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, layer=layer: inputs.update({layer: args[0]})
        )
    with captured_attention(model, attend):
        model(_ids())
    for layer, output in outputs.items():
        torch.testing.assert_close(output.transpose(1, 2).flatten(2), inputs[layer])


@torch.inference_mode()
def test_model_is_restored_and_models_do_not_mix(tiny_model):
    first, second = tiny_model(), tiny_model("Mistral", num_layers=2)
    before = first(_ids()).logits
    calls = []
    with (
        captured_attention(first, lambda layer, *_: calls.append(("first", layer))),
        captured_attention(second, lambda layer, *_: calls.append(("second", layer))),
    ):
        second(_ids())
        first(_ids())
    assert calls == [("second", 0), ("second", 1), ("first", 0), ("first", 1), ("first", 2)]
    assert first.config._attn_implementation == "sdpa"
    calls.clear()
    assert torch.equal(first(_ids()).logits, before) and calls == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@torch.inference_mode()
def test_activations_that_are_not_finite_name_the_layer(tiny_model, bad):
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.weight[3, 2] = bad
    with (
        pytest.raises(ActivationError, match=r"layer 1: .*values hold NaN.*float32"),
        captured_attention(model, lambda *_: None),
    ):
        model(_ids())
    assert model.config._attn_implementation == "sdpa"


def test_architectures_are_checked(tiny_model):
    for architecture in ARCHITECTURES:
        config = tiny_model(architecture).config
        config.architectures = [f"{architecture}ForCausalLM"]
        check_supported(config)
    config.architectures = ["Gemma3ForCausalLM"]
    with pytest.raises(ValueError, match=r"Gemma3ForCausalLM.*allowed are LlamaForCausalLM"):
        check_supported(config)
    config.architectures = None
    with pytest.raises(ValueError, match="'none' is not supported"):
        check_supported(config)


@pytest.mark.parametrize(
    ("name", "settings", "method"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "'awq'"),
        ("quantization_config", {"quant_method": "fp8"}, "'fp8'"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ("quantization_config", BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes"),
        ("compression_config", {"format": "pack-quantized"}, "None"),
    ],
)
def test_quantized_weights_are_refused(tiny_model, name, settings, method):
    config = tiny_model().config
    config.architectures = ["LlamaForCausalLM"]
    setattr(config, name, None)
    check_supported(config)
    setattr(config, name, settings)
    with pytest.raises(ValueError, match=rf"{name} with quant_method=.*use the unquant") as caught:
        check_supported(config)
    assert method in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "settings", "active"),
    [
        ("Mistral", {"sliding_window": 64}, True),
        ("Mistral", {"sliding_window": 256}, False),  # the whole context
        ("Mistral", {"sliding_window": None}, False),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 64}, False),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            True,
        ),
        (
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            True,
        ),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 9},
            False,
        ),
    ],
)
def test_active_sliding_windows_are_refused(tiny_model, architecture, settings, active):
    config = tiny_model(architecture, **settings).config
    config.architectures = [f"{architecture}ForCausalLM"]
    if active:
        with pytest.raises(ValueError, match="sliding_window=64"):
            check_supported(config)
    else:
        check_supported(config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e4,
        },
    ],
)
def test_rotary_must_be_the_models_own(tiny_model, rope):
    model = tiny_model(rope_parameters=rope)
    rotary = rotary_from_config(model.config)
    check_rotary(model, rotary)
    other = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    with pytest.raises(ValueError, match="frequencies"):
        check_rotary(other, rotary)
