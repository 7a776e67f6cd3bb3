"""The tokens that fit grow by the plan's factor: as vLLM reports them, and as they really run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine, generate, residual_manager, scheduler_of
from recording import Load, kv_cache_bytes, watched_load

from echokv_kernels.layout import PageLayout, PlanLayout
from echokv_vllm.checkpoint import EchoCheckpoint

MAX_LEN = 16384
LONG = 4000  # tokens of one long request
FULL_REQUESTS = 12  # how many of them fit in full mode

pytestmark = pytest.mark.slow


def small_model(model_of: Callable[..., Path], num_layers: int, num_kv_heads: int = 2) -> Path:
    """A model whose attention over thousands of tokens is cheap."""
    return model_of(
        num_layers=num_layers, num_kv_heads=num_kv_heads, num_attention_heads=num_kv_heads,
        head_dim=16, hidden_size=64, intermediate_size=64, max_len=MAX_LEN,
    )  # fmt: skip


def reported_tokens(model: Path, checkpoint: Path, mode: str) -> int:
    """Capacity in vLLM's own start-up report (log line, /metrics)."""
    with engine(
        model, checkpoint, {"mode": mode}, num_gpu_blocks_override=6000, max_model_len=MAX_LEN
    ) as llm:
        return int(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)


@pytest.mark.parametrize(("plan", "num_layers", "num_kv_heads"), [
    ("local-0.5", 2, 2), ("paper-0.5", 2, 2), ("paper-0.3", 5, 8),
])  # fmt: skip
def test_reported_capacity_grows_by_the_factor_of_the_plan(
    plan: str, num_layers: int, num_kv_heads: int,
    model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
) -> None:  # fmt: skip
    model = small_model(model_of, num_layers, num_kv_heads)
    folder = checkpoint_of(model, plan)
    factor = 1 / EchoCheckpoint.load(folder).plan.ratio
    full, auto, compressed = (
        reported_tokens(model, folder, mode) for mode in ("full", "auto", "compressed")
    )
    print(plan, full, compressed, compressed / full, factor)
    assert auto == compressed
    assert compressed / full == pytest.approx(factor, rel=0.05)


def run_long_requests(
    model: Path, checkpoint: Path, mode: str, prompt_of: Callable[..., list[int]]
) -> tuple[Load, Any]:
    """26 requests of 4,000 tokens against a pool that holds 12 in full mode."""
    pages = FULL_REQUESTS * 2 * -(-(LONG + 48) // 16) + 1
    with (
        engine(
            model, checkpoint, {"mode": mode}, num_gpu_blocks_override=pages,
            max_model_len=LONG + 96, max_num_batched_tokens=4096, max_num_seqs=64,
            enable_prefix_caching=False,
        ) as llm,
        watched_load(llm) as load,
    ):  # fmt: skip
        outputs = generate(llm, [prompt_of(LONG, i) for i in range(26)], max_tokens=48)
        assert all(len(output.outputs[0].token_ids) == 48 for output in outputs)
        pool = scheduler_of(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pages - 1
        return load, residual_manager(llm).counters


@pytest.fixture(scope="module")
def full_load(
    model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompt_of: Callable[..., list[int]],
) -> Load:  # fmt: skip
    """The same requests in mode full."""
    model = small_model(model_of, 1)
    load, _ = run_long_requests(model, checkpoint_of(model), "full", prompt_of)
    assert load.peak_requests == FULL_REQUESTS and load.num_preemptions == 0
    return load


@pytest.mark.parametrize("mode", ["compressed", pytest.param("auto", marks=pytest.mark.nightly)])
def test_running_requests_reach_the_factor_of_the_plan(
    mode: str, full_load: Load, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompt_of: Callable[..., list[int]],
) -> None:  # fmt: skip
    model = small_model(model_of, 1)
    load, counters = run_long_requests(model, checkpoint_of(model), mode, prompt_of)
    print(full_load, load)
    assert load.peak_tokens / full_load.peak_tokens == pytest.approx(2.0, rel=0.05)
    assert load.num_preemptions == 0
    assert counters.pages_dropped > 0 if mode == "auto" else counters.window_pages_dropped > 0


@pytest.mark.parametrize(("plan", "num_layers"), [
    ("local-0.5", 4), ("paper-0.5", 5), ("paper-0.3", 5),
])  # fmt: skip
def test_page_bytes_of_the_specs_are_the_bytes_allocated(
    plan: str, num_layers: int, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path]
) -> None:
    """Specs, tensors and ``echokv_kernels.layout`` agree on every page and on the whole pool."""
    num_blocks, head_dim = 100, 32
    model = model_of(num_layers=num_layers)
    folder = checkpoint_of(model, plan)
    echo_plan = EchoCheckpoint.load(folder).plan
    with engine(
        model, folder, num_gpu_blocks_override=num_blocks, max_model_len=512, dtype="bfloat16"
    ) as llm:
        # The worker's, not the scheduler's: that one keeps one spec of a group of unlike layers.
        config = llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_cache_config
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        num_bytes = kv_cache_bytes(llm)
        specs = {
            name: (group.kv_cache_spec, context[name].kv_cache)
            for group in config.kv_cache_groups
            for name in group.layer_names
        }
    group_bytes: dict[str, int] = {}
    slots: dict[str, int] = {}
    for name, (group_spec, cache) in specs.items():
        spec = getattr(group_spec, "kv_cache_specs", {}).get(name, group_spec)
        layout = PageLayout(spec.num_kv_heads, head_dim, spec.block_size, 2)
        assert spec.dtype == cache.dtype == torch.bfloat16
        assert spec.page_size_bytes == layout.page_bytes == cache[0].numel() * 2
        assert tuple(cache.shape) == layout.view_shape(num_blocks)
        assert cache[0].is_contiguous()
        kind = type(spec).__name__
        group_bytes[kind] = group_bytes.get(kind, 0) + layout.page_bytes
        slots[kind] = slots.get(kind, 0) + spec.num_kv_heads
    assert sorted(slots) == ["EchoResidualSpec", "EchoRetainedSpec"]
    plan_layout = PlanLayout(tuple(len(x.retained) for x in echo_plan.layers), 4, head_dim, 2)
    assert slots["EchoRetainedSpec"] == plan_layout.retained_slots
    assert slots["EchoResidualSpec"] == plan_layout.residual_slots
    # One pool: a block is the larger group's row, and both groups use the same memory.
    block_bytes = max(group_bytes.values())
    assert {cache.stride(0) * 2 for _, cache in specs.values()} == {block_bytes}
    assert num_bytes == num_blocks * block_bytes
    assert min(group_bytes.values()) / block_bytes > 0.9, "the two groups' rows are far apart"
