"""The R and D managers inside vLLM's real KVCacheManager; no model, no worker process.

``World`` (tests/support) checks reference counts, row lengths, announced against taken pages,
pairing and pins after every scheduling pass, and a symbolic worker checks every read.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from echo_pool import settings
from paged_world import World, held, ledger_of, prompt
from symbolic_worker import Step

from echokv_vllm.config import SchedulerSettings
from echokv_vllm.scheduler.ledger import COMPRESSED, FULL
from echokv_vllm.specs import EchoResidualSpec

# Compressed mode ----------------------------------------------------------------------------


def test_a_compressed_request_keeps_sink_and_window_and_drops_the_rest() -> None:
    world = World(200, settings(recent_tokens=8), budget=64)
    request = world.add("a", prompt(61), "compressed", max_tokens=30)
    world.step()
    assert held(world, request) == [0, 13, 14, 15]  # tokens 53 .. 60 and the page they start in
    for _ in range(20):
        world.step()
    num_tokens = request.num_computed_tokens
    first = (num_tokens - 1 - 8) // 4
    assert held(world, request) == [0, *range(first, -(-num_tokens // 4))]
    assert world.residual.counters.admitted_compressed == 1
    assert world.residual.counters.window_pages_dropped > 0
    world.run()
    world.check_idle()


@pytest.mark.parametrize("recent_tokens", [0, 1, 4, 7, 8, 33])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_start_up_floor_holds_and_is_reached(recent_tokens: int, depth: int) -> None:
    echo = settings(recent_tokens=recent_tokens)
    world = World(800, echo, budget=40, depth=depth, caching=False)
    request = world.add("a", prompt(301), "compressed", max_tokens=20)
    peak = 0
    while world.running or world.waiting:
        world.step()  # World.check compares with floor_pages
        peak = max(peak, len(held(world, request)))
    world.run()
    # A chunk that begins and ends between pages may need one page less per window.
    assert peak >= echo.floor_pages(301, depth + 1) - (depth + 2)
    if depth and recent_tokens > 8:
        assert peak > echo.floor_pages(301, depth), "fewer steps in flight would do"


def spec_and_config(echo: SchedulerSettings, max_len: int, num_batches: int) -> tuple[Any, Any]:
    spec = EchoResidualSpec(
        block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float32, echo_settings=echo.to_json()
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_len), max_concurrent_batches=num_batches
    )
    return spec, config


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("mode", ["auto", "compressed"])
def test_a_pool_vllm_accepts_at_start_up_runs_the_longest_request(mode: str, depth: int) -> None:
    echo = settings(mode=mode, recent_tokens=24)
    spec, config = spec_and_config(echo, 400, depth + 1)
    residual_pages = spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    world = World(1 + 100 + residual_pages, echo, budget=60, depth=depth, max_model_len=400)
    world.add("a", prompt(380), max_tokens=20)
    world.run(400)
    assert not world.num_preemptions
    world.check_idle()


def test_a_server_in_full_mode_is_sized_for_every_page() -> None:
    spec, config = spec_and_config(settings(mode="full"), 399, 1)
    assert spec.max_memory_usage_bytes(config) == 100 * spec.page_size_bytes


# Pressure -----------------------------------------------------------------------------------


def test_pressure_takes_the_oldest_pages_of_the_largest_holder() -> None:
    world = World(121, settings(recent_tokens=8), budget=300)
    large = world.add("large", prompt(120, 1), max_tokens=60)
    small = world.add("small", prompt(60, 2), max_tokens=60)
    world.step()
    world.step()
    pinned = world.add("pinned", prompt(80, 3), "full", max_tokens=2)
    world.step()
    assert pinned in world.running
    lost = [index for index in range(30) if index not in held(world, large)]
    # 60 + 2 and 30 + 2 pages are held of 120; the newcomer needs 40.
    assert lost == list(range(1, 1 + len(lost))) and lost
    assert len(lost) + len(held(world, small)) >= 14
    counters = world.residual.counters
    assert counters.pages_dropped == len(lost) + 16 - len(held(world, small))
    assert not world.num_preemptions
    world.run()


def test_no_more_is_dropped_than_needed_plus_one_page_per_request() -> None:
    world = World(81, settings(look_ahead=False), budget=300)
    requests = [world.add(f"a{i}", prompt(39, i), max_tokens=40) for i in range(4)]
    world.step()
    assert world.pool.get_num_free_blocks() == 0
    world.step()  # 39 + 1 tokens: still in the last page
    before = world.residual.counters.pages_dropped
    world.step()  # four requests ask for an R and a D page each
    dropped = world.residual.counters.pages_dropped - before
    assert 8 <= dropped <= 2 + len(requests) + 8
    assert not world.num_preemptions
    assert all(held(world, r)[0] == 0 for r in requests), "the sink page stays"


def test_a_demand_that_cannot_be_met_drops_nothing() -> None:
    world = World(45, settings(recent_tokens=8), budget=300)
    first = world.add("a", prompt(60, 1), max_tokens=50)
    world.step()
    world.step()
    world.add("b", prompt(200, 2), "full")
    world.step()
    assert world.residual.counters.pages_dropped == 0
    assert len(held(world, first)) == len(world.residual_row(first))
    world.abort(world.waiting[0])
    assert "b" not in world.residual.ledgers


def test_waiting_requests_hold_nothing_that_could_be_dropped() -> None:
    world = World(61, settings(recent_tokens=0), budget=300, gate=False)
    done = world.add("done", prompt(40, 1), max_tokens=1)
    world.step()
    hog = world.add("hog", prompt(110, 2), "full", max_tokens=1)
    # Finds "done" in the prefix cache, but has no room yet.
    waiting = world.add("waiting", prompt(40, 1) + prompt(60, 9), max_tokens=1)
    del done
    world.manager.new_step_starts()
    assert world._schedule_waiting(hog, 300, Step()) == 110
    world.waiting.append(hog)  # popped in the wrong order by hand; put the queue right
    world.waiting = type(world.waiting)([waiting])
    assert not world._schedule_waiting(waiting, 300, Step())
    ledger = ledger_of(world, waiting)
    assert world.residual.valve.num_droppable("waiting", ledger) == 0


@pytest.mark.parametrize("gate", [True, False])
def test_a_failed_admission_leaves_no_committed_tokens_behind(gate: bool) -> None:
    """Found by review: tokens of a lost prefix hit counted as committed for ever, and pressure
    then took pages that were still being written."""
    world = World(61, settings(recent_tokens=0), budget=300, gate=gate)
    world.add("done", prompt(40, 1), max_tokens=1)
    world.run()
    hog = world.add("hog", prompt(76, 2), "full", max_tokens=40)
    world.step()
    request = world.add("b", prompt(40, 1) + prompt(80, 9), max_tokens=8)
    for _ in range(3):
        world.step()
        assert request in world.waiting
    world.abort(hog)
    assert world.manager.reset_prefix_cache()
    world.step()
    assert request in world.running
    assert ledger_of(world, request).num_committed == 0
    world.run()


def test_tokens_in_flight_are_never_dropped() -> None:
    world = World(81, settings(recent_tokens=0), budget=60, depth=2)
    request = world.add("a", prompt(150, 1), max_tokens=5)
    world.step()
    world.step()
    assert request.num_in_flight_tokens == 120
    ledger = ledger_of(world, request)
    assert ledger.num_committed == 0
    assert world.residual.valve.num_droppable("a", ledger) == 0
    world.add("b", prompt(100, 2), "full", max_tokens=2)
    world.run()
    world.check_idle()


# State --------------------------------------------------------------------------------------


def test_a_preempted_request_starts_anew() -> None:
    world = World(41, settings(recent_tokens=4, look_ahead=False), budget=200)
    pinned = world.add("p", prompt(40, 1), "full", max_tokens=30)
    auto = world.add("a", prompt(30, 2), max_tokens=30)
    world.run()
    assert world.num_preemptions > 0
    assert {r.request_id for r in world.finished} == {"p", "a"}
    assert pinned.num_output_tokens == auto.num_output_tokens == 29
    world.check_idle()


def test_aborted_requests_leave_nothing_behind() -> None:
    world = World(31, settings(), budget=200)
    running = world.add("a", prompt(50, 1), max_tokens=30)
    waiting = world.add("b", prompt(50, 2), "full", max_tokens=30)
    world.step()
    world.step()
    assert set(world.residual.ledgers) == {"a", "b"}
    world.abort(waiting)
    assert set(world.residual.ledgers) == {"a"}
    world.abort(running)
    world.check_idle()


def test_a_request_keeps_its_mode_as_long_as_it_lives() -> None:
    world = World(31, settings())
    modes = world.link.requested_modes
    first = world.add("a", prompt(5), "full")
    world.step()
    world._preempt(world.running.pop())
    assert modes == {"a": "full"}
    second = world.add("a", prompt(5), "compressed")  # the id is used again
    world.waiting.clear()
    del first
    gc.collect()
    assert modes == {"a": "compressed"}
    del second
    gc.collect()
    assert modes == {}


def test_partners_are_bounded_by_the_pool() -> None:
    world = World(41, settings(recent_tokens=0), budget=100)
    for index in range(20):
        world.add(f"r{index}", prompt(30, index), max_tokens=10)
    world.run()
    assert len(world.link.partner) <= 40
    world.check_idle()


@pytest.mark.parametrize("watermark", [0.0, 0.2])
def test_admission_makes_room_for_the_watermark_too(watermark: float) -> None:
    world = World(101, settings(recent_tokens=0, watermark=watermark), budget=200)
    world.add("a", prompt(120, 1), max_tokens=30)
    world.step()
    world.step()
    newcomer = world.add("b", prompt(60, 2), "full", max_tokens=3)
    world.step()
    assert newcomer in world.running
    assert world.pool.get_num_free_blocks() >= world.manager.watermark_blocks
    world.run()


def test_the_watermark_does_not_shrink_a_request_that_is_alone() -> None:
    world = World(101, settings(watermark=0.2), budget=300)
    alone = world.add("a", prompt(180, 1), max_tokens=3)  # 90 of 100 pages
    world.step()
    assert ledger_of(world, alone).mode == FULL
    world.run()


def test_the_mode_is_chosen_again_when_admission_failed() -> None:
    world = World(61, settings(), budget=300, gate=False)
    hog = world.add("hog", prompt(110, 1), "full", max_tokens=30)
    world.step()
    request = world.add("a", prompt(80, 2), max_tokens=3)
    world.step()
    assert request in world.waiting and ledger_of(world, request).mode == COMPRESSED
    world.abort(hog)
    world.step()
    assert request in world.running and ledger_of(world, request).mode == FULL
    world.run()


def test_residuals_come_back_after_calm_and_only_for_new_tokens() -> None:
    echo = settings(recent_tokens=4, restore_below=0.6, restore_steps=5, look_ahead=False)
    world = World(61, echo, budget=300)
    hog = world.add("hog", prompt(78, 2), "full", max_tokens=60)
    request = world.add("a", prompt(60, 1), max_tokens=60)
    world.step()
    assert ledger_of(world, request).mode == COMPRESSED
    world.step()
    world.abort(hog)
    missing = set(range(len(world.residual_row(request)))) - set(held(world, request))
    for _ in range(4):
        world.step()
        assert ledger_of(world, request).mode == COMPRESSED
    world.step()
    assert ledger_of(world, request).mode == FULL
    assert world.residual.counters.restored == 1
    length = len(world.residual_row(request))
    for _ in range(20):
        world.step()
    now = held(world, request)
    assert set(range(length, len(world.residual_row(request)))) <= set(now)
    assert not missing & set(now), "what was dropped stays dropped"
    assert ledger_of(world, request).taint is not None
    world.run()


def test_a_request_is_counted_as_demoted_once() -> None:
    world = World(61, settings(recent_tokens=4), budget=300)
    for index in range(3):
        world.add(f"a{index}", prompt(36, index), max_tokens=60)
    world.run()
    counters = world.residual.counters
    assert counters.pages_dropped > 0
    assert 0 < counters.demoted <= 3 + world.num_preemptions
