"""vLLM's real scheduler decides the same with the shortcut and without it, step by step."""

from __future__ import annotations

import math
import random
from types import MethodType
from typing import Any

import engines  # noqa: F401  sets vLLM's environment, so it must come before vLLM
import pytest
from echo_pool import pool_config, settings
from tiny_models import write_model
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from echokv_vllm import compat
from echokv_vllm.config import SchedulerSettings

compat.patch_scheduler()
compat.patch_lookup()
compat.patch_allocation()
MAX_MODEL_LEN = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


def make_scheduler(
    model: str, echo: SchedulerSettings, num_blocks: int, is_async: bool, by_priority: bool
) -> Any:
    """vLLM's scheduler over a small pool, a few tokens per step."""
    sizes = (echo.retained_block_size, echo.residual_block_size)
    config = EngineArgs(
        model=model, max_model_len=MAX_MODEL_LEN, max_num_seqs=16, load_format="dummy",
        max_num_batched_tokens=MAX_MODEL_LEN, async_scheduling=False,
    ).create_engine_config()  # fmt: skip
    config.cache_config.num_gpu_blocks = num_blocks
    kind = AsyncScheduler if is_async else Scheduler
    scheduler: Any = kind(
        config, pool_config(num_blocks, echo), StructuredOutputManager(config),
        block_size=math.lcm(*sizes), hash_block_size=math.gcd(*sizes),
    )  # fmt: skip
    scheduler.max_num_scheduled_tokens = 64
    if by_priority:
        scheduler.policy = SchedulingPolicy.PRIORITY
        scheduler.waiting = create_request_queue(scheduler.policy)
        scheduler.skipped_waiting = create_request_queue(scheduler.policy)
    return scheduler


def without_shortcut(scheduler: Any) -> Any:
    manager = scheduler.kv_cache_manager
    for name in ("allocate_slots", "cache_blocks"):
        original = getattr(KVCacheManager, name).__wrapped__
        setattr(manager, name, MethodType(original, manager))
    return scheduler


