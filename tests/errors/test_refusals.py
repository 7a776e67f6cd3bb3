"""Error table, models and vLLM features that EchoKV does not serve.

The checks are functions of vLLM's configuration; they get objects with the fields they read. That
vLLM's own objects have these fields is checked by tests/contract and by every engine test.
"""

from types import SimpleNamespace

import pytest
import torch

from echokv_vllm.worker.refusals import (
    UnsupportedModelError,
    check_attention_type,
    check_cache_dtype,
    check_layer,
    check_loaded,
    check_vllm_config,
)


def vllm_config(
    architectures=("LlamaForCausalLM",), encoder_decoder=False, sleep_mode=False, **changes
):
    values = dict(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=list(architectures)),
            is_encoder_decoder=encoder_decoder,
            enable_sleep_mode=sleep_mode,
        ),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
        scheduler_config=SimpleNamespace(async_scheduling=True),
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
    )
    return SimpleNamespace(**{**values, **changes})


def parallel(**changes):
    return SimpleNamespace(**{**vars(vllm_config().parallel_config), **changes})


CONFIG_ROWS = {
    "family": (
        dict(architectures=["GemmaForCausalLM"]),
        ["the model family GemmaForCausalLM", "Serve one of LlamaForCausalLM"],
    ),
    "no family": (dict(architectures=[]), ["without a name", "Serve one of"]),
    "encoder-decoder": (
        dict(architectures=["T5ForConditionalGeneration"], encoder_decoder=True),
        ["encoder-decoder", "T5ForConditionalGeneration", "decoder-only"],
    ),
    "draft model": (
        dict(speculative_config=SimpleNamespace(method="eagle3")),
        ["draft model or on the GPU (method 'eagle3')", "Use one of ngram, suffix"],
    ),
    "drafts whose verdict comes later": (
        dict(speculative_config=SimpleNamespace(method="ngram_gpu")),
        ["on the GPU (method 'ngram_gpu')", "Use one of ngram, suffix"],
    ),
    "drafts scheduled ahead of their verdict, vLLM 0.33's default": (
        dict(speculative_config=SimpleNamespace(method="ngram")),
        ["asynchronous scheduling together", "(method 'ngram')", "Add --no-async-scheduling"],
    ),
    "KV connector": (
        dict(kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector")),
        ["KV connectors (NixlConnector)", "Leave --kv-transfer-config out"],
    ),
    "DCP": (
        dict(parallel_config=parallel(decode_context_parallel_size=2)),
        ["decode_context_parallel_size=2", "Set decode_context_parallel_size to 1"],
    ),
    "PCP": (
        dict(parallel_config=parallel(prefill_context_parallel_size=4)),
        ["prefill_context_parallel_size=4", "to 1"],
    ),
    "sleep mode": (
        dict(sleep_mode=True),
        ["sleep mode (enable_sleep_mode=True)", "Leave --enable-sleep-mode out"],
    ),
    "tensorizer": (
        dict(load_config=SimpleNamespace(load_format="tensorizer")),
        ["--load-format tensorizer", "Leave --load-format at auto"],
    ),
    "DBO": (
        dict(parallel_config=parallel(use_ubatching=True)),
        ["dual batch overlap", "Leave --enable-dbo out"],
    ),
}


@pytest.mark.parametrize("row", CONFIG_ROWS)
def test_configuration(row):
    changes, fragments = CONFIG_ROWS[row]
    with pytest.raises(UnsupportedModelError) as caught:
        check_vllm_config(vllm_config(**changes))
    for fragment in [*fragments, "or use another --attention-backend"]:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(architectures=["Qwen3ForCausalLM"]),
        dict(
            speculative_config=SimpleNamespace(method="ngram"),
            scheduler_config=SimpleNamespace(async_scheduling=False),
        ),
        dict(parallel_config=SimpleNamespace()),
        dict(load_config=SimpleNamespace(load_format="runai_streamer")),
    ],
)
def test_supported_configurations_pass(changes):
    check_vllm_config(vllm_config(**changes))


LAYER = dict(
    sliding_window=None, alibi_slopes=None, logits_soft_cap=None, attn_type="decoder",
    kv_sharing_target=None, kv_cache_dtype="auto", extra={},
)  # fmt: skip
LAYER_ROWS = {
    "sliding window": (dict(sliding_window=4096), ["window 4096", "full-attention model"]),
    "ALiBi": (dict(alibi_slopes=[0.5]), ["ALiBi", "rotary"]),
    "soft cap": (dict(logits_soft_cap=30.0), ["soft-capping (30.0)"]),
    "encoder layer": (dict(attn_type="encoder_only"), ["'encoder_only'", "decoder-only"]),
    "KV sharing": (dict(kv_sharing_target="layers.0"), ["share another layer's KV cache"]),
    "fp8": (
        dict(kv_cache_dtype="fp8_e4m3"),
        ["--kv-cache-dtype fp8_e4m3", "Leave --kv-cache-dtype at auto"],
    ),
    "sinks": (dict(extra={"sinks": object(), "unused": None}), ["the attention options sinks."]),
}


@pytest.mark.parametrize("row", LAYER_ROWS)
def test_layer(row):
    changes, fragments = LAYER_ROWS[row]
    with pytest.raises(UnsupportedModelError) as caught:
        check_layer(**{**LAYER, **changes})
    for fragment in [*fragments, "or use another --attention-backend"]:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16", "float32"])
def test_plain_layers_pass(dtype):
    check_layer(**{**LAYER, "kv_cache_dtype": dtype, "extra": {"sinks": None}})


def test_front_end_that_checks_no_modes(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    check_vllm_config(vllm_config())
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedModelError, match=r"RUST_FRONTEND.*Unset that variable"):
        check_vllm_config(vllm_config())


def test_cache_dtype_of_gpu_kernels():
    check_cache_dtype("auto", torch.float16)
    check_cache_dtype("float16", torch.float16)
    with pytest.raises(UnsupportedModelError, match=r"--kv-cache-dtype float16 .*bfloat16"):
        check_cache_dtype("float16", torch.bfloat16)


@pytest.mark.parametrize(
    ("field", "fragment"), [("use_mla", "latent attention"), ("use_sparse", "sparse attention")]
)
def test_attention_type(field, fragment):
    selector = SimpleNamespace(use_mla=False, use_sparse=False)
    check_attention_type(selector)
    setattr(selector, field, True)
    with pytest.raises(UnsupportedModelError, match=fragment):
        check_attention_type(selector)


def test_loader_that_leaves_out_attention_layers():
    check_loaded(["model.layers.0.self_attn.attn"], "custom")
    with pytest.raises(UnsupportedModelError) as caught:
        check_loaded([], "custom")
    for fragment in ("--load-format custom", "Use --load-format auto", "--attention-backend"):
        assert fragment in str(caught.value)
