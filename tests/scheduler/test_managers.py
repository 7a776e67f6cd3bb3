"""The R and D managers inside vLLM's real KVCacheManager; no model, no worker process.

``World`` (tests/support) checks reference counts, row lengths, announced against taken pages,
pairing and pins after every scheduling pass, and a symbolic worker checks every read.
"""

from __future__ import annotations

import gc
import random
from types import SimpleNamespace
from typing import Any

import pytest
from paged_world import World, settings

from echokv_vllm.config import SchedulerSettings
from echokv_vllm.scheduler.ledger import COMPRESSED, FULL
from echokv_vllm.specs import EchoResidualSpec


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random tokens, the same on every call."""
    source = random.Random(seed)
    return [source.randrange(1000) for _ in range(num_tokens)]


def ledger_of(world: World, request: Any) -> Any:
    return world.residual.ledgers[request.request_id]


def held(world: World, request: Any) -> list[int]:
    """Indices of the D pages a request holds."""
    return [index for index, page in enumerate(world.residual_row(request)) if page]


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
        block_size=4, num_kv_heads=2, head_size=8, dtype=_float(), echo_settings=echo.to_json()
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_len), max_concurrent_batches=num_batches
    )
    return spec, config


def _float() -> Any:
    import torch

    return torch.float32


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
    world = World(81, settings(), budget=300)
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
    assert world._schedule_waiting(hog, 300, _step()) == 110
    world.waiting.append(hog)  # popped in the wrong order by hand; put the queue right
    world.waiting = type(world.waiting)([waiting])
    assert not world._schedule_waiting(waiting, 300, _step())
    ledger = ledger_of(world, waiting)
    assert world.residual.valve.num_droppable("waiting", ledger) == 0


def _step() -> Any:
    from paged_world import Step

    return Step()


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


# Exactness of the prefix cache -------------------------------------------------------------


def scheduled_and_shrunk(depth: int) -> tuple[World, Any, list[int]]:
    """A world in which X has just published a chunk that no step has computed yet."""
    world = World(91, settings(recent_tokens=4), budget=40, depth=depth)
    tokens = prompt(100, 5)
    x = world.add("x", tokens, max_tokens=8)
    for _ in range(1 + depth):
        world.step()
    return world, x, tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_a_chunk_adopted_in_its_own_pass_protects_its_publisher(depth: int) -> None:
    """X publishes, Z adopts, then Y wants X's pages: X must keep them."""
    world, x, tokens = scheduled_and_shrunk(depth)
    z = world.add("z", tokens[:80] + prompt(8, 6), "full", max_tokens=3)
    step = _step()
    world.manager.new_step_starts()
    world.budget = 400
    done, _ = world._schedule_running(x, 40, step)
    assert done
    x.num_computed_tokens += 40
    x.num_in_flight_tokens += 40
    assert world._schedule_waiting(z, 400, step)
    assert step.parts[1][1] == 80, "Z takes over what X publishes in this pass"
    before = held(world, x)
    assert not world.residual.valve.relieve(1, ())
    assert held(world, x) == before
    z.num_computed_tokens, z.num_in_flight_tokens = 88, 8
    world.in_flight.append(step)
    x.num_output_placeholders = z.num_output_placeholders = 0
    while world.in_flight:
        world.worker.run(world.in_flight.popleft())  # raises if Z sees an inexact token


@pytest.mark.parametrize("depth", [0, 1])
def test_a_chunk_that_lost_its_context_leaves_the_prefix_cache(depth: int) -> None:
    """X publishes, Y's admission takes X's pages, then Z looks X's prefix up."""
    world, x, tokens = scheduled_and_shrunk(depth)
    step = _step()
    world.manager.new_step_starts()
    done, _ = world._schedule_running(x, 40, step)
    assert done
    committed = ledger_of(world, x).num_committed
    z = world.add("z", tokens[:80] + prompt(8, 6), "full", max_tokens=3)
    assert world.manager.get_computed_blocks(z)[1] == 80
    assert world.residual.valve.relieve(1, ()) is (committed > 8)
    hit = world.manager.get_computed_blocks(z)[1]
    assert hit <= (committed if committed > 8 else 80)
    if committed > 8:
        assert ledger_of(world, x).taint == committed


