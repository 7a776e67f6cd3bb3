"""Rotary position embedding of a Hugging Face config, as EchoKV needs it.

EchoKV moves a known rotation between keys and queries, so it must know the model's rotary
frequencies exactly. Only scalings whose frequencies never change while serving qualify.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary

# Parameters that define each static type; anything else in a config does not change the angles
# or the scale of the cached keys.
_TYPE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}

SUPPORTED_ROPE_TYPES: tuple[str, ...] = tuple(_TYPE_PARAMETERS)
"""Rotary types whose frequencies are fixed for every request."""


def head_dim_of(hf_config: Any) -> int:
    """Head dimension of a Hugging Face config, given or implied by the hidden size."""
    explicit = getattr(hf_config, "head_dim", None)
    return int(explicit or hf_config.hidden_size // hf_config.num_attention_heads)


def normalized_rope(hf_config: Any) -> dict[str, Any]:
    """Reduce a config's rotary settings to the few values that define the cached keys.

    Old configs (`rope_theta` beside `rope_scaling`) and new ones (`rope_parameters`) of the same
    model give the same result.

    Returns:
        JSON-able dict with `rope_type`, `rope_theta`, `rotary_dim` and the parameters of the type.

    Raises:
        ValueError: If the type is not static, a parameter is missing, or the config has none.
    """
    parameters = dict(
        getattr(hf_config, "rope_parameters", None)
        or getattr(hf_config, "rope_scaling", None)
        or {}
    )
    theta = parameters.get("rope_theta") or getattr(hf_config, "rope_theta", None)
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in _TYPE_PARAMETERS:
        raise ValueError(
            f"rotary type {rope_type!r} is not supported: its frequencies may change between "
            f"requests; allowed are {', '.join(SUPPORTED_ROPE_TYPES)}; set another rope_type in "
            "the model's config or serve the model without EchoKV"
        )
    if theta is None:
        nested = sorted(key for key, value in parameters.items() if isinstance(value, dict))
        raise ValueError(
            f"the model's config has no rope_theta (per-layer settings: {nested or 'none'}); "
            "EchoKV needs one rotary embedding for all layers"
        )
    partial = parameters.get("partial_rotary_factor")
    if partial is None:
        partial = getattr(hf_config, "partial_rotary_factor", None)
    head_dim = head_dim_of(hf_config)
    result: dict[str, Any] = {
        "rope_type": rope_type,
        "rope_theta": float(theta),
        "rotary_dim": head_dim if partial is None else int(head_dim * partial),
    }
    for key in _TYPE_PARAMETERS[rope_type]:
        value = parameters.get(key)
        if value is None and key == "original_max_position_embeddings":
            value = getattr(hf_config, key, None) or hf_config.max_position_embeddings
        if value is not None:
            # Configs write the same number as 8 or 8.0.
            result[key] = value if isinstance(value, bool) else float(value)
    missing = [key for key in ("factor",) if rope_type != "default" and key not in result]
    if rope_type == "llama3":
        missing += [key for key in ("low_freq_factor", "high_freq_factor") if key not in result]
    if missing:
        raise ValueError(f"rotary type {rope_type!r} lacks {missing} in the model's config")
    return result


def rotary_from_config(hf_config: Any) -> Rotary:
    """Build the rotary embedding of a model, on the CPU.

    The layout is half-split, which is what Hugging Face uses for every architecture EchoKV
    supports. A scale on cos and sin (yarn's attention factor) is left out on purpose: it is a
    constant factor of the cached keys and commutes with every rotation.

    Raises:
        ValueError: If the rotary type is not static (see `normalized_rope`).
    """
    import torch

    from echokv_kernels.rotary import Rotary

    rope = normalized_rope(hf_config)
    if rope["rope_type"] == "default":
        rotary_dim = rope["rotary_dim"]
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
        inv_freq = 1.0 / rope["rope_theta"] ** exponents
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        init = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        inv_freq, _ = init(hf_config, torch.device("cpu"))
    return Rotary(inv_freq=inv_freq.to(torch.float32), head_dim=head_dim_of(hf_config))
