"""How long a request pinned to full mode may become."""

from types import SimpleNamespace

import pytest
import torch

from echokv_vllm import compat
from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.config import EchoConfigError
from echokv_vllm.limits import FullModeLimit, full_mode_limit


@pytest.mark.parametrize(("retained", "residual"), [(16, 16), (48, 80), (64, 48), (32, 16)])
@pytest.mark.parametrize("num_pages", [2, 3, 53, 1000])
def test_the_longest_request_fills_the_pool_and_one_more_token_does_not_fit(
    retained: int, residual: int, num_pages: int
) -> None:
    limit = FullModeLimit(retained, residual, num_pages)
    assert limit.pages(limit.max_tokens) <= num_pages < limit.pages(limit.max_tokens + 1)


def test_pages_are_those_of_both_groups() -> None:
    assert FullModeLimit(64, 48, 10).pages(65) == 2 + 2
    assert FullModeLimit(16, 16, 10).pages(16) == 1 + 1


def test_a_request_that_can_outgrow_the_pool_is_refused() -> None:
    limit = FullModeLimit(16, 16, 53)
    limit.check(400, 16, 512)
    with pytest.raises(EchoConfigError, match=r"may reach 480 tokens.*holds 416 tokens.*auto"):
        limit.check(400, 80, 512)


@pytest.mark.parametrize("given", ["tokens", "embeddings"])
def test_prompts_of_either_form_count(given: str) -> None:
    """An uncounted prompt would wait for ever, at the head of the queue."""
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))
    request = SimpleNamespace(
        prompt_token_ids=[1] * 410 if given == "tokens" else None,
        prompt_embeds=None if given == "tokens" else torch.zeros(410, 8),
        sampling_params=SimpleNamespace(max_tokens=8),
    )
    with pytest.raises(EchoConfigError, match="prompt 410, max_tokens 8"):
        compat._check_length(config, {"limit": FullModeLimit(16, 16, 53)}, request)


def test_the_model_length_bounds_what_a_request_can_reach() -> None:
    FullModeLimit(16, 16, 53).check(400, 10_000, 410)


@pytest.mark.parametrize(
    ("size", "local", "local_only", "num_summed"),
    [(1, 1, False, 1), (4, 4, False, 4), (8, 2, True, 2), (4, 1, True, 1), (8, 2, False, 8)],
)
def test_the_pool_is_that_of_one_engine(
    monkeypatch: pytest.MonkeyPatch, size: int, local: int, local_only: bool, num_summed: int
) -> None:
    """vLLM's clients add up the pools of the engines they manage: all, or those of their host."""
    checkpoint = SimpleNamespace(
        plan=SimpleNamespace(layers=[SimpleNamespace(retained=[0, 1])] * 4, num_kv_heads=4),
        fingerprint=SimpleNamespace(head_dim=64),
    )
    monkeypatch.setattr(EchoCheckpoint, "load", lambda *args: checkpoint)
    config = SimpleNamespace(
        additional_config={"echokv": {"checkpoint": "x"}},
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        cache_config=SimpleNamespace(num_gpu_blocks=1000 * num_summed),
        parallel_config=SimpleNamespace(
            data_parallel_size=size, data_parallel_size_local=local, local_engines_only=local_only
        ),
    )
    assert full_mode_limit(config).num_pages == 999
