"""Sessions of streamed inputs: vLLM adds each under one id and keeps the first's request."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
from echo_pool import settings
from paged_world import World, prompt
from vllm import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from echokv_vllm import compat
from echokv_vllm.config import EchoConfigError
from echokv_vllm.limits import FullModeLimit

compat.patch_scheduler()


def scheduler_of(world: World) -> Any:
    """vLLM's scheduler with as much of it as adding a request touches."""
    scheduler = object.__new__(Scheduler)
    scheduler.kv_cache_manager = world.manager
    scheduler.requests, scheduler.max_model_len = {}, world.max_model_len
    scheduler.policy = SchedulingPolicy.FCFS
    scheduler.connector, scheduler.log_stats = None, False
    scheduler.spec_decode_metrics_level = "none"
    scheduler._enqueue_waiting_request = world.waiting.append
    return scheduler


def one_input(world: World, seed: int, mode: str | None, resumable: bool = True) -> Request:
    extra = None if mode is None else {"echokv": mode}
    params = SamplingParams(max_tokens=8, extra_args=extra)
    return Request(
        "session", prompt(40, seed), params, None, block_hasher=world.hasher, resumable=resumable
    )


@pytest.mark.parametrize("later", ["full", "compressed", None])
def test_a_session_keeps_the_mode_of_its_first_input(later: str | None) -> None:
    world = World(400, settings(), budget=200)
    scheduler = scheduler_of(world)
    scheduler.add_request(one_input(world, 1, "full"))
    session = scheduler.requests["session"]
    scheduler.add_request(one_input(world, 2, later))
    gc.collect()  # the later input's request object is not kept by anyone
    assert world.link.find_request("session") is session
    assert world.link.requested_modes == {"session": "full"}
    assert world.residual.ledger("session").requested == "full"


def test_an_id_that_is_used_again_brings_no_mode_with_it() -> None:
    world = World(400, settings(), budget=200)
    scheduler = scheduler_of(world)
    first = one_input(world, 1, "full", resumable=False)
    scheduler.add_request(first)
    scheduler.requests.clear()
    scheduler.add_request(one_input(world, 2, None, resumable=False))
    assert world.link.requested_modes == {}
    assert first is not scheduler.requests["session"]


@pytest.mark.parametrize("num_new", [20, 1])
def test_a_sessions_next_input_finds_room_above_the_watermark(num_new: int) -> None:
    """vLLM takes it from its waiting queue, and keeps the watermark free for all of those."""
    world = World(101, settings(recent_tokens=0, watermark=0.1), budget=200, caching=False)
    session = world.add("session", prompt(41), max_tokens=60)
    world.add("long", prompt(120, 1), max_tokens=150)
    while world.pool.get_num_free_blocks() >= 10:
        world.step()
    world.running.remove(session)
    session.status = RequestStatus.WAITING
    assert world.manager.allocate_slots(session, num_new, has_scheduled_reqs=True) is not None


@pytest.mark.parametrize("policy", SchedulingPolicy)
def test_forecasts_know_whom_vllm_preempts(policy: SchedulingPolicy) -> None:
    world = World(400, settings(), budget=200)
    scheduler = scheduler_of(world)
    scheduler.policy = policy
    scheduler.add_request(one_input(world, 1, None))
    assert world.link.by_priority == (policy == SchedulingPolicy.PRIORITY)


@pytest.mark.parametrize(("resumable", "refused"), [(True, True), (False, False)])
def test_a_pinned_session_must_fit_at_the_models_length(resumable: bool, refused: bool) -> None:
    """It would wait for ever once its inputs have outgrown the pool."""
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))
    request = SimpleNamespace(
        prompt_token_ids=[1] * 50, prompt_embeds=None, resumable=resumable,
        sampling_params=SimpleNamespace(max_tokens=8),
    )  # fmt: skip
    cache = {"limit": FullModeLimit(16, 16, 53)}
    if refused:
        with pytest.raises(EchoConfigError, match="may reach 512 tokens"):
            compat._check_length(config, cache, request)
    else:
        compat._check_length(config, cache, request)
    cache["limit"] = FullModeLimit(16, 16, 64)
    compat._check_length(config, cache, request)
