"""Engine runs on the installed vLLM: exactness in full mode, pressure, and a random workload."""

from __future__ import annotations

import random

import pytest
from engines import engine, generate, residual_manager, scheduler_of, tokens
from tiny_models import write_checkpoint, write_model

pytestmark = pytest.mark.slow

NUM_BLOCKS = 61  # 60 pages of 16 tokens: four of the requests below in full mode
NUM_NEW = 24


def prompt_of(length: int, seed: int) -> list[int]:
    source = random.Random(f"{seed}/{length}")
    return [source.randrange(255) for _ in range(length)]


PROMPTS = [prompt_of(60 + 12 * index, index) for index in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("contract") / "model")


@pytest.fixture(scope="module")
def stock(model):
    with engine(model, max_model_len=512) as llm:
        return tokens(generate(llm, PROMPTS, max_tokens=NUM_NEW))


@pytest.fixture(scope="module")
def llm(model, stock, tmp_path_factory):
    """An engine with a pool that is too small for all requests in full mode."""
    checkpoint = write_checkpoint(
        tmp_path_factory.mktemp("contract") / "checkpoint", model, recent_tokens=32
    )
    with engine(
        model, checkpoint, {"restore_steps": 4}, max_model_len=512,
        num_gpu_blocks_override=NUM_BLOCKS, enable_prefix_caching=True,
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def pool(llm):
    """The engine's block pool; whatever a test does, it must end up complete."""
    block_pool = scheduler_of(llm).kv_cache_manager.block_pool
    assert block_pool.num_gpu_blocks == NUM_BLOCKS
    yield block_pool
    manager = residual_manager(llm)
    assert block_pool.get_num_free_blocks() == NUM_BLOCKS - 1, "pages were lost"
    assert not manager.ledgers and manager.num_held_pages == 0
    assert not manager.link.requested_modes


def test_full_requests_equal_stock_one_by_one(llm, pool, stock):
    for prompt, expected in zip(PROMPTS, stock, strict=True):
        assert tokens(generate(llm, [prompt], "full", NUM_NEW)) == [expected]


def test_full_requests_equal_stock_while_others_give_way(llm, pool, stock):
    counters = residual_manager(llm).counters
    dropped = counters.pages_dropped + counters.window_pages_dropped
    modes = ["full", None, "compressed", None, "full", None, "compressed", None]
    found = tokens(generate(llm, PROMPTS, modes, NUM_NEW))
    for mode, got, expected in zip(modes, found, stock, strict=True):
        assert len(got) == NUM_NEW
        if mode == "full":
            assert got == expected
    assert counters.pages_dropped + counters.window_pages_dropped > dropped
    assert counters.demoted + counters.admitted_compressed > 0


def test_compression_is_at_work(llm, pool, stock):
    """The random maps rebuild badly; equal tokens would mean that nothing was rebuilt."""
    assert tokens(generate(llm, PROMPTS, "compressed", NUM_NEW)) != stock


def test_random_arrivals_and_aborts(llm, pool, stock):
    from vllm import SamplingParams

    source = random.Random(3)
    engine_, full, running = llm.llm_engine, {}, set()
    for number in range(40):
        index = source.randrange(len(PROMPTS))
        mode = source.choice(["full", "auto", "compressed", None])
        name = f"{number}-{index}"
        params = SamplingParams(
            max_tokens=NUM_NEW, temperature=0, ignore_eos=True,
            extra_args=None if mode is None else {"echokv": mode},
        )  # fmt: skip
        engine_.add_request(name, {"prompt_token_ids": PROMPTS[index]}, params)
        running.add(name)
        if source.random() < 0.2:
            victim = source.choice(sorted(running))
            engine_.abort_request([victim])
            running.discard(victim)
        for _ in range(source.randrange(4)):
            collect(engine_, full, running)
        if mode == "full" and name in running:
            full.setdefault(name, None)
    while engine_.has_unfinished_requests():
        collect(engine_, full, running)
    finished = {name: got for name, got in full.items() if got is not None}
    assert len(finished) >= 5
    for name, got in finished.items():
        assert got == stock[int(name.split("-")[1])], name


def collect(engine_, full, running) -> None:
    for output in engine_.step():
        if output.finished:
            running.discard(output.request_id)
            if output.request_id in full:
                full[output.request_id] = list(output.outputs[0].token_ids)
