"""Control 1: with nothing compressed, greedy tokens are those of stock vLLM, float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import engine, generate, residual_manager, tokens

LENGTHS = (5, 17, 47, 48, 49, 64, 100, 200, 257, 333, 500)
NUM_TOKENS = 48

pytestmark = pytest.mark.slow

# Plan, layers of the model: 5 layers make paper-0.5 end on an anchor without locals.
PLANS = {"local-0.5": 4, "paper-0.5": 5, "paper-0.3": 10}
UNEVEN_BLOCKS = pytest.param("paper-0.5", marks=pytest.mark.nightly)  # as paper-0.3, so once a day


@pytest.fixture(scope="module")
def prompts(prompt_of: Callable[..., list[int]]) -> list[list[int]]:
    return [prompt_of(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def stock_tokens_of(
    model_of: Callable[..., Path], prompts: list[list[int]]
) -> Callable[[int], list[list[int]]]:
    """``stock_tokens_of(num_layers)``: stock vLLM's answer to ``prompts``, computed once."""
    known: dict[int, list[list[int]]] = {}

    def answer(num_layers: int) -> list[list[int]]:
        if num_layers not in known:
            with engine(
                model_of(num_layers=num_layers), num_gpu_blocks_override=200,
                enable_prefix_caching=False,
            ) as llm:  # fmt: skip
                known[num_layers] = tokens(generate(llm, prompts, max_tokens=NUM_TOKENS))
            assert len(set(map(tuple, known[num_layers]))) == len(prompts), "answers must differ"
        return known[num_layers]

    return answer


@pytest.mark.parametrize("plan", PLANS)
def test_mode_full_equals_stock_without_prefix_caching(
    plan: str, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompts: list[list[int]], stock_tokens_of: Callable[[int], list[list[int]]],
) -> None:  # fmt: skip
    model = model_of(num_layers=PLANS[plan])
    with engine(
        model, checkpoint_of(model, plan), {"mode": "full"}, num_gpu_blocks_override=400,
        enable_prefix_caching=False,
    ) as llm:  # fmt: skip
        outputs = generate(llm, prompts, max_tokens=NUM_TOKENS)
        counters = residual_manager(llm).counters
    assert tokens(outputs) == stock_tokens_of(PLANS[plan])
    assert [output.num_cached_tokens for output in outputs] == [0] * len(prompts)
    assert counters.admitted_full == len(prompts) and counters.pages_dropped == 0


@pytest.mark.parametrize("plan", ["local-0.5", UNEVEN_BLOCKS, "paper-0.3"])
def test_prefix_hits_keep_mode_full_equal_to_stock(
    plan: str, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompts: list[list[int]], stock_tokens_of: Callable[[int], list[list[int]]],
) -> None:  # fmt: skip
    model = model_of(num_layers=PLANS[plan])
    with engine(
        model, checkpoint_of(model, plan), {"mode": "full"}, num_gpu_blocks_override=800,
        enable_prefix_caching=True,
    ) as llm:  # fmt: skip
        granularity = llm.llm_engine.engine_core.engine_core.scheduler.block_size
        first = generate(llm, prompts, max_tokens=NUM_TOKENS)
        second = generate(llm, prompts, max_tokens=NUM_TOKENS)
    assert tokens(first) == stock_tokens_of(PLANS[plan])
    assert tokens(second) == stock_tokens_of(PLANS[plan])
    # vLLM recomputes at least the last prompt token, and hits are whole blocks of both groups.
    expected = [(length - 1) // granularity * granularity for length in LENGTHS]
    assert [output.num_cached_tokens for output in second] == expected
    assert max(expected) > 0


@pytest.mark.parametrize("mode", ["auto", "compressed"])
def test_roomy_auto_and_pinned_full_requests_equal_stock(
    mode: str, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompts: list[list[int]], stock_tokens_of: Callable[[int], list[list[int]]],
) -> None:  # fmt: skip
    """``auto`` with room for everybody, and ``full`` pinned in a server that compresses."""
    model = model_of(num_layers=4)
    asked: list[Any] = [None if mode == "auto" else "full"] * len(prompts)
    with engine(
        model, checkpoint_of(model), {"mode": mode}, num_gpu_blocks_override=800,
    ) as llm:  # fmt: skip
        outputs = generate(llm, prompts, asked, max_tokens=NUM_TOKENS)
        again = generate(llm, prompts, asked, max_tokens=NUM_TOKENS)
        counters = residual_manager(llm).counters
    assert tokens(outputs) == tokens(again) == stock_tokens_of(4)
    assert counters.admitted_full == 2 * len(prompts) and counters.admitted_compressed == 0


def test_pinned_full_beside_compressed_requests_equals_stock(
    model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompts: list[list[int]], stock_tokens_of: Callable[[int], list[list[int]]],
) -> None:  # fmt: skip
    """Both kinds in one batch; prompts are sent twice, so prefixes of one kind meet the other."""
    model = model_of(num_layers=4)
    pinned = range(1, len(prompts), 2)
    asked: list[Any] = ["full" if i in pinned else "compressed" for i in range(len(prompts))]
    swapped = ["compressed" if mode == "full" else "full" for mode in asked]
    with engine(
        model, checkpoint_of(model), {"mode": "auto"}, num_gpu_blocks_override=110,
    ) as llm:  # fmt: skip
        first = tokens(generate(llm, prompts, asked, max_tokens=NUM_TOKENS))
        second = tokens(generate(llm, prompts, swapped, max_tokens=NUM_TOKENS))
    stock = stock_tokens_of(4)
    assert [first[i] for i in pinned] == [stock[i] for i in pinned]
    rest = [i for i in range(len(prompts)) if i not in pinned]
    assert [second[i] for i in rest] == [stock[i] for i in rest]
    assert first != stock, "compression of random maps must show somewhere"


@pytest.mark.nightly
def test_mode_full_equals_stock_compiled(
    model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompts: list[list[int]], stock_tokens_of: Callable[[int], list[list[int]]],
) -> None:  # fmt: skip
    """torch.compile around the attention calls, as a production server runs."""
    model = model_of(num_layers=4)
    with engine(
        model, checkpoint_of(model), {"mode": "full"}, num_gpu_blocks_override=400,
        enforce_eager=False, enable_prefix_caching=False,
    ) as llm:  # fmt: skip
        outputs = generate(llm, prompts, max_tokens=NUM_TOKENS)
    assert tokens(outputs) == stock_tokens_of(4)