def test_the_newcomers_own_hit_protects_the_publisher() -> None:
    """Z's admission needs pages, and X, who could give them, has just published Z's prefix."""
    world, x, tokens = scheduled_and_shrunk(0)
    hog = world.add("hog", prompt(60, 8), "full", max_tokens=30)
    step = _step()
    world.manager.new_step_starts()
    done, _ = world._schedule_running(x, 40, step)
    assert done and world._schedule_waiting(hog, 60, step)
    before = held(world, x)
    z = world.add("z", tokens[:80] + prompt(48, 6), "full", max_tokens=3)
    assert not world._schedule_waiting(z, 100, step), "no room without X's pages"
    assert held(world, x) == before
    assert ledger_of(world, x).taint is None


def test_tainted_requests_publish_only_their_exact_beginning() -> None:
    world = World(400, settings(recent_tokens=8), budget=40)
    world.add("a", prompt(100, 1), "compressed", max_tokens=2)
    world.run()
    again = world.add("b", prompt(100, 1), "full", max_tokens=2)
    # The first chunk of 40 is exact, but its D pages 1 .. 7 were never stored.
    assert world.manager.get_computed_blocks(again)[1] <= 4
    world.run()
    world.check_published()
    third = world.add("c", prompt(100, 1), "full", max_tokens=2)
    assert world.manager.get_computed_blocks(third)[1] == 96
    world.run()


def test_full_requests_reuse_exact_prefixes_and_compressed_ones_only_their_window() -> None:
    world = World(400, settings(recent_tokens=8), budget=200)
    first = world.add("a", prompt(97, 1), "full", max_tokens=60)
    world.step()
    full = world.add("b", prompt(97, 1), "full", max_tokens=30)
    compressed = world.add("c", prompt(97, 1), "compressed", max_tokens=30)
    world.step()
    assert world.residual_row(full)[:24] == world.residual_row(first)[:24]
    assert held(world, compressed) == [0, 22, 23, 24]
    assert world.residual_row(compressed)[22:24] == world.residual_row(first)[22:24]
    assert ledger_of(world, compressed).taint == 96
    world.run()
    assert world.worker.num_accepted > 0
    world.check_idle()


def test_lenient_caching_shares_everything_but_not_with_pinned_requests() -> None:
    world = World(400, settings(strict=False, recent_tokens=8, mode="compressed"), budget=40)
    world.add("a", prompt(100, 1), max_tokens=2)
    world.run()
    auto = world.add("b", prompt(100, 1), "auto", max_tokens=2)
    blocks, num_hit, _ = world.manager.get_computed_blocks(auto)
    assert num_hit == 96
    r_row, d_row = blocks.get_block_ids()
    assert len(r_row) == len(d_row) == 24 and 0 in d_row and 0 not in r_row
    pinned = world.add("c", prompt(100, 1), "full", max_tokens=2)
    assert world.manager.get_computed_blocks(pinned)[1] == 0
    world.run()
    world.check_idle()


def test_shared_pages_are_free_only_when_the_last_holder_drops_them() -> None:
    world = World(400, settings(recent_tokens=0), budget=200)
    tokens = prompt(81, 1)
    first, second = world.add("a", tokens, max_tokens=9), None
    world.step()
    second = world.add("b", tokens, max_tokens=9)
    world.step()
    assert world.residual_row(first)[:20] == world.residual_row(second)[:20]
    num_free = world.pool.get_num_free_blocks()
    # 18 pages are shared with the other request and come free only with its own drop.
    assert world.residual.valve.relieve(10, ())
    assert world.pool.get_num_free_blocks() >= num_free + 10
    world.check()
    world.run()
    world.check_idle()


def test_dropping_a_page_a_pinned_request_shares_leaves_both_exact() -> None:
    world = World(400, settings(recent_tokens=0), budget=200)
    tokens = prompt(81, 1)
    auto = world.add("a", tokens, max_tokens=9)
    world.step()
    pinned = world.add("b", tokens, "full", max_tokens=9)
    world.step()
    world.step()
    before = world.residual_row(pinned)
    world.residual.valve.relieve(1, ())
    assert world.residual_row(pinned)[: len(before)] == before
    assert held(world, auto) != list(range(len(world.residual_row(auto))))
    stale = world.worker.num_stale
    world.step()
    assert world.worker.num_stale == stale, "the pages are still there, and stamped"
    world.run()


