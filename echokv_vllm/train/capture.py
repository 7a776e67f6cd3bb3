"""Reads every attention layer's Q, K and V out of a Hugging Face model while it runs.

The model's own attention is replaced, through transformers' attention registry, by a function that
shows the tensors to a callback and then computes the same SDPA attention. Nothing is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

AttentionCallback = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with the layer index and `query [batch, num_heads, len, head_dim]`, `key` and
`value [batch, num_kv_heads, len, head_dim]`: after RoPE, KV heads not repeated. The tensors belong
to the model's forward pass; a callback that keeps them must copy what it needs."""

_NAME = "echokv_capture"
# Attention functions are registered by name for the whole process, so the callback of a model is
# found through the attention module that calls.
_callbacks: WeakKeyDictionary[nn.Module, AttentionCallback] = WeakKeyDictionary()


class ActivationError(ValueError):
    """NaN or infinite keys, values or next-token scores in a model's forward pass."""


def check_scores(log_probability: torch.Tensor, dtype: torch.dtype) -> None:
    """Look at what comes behind the last attention, where no layer's keys and values show it.

    Args:
        log_probability: Logarithm of the next-token distribution of the model as it is.
        dtype: Of the model.

    Raises:
        ActivationError: If a score is not finite.
    """
    if log_probability.isnan().any():
        raise ActivationError(
            f"the model's next-token scores hold NaN or infinite numbers in {dtype}; try dtype "
            "float32, and if that does not help, check the model's weights"
        )


def check_supported(hf_config: Any) -> None:
    """Refuse models whose cache EchoKV cannot describe.

    Raises:
        ValueError: If the architecture is not supported, the weights are quantized or a sliding
            window is active.
    """
    architecture = (getattr(hf_config, "architectures", None) or ["none"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r} is not supported; allowed are "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    _check_unquantized(hf_config)
    window = getattr(hf_config, "sliding_window", None)
    if window is None or getattr(hf_config, "use_sliding_window", True) is False:
        return
    layer_types = getattr(hf_config, "layer_types", None)
    if layer_types is not None:
        active = "sliding_attention" in layer_types
    else:
        active = window < hf_config.max_position_embeddings
    if active:
        raise ValueError(
            f"the model uses sliding_window={window}, but EchoKV supports full attention only; "
            "use a model whose config has no sliding window"
        )


def _check_unquantized(hf_config: Any) -> None:
    """Quantized projections are packed or scaled integers of other names, if they load at all."""
    for name in ("quantization_config", "compression_config"):
        settings = getattr(hf_config, name, None)
        if not settings:
            continue
        if not isinstance(settings, Mapping):  # transformers has a class for each method
            settings = settings.to_dict()
        raise ValueError(
            f"the model's weights are quantized ({name} with "
            f"quant_method={settings.get('quant_method')!r}), but maps are trained and measured "
            "on unquantized weights (float32, bfloat16, float16) only; use the unquantized base "
            "model"
        )


def check_rotary(model: Any, rotary: Rotary) -> None:
    """Make sure that the model rotates its keys the way EchoKV believes it does.

    Raises:
        ValueError: If the frequencies differ.
    """
    own = model.get_decoder().rotary_emb.inv_freq.detach().float().cpu()
    expected = rotary.inv_freq.cpu()
    if own.shape != expected.shape or not torch.allclose(own, expected, rtol=1e-6, atol=0):
        raise ValueError(
            f"the model rotates {2 * own.numel()} of {rotary.head_dim} numbers per head with "
            f"frequencies {own[:3].tolist()}..., but its config implies {rotary.rotary_dim} with "
            f"{expected[:3].tolist()}...; the config's RoPE settings are not supported"
        )


@contextmanager
def captured_attention(
    model: Any, callback: AttentionCallback, check: bool = True
) -> Iterator[None]:
    """Show the Q, K and V of every attention layer to `callback` while the context is open.

    Args:
        model: One of `SUPPORTED_ARCHITECTURES`, not captured already.
        callback: See `AttentionCallback`; called once per layer and forward pass, in layer order.
        check: Make sure that keys and values are finite.

    Raises:
        ActivationError: From the forward pass, if a layer's keys or values are not finite.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
    modules = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "k_proj")
    ]
    expected = model.config.num_hidden_layers
    assert len(modules) == expected, f"{len(modules)} attention modules in {expected} layers"
    assert modules[0] not in _callbacks, "the model's attention is captured already"
    previous = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    for module in modules:
        _callbacks[module] = _checked(callback) if check else callback
    try:
        yield
    finally:
        for module in modules:
            del _callbacks[module]
        model.set_attn_implementation(previous)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of the registry; same arguments and result as transformers' SDPA."""
    from transformers import AttentionInterface

    layer = int(module.layer_idx)  # type: ignore[arg-type]
    _callbacks[module](layer, query, key, value)
    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _checked(callback: AttentionCallback) -> AttentionCallback:
    def call(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        for name, tensor in (("keys", key), ("values", value)):
            if not torch.isfinite(tensor).all():
                raise ActivationError(
                    f"layer {layer}: the model's {name} hold NaN or infinite numbers in "
                    f"{tensor.dtype}; try dtype float32, and if that does not help, check the "
                    "model's weights"
                )
        callback(layer, query, key, value)

    return call
