"""Rotary settings: every static type equals the model's own, everything else is refused."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from echokv_vllm.rope import head_dim_of, normalized_rope, rotary_from_config

_TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}


def _config(parameters, **settings):
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 5e5, **parameters},
        **settings,
    )


@pytest.mark.parametrize("rope_type", _TYPES)
def test_frequencies_equal_the_models_own(rope_type):
    config = _config(_TYPES[rope_type])
    rotary = rotary_from_config(config)
    assert rotary.head_dim == 16 and rotary.rotary_dim == 16 and not rotary.interleaved
    assert rotary.inv_freq.dtype == torch.float32
    torch.testing.assert_close(
        rotary.inv_freq, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-7, atol=0
    )
    assert normalized_rope(config)["rope_type"] == rope_type


def test_scaled_types_differ_from_the_default():
    default = rotary_from_config(_config(_TYPES["default"])).inv_freq
    for rope_type in ("linear", "llama3", "yarn"):
        scaled = rotary_from_config(_config(_TYPES[rope_type])).inv_freq
        assert not torch.allclose(default, scaled), rope_type


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "mrope"])
def test_changing_frequencies_are_refused(rope_type):
    config = SimpleNamespace(
        rope_parameters={"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4},
        hidden_size=64,
        num_attention_heads=4,
    )
    for function in (rotary_from_config, normalized_rope):
        with pytest.raises(ValueError, match=rf"{rope_type}.*allowed are default, linear"):
            function(config)


def test_old_and_new_config_layouts_agree():
    new = _config(_TYPES["llama3"])
    old = SimpleNamespace(
        rope_theta=500000,
        rope_scaling={
            "type": "llama3",
            **{k: v for k, v in _TYPES["llama3"].items() if k != "rope_type"},
        },
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    assert normalized_rope(old) == normalized_rope(new)
    assert normalized_rope(new) == {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "rotary_dim": 16,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512.0,
    }


def test_missing_parameters_are_named():
    bare = SimpleNamespace(
        rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0},
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    with pytest.raises(ValueError, match=r"\['low_freq_factor', 'high_freq_factor'\]"):
        normalized_rope(bare)
    nested = SimpleNamespace(
        rope_parameters={"full_attention": {"rope_theta": 1e4}, "sliding_attention": {}},
        hidden_size=64,
        num_attention_heads=4,
    )
    with pytest.raises(ValueError, match=r"no rope_theta .*full_attention"):
        normalized_rope(nested)


def test_head_dim_is_read_or_implied():
    assert head_dim_of(_config({}, head_dim=24)) == 24
    assert head_dim_of(SimpleNamespace(hidden_size=64, num_attention_heads=4, head_dim=None)) == 16


def test_partial_rotary_covers_part_of_the_head():
    config = SimpleNamespace(
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        hidden_size=64,
        num_attention_heads=4,
    )
    assert rotary_from_config(config).rotary_dim == 8
    assert normalized_rope(config)["rotary_dim"] == 8