class Twins:
    """One traffic through two schedulers.

    Args:
        model: Folder.
        source: Of everything random.
    """

    def __init__(self, model: str, source: random.Random) -> None:
        self.source = source
        echo = settings(
            mode=source.choice(["auto", "auto", "full", "compressed"]),
            recent_tokens=source.choice([0, 4, 16]),
            retained_block_size=source.choice([4, 8]),
            residual_block_size=source.choice([4, 8]),
        )
        self.is_async, by_priority = source.random() < 0.5, source.random() < 0.3
        self.drafts = not self.is_async and source.random() < 0.5
        num_blocks = source.choice([80, 120, 300])
        both = [
            make_scheduler(model, echo, num_blocks, self.is_async, by_priority) for _ in range(2)
        ]
        self.schedulers = [both[0], without_shortcut(both[1])]
        if self.drafts:
            for scheduler in both:
                scheduler.num_spec_tokens = 3
        init_none_hash(sha256)
        size = math.gcd(echo.retained_block_size, echo.residual_block_size)
        self.hasher = get_request_block_hasher(size, sha256)
        self.prefixes = [[source.randrange(3, 60) for _ in range(50)] for _ in range(3)]
        self.in_flight: list[list[tuple[Any, set[str]]]] = []
        self.num_requests = 0

    @property
    def is_idle(self) -> bool:
        pending = any(output.num_scheduled_tokens for [(output, _), _] in self.in_flight)
        return not (pending or self.schedulers[0].has_unfinished_requests())

    def add(self) -> None:
        """A request of a random mode, length and priority that may share a prefix."""
        source = self.source
        self.num_requests += 1
        prompt = source.choice(self.prefixes)[: source.randint(1, 50)]
        prompt = prompt + [source.randrange(3, 60) for _ in range(source.randint(1, 40))]
        mode = source.choice([None, None, "auto", "full", "compressed"])
        extra = None if mode is None else {"echokv": mode}
        max_tokens, priority = source.choice([1, 12, 60, 120]), source.randrange(3)
        for scheduler in self.schedulers:
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
            scheduler.add_request(Request(
                f"q{self.num_requests}", list(prompt), params, None, block_hasher=self.hasher,
                priority=priority,
            ))  # fmt: skip

    def abort(self) -> None:
        alive = sorted(self.schedulers[0].requests)
        if alive:
            victim = self.source.choice(alive)
            for scheduler in self.schedulers:
                scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Schedules a step in both, finishes the one before it, and compares everything."""
        pair = []
        for scheduler in self.schedulers:
            output = scheduler.schedule()
            requests = [scheduler.requests[name] for name in output.num_scheduled_tokens]
            # An asynchronous scheduler has counted the token to come.
            pair.append((output, {
                request.request_id for request in requests
                if request.num_computed_tokens + self.is_async
                >= request.num_tokens + request.num_output_placeholders
            }))  # fmt: skip
        self.in_flight.append(pair)
        assert decided(pair[0][0]) == decided(pair[1][0])
        if len(self.in_flight) > self.is_async or not pair[0][0].num_scheduled_tokens:
            self._finish()
        assert state_of(self.schedulers[0]) == state_of(self.schedulers[1])

    def _finish(self) -> None:
        seed = self.source.random()
        for scheduler, step in zip(self.schedulers, self.in_flight.pop(0), strict=True):
            self._deliver(scheduler, *step, random.Random(seed))

    def _deliver(
        self, scheduler: Any, output: Any, ending: set[str], source: random.Random
    ) -> None:
        names = list(output.num_scheduled_tokens)
        if not names:
            return
        sampled = []
        for name in names:
            num_drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
            sampled.append([7] * (1 + source.randint(0, num_drafts)) if name in ending else [])
        scheduler.update_from_output(output, ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
        ))  # fmt: skip
        if self.drafts:
            alive = [name for name in names if name in scheduler.requests and name in ending]
            drafts = [[9] * source.randint(0, 3) for _ in alive]
            scheduler.update_draft_token_ids(DraftTokenIds(alive, drafts))


def decided(output: Any) -> dict[str, Any]:
    """What a worker is told."""
    cached = output.scheduled_cached_reqs
    return {
        "tokens": dict(output.num_scheduled_tokens),
        "new": [(r.req_id, r.block_ids, r.num_computed_tokens) for r in output.scheduled_new_reqs],
        "cached": (cached.req_ids, cached.new_block_ids, cached.num_computed_tokens),
        "finished": output.finished_req_ids,
        "preempted": output.preempted_req_ids,
    }


def state_of(scheduler: Any) -> list[Any]:
    """What later steps depend on."""
    retained, residual = scheduler.kv_cache_manager.coordinator.single_type_managers
    rows = [
        {name: [b.block_id for b in row] for name, row in group.req_to_blocks.items() if row}
        for group in (retained, residual)
    ]
    published = [dict(group.num_cached_block) for group in (retained, residual)]
    pool = scheduler.kv_cache_manager.block_pool
    free = [b.block_id for b in pool.free_block_queue.get_all_free_blocks()]
    return [rows, published, residual.ledgers, residual.counters, free]


def play(model: str, seed: int) -> Any:
    """Random traffic; the D manager's counters."""
    source = random.Random(seed)
    twins = Twins(model, source)
    while twins.num_requests < 30 or not twins.is_idle:
        if twins.num_requests < 30 and source.random() < 0.5:
            twins.add()
        if source.random() < 0.02:
            twins.abort()
        twins.step()
    return twins.schedulers[0].kv_cache_manager.coordinator.single_type_managers[1].counters


@pytest.mark.parametrize("first", [0, 10])
def test_the_same_is_decided(model: str, first: int) -> None:
    dropped = window = 0
    for seed in range(first, first + 10):
        print(f"replay with play(model, {seed})")
        counters = play(model, seed)
        dropped += counters.pages_dropped
        window += counters.window_pages_dropped
    assert dropped > 50 and window > 50, "the pool was never short"
