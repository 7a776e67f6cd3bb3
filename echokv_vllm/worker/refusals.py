"""Start-up checks: what EchoKV does not serve yet is refused with a sentence, not attempted."""

from __future__ import annotations

from typing import Any

import torch

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
# Drafts that own no KV cache write no pages that would escape the stamps. Not ngram_gpu, which is
# for scheduling ahead of the drafts' verdict: see `_check_drafts`.
_SERVED_DRAFTS = ("ngram", "suffix")
# Its loader does not tell attention layers that the weights are there.
_UNSERVED_LOAD_FORMAT = "tensorizer"


class UnsupportedModelError(ValueError):
    """A model or a vLLM feature that EchoKV does not serve."""


def _refuse(what: str, way_out: str) -> None:
    raise UnsupportedModelError(
        f"EchoKV does not support {what}. {way_out} or use another --attention-backend."
    )


def check_vllm_config(vllm_config: Any) -> None:
    """Refuses models and features by the server's configuration, before weights are loaded.

    Raises:
        UnsupportedModelError: The first thing found that is not supported.
    """
    model = vllm_config.model_config
    architectures = list(getattr(model.hf_config, "architectures", None) or [])
    if getattr(model, "is_encoder_decoder", False):
        _refuse(f"encoder-decoder models ({architectures})", "Serve a decoder-only model")
    if not set(architectures) & set(SUPPORTED_ARCHITECTURES):
        _refuse(
            f"the model family {', '.join(architectures) or 'without a name'}",
            f"Serve one of {', '.join(SUPPORTED_ARCHITECTURES)}",
        )
    _check_drafts(vllm_config)
    if vllm_config.kv_transfer_config is not None:
        connector = vllm_config.kv_transfer_config.kv_connector
        _refuse(f"KV connectors ({connector})", "Leave --kv-transfer-config out")
    _check_parallel(vllm_config.parallel_config)
    if model.enable_sleep_mode:
        # Level 2 keeps no weights, and what vLLM loads again on waking up are the model's only.
        _refuse(
            "sleep mode (enable_sleep_mode=True), after which its maps would be lost",
            "Leave --enable-sleep-mode out",
        )
    if _has_rust_frontend():
        # Modes are checked, and metrics shown, by what it takes the place of. A mode that does not
        # exist would reach the scheduler and end the server.
        _refuse("vLLM's front end in Rust (VLLM_USE_RUST_FRONTEND)", "Unset that variable")
    if vllm_config.load_config.load_format == _UNSERVED_LOAD_FORMAT:
        _refuse(f"--load-format {_UNSERVED_LOAD_FORMAT}", "Leave --load-format at auto")


def _has_rust_frontend() -> bool:
    from vllm import envs

    return bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))


def _check_drafts(vllm_config: Any) -> None:
    if vllm_config.speculative_config is None:
        return
    method = vllm_config.speculative_config.method
    if method not in _SERVED_DRAFTS:
        _refuse(
            f"speculative decoding with a draft model or on the GPU (method {method!r})",
            f"Use one of {', '.join(_SERVED_DRAFTS)}",
        )
    if vllm_config.scheduler_config.async_scheduling:
        # vLLM then bounds lengths as if all drafts were accepted, but where a prompt chunk ends
        # must be known on the host (`compat.host_seq_lens`). 0.31 and 0.32 turn it off for the
        # methods served; 0.33 with Model Runner V2 leaves it on for ngram.
        _refuse(
            f"asynchronous scheduling together with speculative decoding (method {method!r})",
            "Add --no-async-scheduling",
        )


def _check_parallel(parallel: Any) -> None:
    for name, label in (
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        size = getattr(parallel, name, 1)
        if size > 1:
            _refuse(f"{label} ({name}={size})", f"Set {name} to 1")
    if getattr(parallel, "use_ubatching", False):
        _refuse("dual batch overlap (--enable-dbo)", "Leave --enable-dbo out")


def check_loaded(layer_names: list[str], load_format: str) -> None:
    """Refuses to go on with a model whose loader left out what EchoKV relies on.

    Args:
        layer_names: The layers that have their roles.
        load_format: The server's.

    Raises:
        UnsupportedModelError: No layer has one.
    """
    if not layer_names:
        raise UnsupportedModelError(
            f"The loader of --load-format {load_format} did not call "
            "process_weights_after_loading of the attention layers, where EchoKV decides which "
            "layer stores which heads. Use --load-format auto or another --attention-backend."
        )


def check_attention_type(config: Any) -> None:
    """Refuses attention variants by vLLM's selector config, on platforms that do not ask the
    backend themselves."""
    if config.use_mla:
        _refuse("multi-head latent attention (MLA)", "Serve a model with grouped-query attention")
    if config.use_sparse:
        _refuse("sparse attention", "Serve a dense model")


def check_layer(
    *,
    sliding_window: int | None,
    alibi_slopes: Any,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target: str | None,
    kv_cache_dtype: str,
    extra: dict[str, Any],
) -> None:
    """Refuses an attention layer by the arguments vLLM builds it with.

    Raises:
        UnsupportedModelError: The first argument that is not supported.
    """
    if sliding_window is not None:
        _refuse(
            f"sliding-window attention (window {sliding_window})", "Serve a full-attention model"
        )
    if alibi_slopes is not None:
        _refuse("ALiBi position biases", "Serve a model with rotary positions")
    if logits_soft_cap:
        _refuse(f"attention logit soft-capping ({logits_soft_cap})", "Serve a model without it")
    if attn_type != "decoder":
        _refuse(f"attention of type {attn_type!r}", "Serve a decoder-only model")
    if kv_sharing_target is not None:
        _refuse("layers that share another layer's KV cache", "Serve a model without KV sharing")
    if kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        _refuse(f"--kv-cache-dtype {kv_cache_dtype}", "Leave --kv-cache-dtype at auto")
    given = sorted(name for name, value in extra.items() if value is not None)
    if given:
        _refuse(f"the attention options {', '.join(given)}", "Serve a model without them")


def check_cache_dtype(kv_cache_dtype: str, dtype: torch.dtype) -> None:
    """Refuses a cache of another dtype than the model's where kernels multiply the two.

    The portable path converts; FlashAttention and the kernels of the GPU path take one dtype.

    Raises:
        UnsupportedModelError: They differ.
    """
    model_dtype = str(dtype).removeprefix("torch.")
    if kv_cache_dtype not in ("auto", model_dtype):
        _refuse(
            f"--kv-cache-dtype {kv_cache_dtype} on a GPU for a model in {model_dtype}",
            "Leave --kv-cache-dtype at auto",
        )