def test_a_d_block_is_used_only_beside_its_own_r_block() -> None:
    world = World(60, settings(), budget=200)
    tokens = prompt(41, 1)
    step = _step()
    # Both are looked up before either is published: two copies of the same prefix.
    for name in "ab":
        request = world.add(name, tokens, max_tokens=3)
        request.skip_reading_prefix_cache = True
        world._schedule_waiting(request, 200, step)
        request.num_computed_tokens = 41
    first_r, first_d = (list(row) for row in world.rows["a"])
    third = world.add("c", tokens, "full", max_tokens=3)
    blocks, num_hit, _ = world.manager.get_computed_blocks(third)
    assert num_hit == 40 and blocks.get_block_ids() == (first_r[:10], first_d[:10])
    world.pool.evict_blocks({first_r[4]})
    blocks, num_hit, _ = world.manager.get_computed_blocks(third)
    assert num_hit == 16, "page 4 of R is now b's, and a's page 4 of D is not its partner"
    assert world.residual.counters.hits_unpaired == 1


# State --------------------------------------------------------------------------------------


def test_a_preempted_request_starts_anew() -> None:
    world = World(41, settings(recent_tokens=4), budget=200)
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
    echo = settings(recent_tokens=4, restore_below=0.6, restore_steps=5)
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


# Everything at once -------------------------------------------------------------------------


def random_world(source: random.Random) -> World:
    retained, residual = source.choice([(4, 4), (4, 8), (8, 4), (12, 4), (12, 8)])
    echo = settings(
        mode=source.choice(["auto", "auto", "full", "compressed"]),
        strict=source.random() < 0.8,
        recent_tokens=source.choice([0, 3, 8, 16]),
        retained_block_size=retained,
        residual_block_size=residual,
        restore_steps=source.choice([1, 4]),
        restore_below=source.choice([0.5, 0.9]),
        admit_full_below=source.choice([0.9, 1.0]),
        watermark=source.choice([0, 0.05]),
    )
    largest = 400 // min(retained, residual)
    return World(
        max(40, source.randint(largest // 3, largest)),
        echo,
        caching=source.random() < 0.8,
        depth=source.choice([0, 0, 1, 2]),
        budget=source.choice([16, 48, 128]),
        max_running=source.choice([4, 16]),
        gate=source.random() < 0.7,
    )


def play(seed: int, num_requests: int) -> World:
    """Random arrivals, aborts, modes, shared prefixes and settings; checks after every step."""
    source = random.Random(seed)
    world = random_world(source)
    prefixes = [[source.randrange(50) for _ in range(size)] for size in (16, 48, 70)]
    num_left = num_requests
    while num_left or world.running or world.waiting:
        if num_left and source.random() < 0.4:
            num_left -= 1
            shared = source.choice(prefixes)[: source.randint(1, 70)]
            tokens = shared if source.random() < 0.7 else []
            tokens = tokens + [source.randrange(50) for _ in range(source.randint(1, 30))]
            mode = source.choice([None, None, "auto", "full", "compressed"])
            world.add(f"q{num_left}", tokens, mode, source.randint(1, 30))
        alive = [*world.running, *world.waiting]
        if alive and source.random() < 0.03:
            world.abort(source.choice(alive))
        if world.running or world.waiting:
            world.step()
        if world.echo.strict and not world.in_flight:
            world.check_published()
    world.run()
    world.check_idle()
    return world


def play_all(seeds: range, num_requests: int) -> None:
    totals = dict.fromkeys(("accepted", "stale", "dropped", "demoted", "restored", "preempted"), 0)
    for seed in seeds:
        print(f"replay with play({seed}, {num_requests})")  # pytest shows it on failure
        world = play(seed, num_requests)
        counters = world.residual.counters
        totals["accepted"] += world.worker.num_accepted
        totals["stale"] += world.worker.num_stale
        totals["dropped"] += counters.pages_dropped + counters.window_pages_dropped
        totals["demoted"] += counters.demoted
        totals["restored"] += counters.restored
        totals["preempted"] += world.num_preemptions
    print(totals)
    assert all(totals.values()), f"the runs never met one of {totals}"


@pytest.mark.parametrize("first", range(0, 24, 6))
def test_random_worlds_hold_every_invariant(first: int) -> None:
    play_all(range(first, first + 6), 40)


@pytest.mark.nightly
def test_many_random_worlds_hold_every_invariant() -> None:
    play_all(range(1000, 1200), 80)
