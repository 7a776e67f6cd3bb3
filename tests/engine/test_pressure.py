"""A burst that makes stock vLLM preempt: EchoKV drops residual pages instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import engine, generate, residual_manager, scheduler_of, tokens
from recording import Load, kv_cache_bytes, watched_load

# local-0.5 on 4 layers of 4 heads: a stock block of 32 tokens takes the bytes of 4 EchoKV pages.
STOCK_BLOCKS = 32
STOCK_BLOCK_SIZE = 32
NUM_PAGES = 4 * STOCK_BLOCKS
PROMPT_LEN = 70
NUM_REQUESTS = 8
NUM_TOKENS = 90
PINNED = (1, 4)

pytestmark = pytest.mark.slow


@dataclass
class Burst:
    """Eight requests that arrive together and outgrow the pool.

    Attributes:
        tokens: What each request answered.
        load: The scheduler's load.
        num_bytes: KV cache memory of the engine.
        free_pages: Free pages afterwards.
        usable_pages: Pages of the pool without the null page.
        counters: EchoKV's counters, None for stock vLLM.
    """

    tokens: list[list[int]]
    load: Load
    num_bytes: int
    free_pages: int
    usable_pages: int
    counters: Any = None


def run_burst(
    model: Path, checkpoint: Path | None, prompts: list[list[int]], modes: Any = None,
    **options: Any,
) -> Burst:  # fmt: skip
    """Runs the burst, on stock vLLM without a checkpoint."""
    stock: dict[str, Any] = {"block_size": STOCK_BLOCK_SIZE} if checkpoint is None else {}
    pages = STOCK_BLOCKS if checkpoint is None else NUM_PAGES
    with (
        engine(
            model, checkpoint, options, num_gpu_blocks_override=pages, max_model_len=256,
            enable_prefix_caching=False, **stock,
        ) as llm,
        watched_load(llm) as load,
    ):  # fmt: skip
        outputs = generate(llm, prompts, modes, max_tokens=NUM_TOKENS)
        pool = scheduler_of(llm).kv_cache_manager.block_pool
        return Burst(
            tokens(outputs), load, kv_cache_bytes(llm), pool.get_num_free_blocks(), pages - 1,
            residual_manager(llm).counters if checkpoint else None,
        )  # fmt: skip


@pytest.fixture(scope="module")
def prompts(prompt_of: Callable[..., list[int]]) -> list[list[int]]:
    return [prompt_of(PROMPT_LEN, seed) for seed in range(NUM_REQUESTS)]


@pytest.fixture(scope="module")
def stock(model_of: Callable[..., Path], prompts: list[list[int]]) -> Burst:
    return run_burst(model_of(num_layers=4), None, prompts)


def test_a_burst_that_preempts_in_stock_vllm_runs_without_preemption(
    stock: Burst, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompts: list[list[int]],
) -> None:  # fmt: skip
    model = model_of(num_layers=4)
    modes = ["full" if i in PINNED else None for i in range(NUM_REQUESTS)]
    folder = checkpoint_of(model, recent_tokens=32)
    burst = run_burst(model, folder, prompts, modes, admit_full_below=1.0)
    print(stock.load, burst.load, burst.counters, stock.num_bytes)
    assert stock.num_bytes == burst.num_bytes
    assert stock.load.num_preemptions > 0
    assert burst.load.num_preemptions == 0
    assert burst.counters.pages_dropped > 0
    assert burst.counters.demoted > 0
    assert burst.free_pages == burst.usable_pages
    assert [burst.tokens[i] for i in PINNED] == [stock.tokens[i] for i in PINNED]
    assert burst.tokens != stock.tokens, "dropped pages of random maps must show somewhere"


def test_a_full_only_server_preempts_like_stock_vllm(
    stock: Burst, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompts: list[list[int]],
) -> None:  # fmt: skip
    model = model_of(num_layers=4)
    burst = run_burst(model, checkpoint_of(model, recent_tokens=32), prompts, mode="full")
    print(stock.load, burst.load, burst.counters)
    assert burst.load.num_preemptions > 0
    assert burst.counters.pages_dropped == burst.counters.window_pages_dropped == 0
    assert burst.free_pages == burst.usable_pages
    assert burst.tokens == stock.tokens


def test_residuals_are_kept_again_when_the_load_falls(
    model_of: Callable[..., Path], checkpoint_of: Callable[..., Path], prompts: list[list[int]]
) -> None:
    """The last request starts compressed in a full pool and is alone in the end."""
    model = model_of(num_layers=4)
    folder = checkpoint_of(model, recent_tokens=32)
    options = {"restore_steps": 4, "admit_full_below": 0.4, "restore_below": 0.3}
    with (
        engine(
            model, folder, options, num_gpu_blocks_override=NUM_PAGES, max_model_len=256,
            enable_prefix_caching=False,
        ) as llm,
        watched_load(llm) as load,
    ):  # fmt: skip
        manager = residual_manager(llm)
        held: list[int] = []  # residual pages of the last request, once it is alone
        step_starts = manager.new_step_starts

        def note_held_pages() -> None:
            step_starts()
            if len(manager.ledgers) == 1:
                held.append(manager.num_held_pages)

        manager.new_step_starts = note_held_pages
        generate_each(llm, prompts, [40] * (NUM_REQUESTS - 1) + [140])
    print(load, manager.counters, held[:3], held[-3:])
    assert load.num_preemptions == 0
    assert manager.counters.admitted_compressed > 0
    assert manager.counters.restored > 0
    # A compressed request's residual pages stay as many; a restored one's grow with it.
    assert held[-2] >= held[0] + 4


def generate_each(llm: Any, prompts: list[list[int]], lengths: list[int]) -> None:
    """Greedy completions of different lengths."""
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
