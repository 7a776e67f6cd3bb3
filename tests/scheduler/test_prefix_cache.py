"""What the two managers publish and adopt: only exact blocks, only in pairs (``strict``)."""

from __future__ import annotations

from typing import Any

import pytest
from echo_pool import settings
from paged_world import World, held, ledger_of, prompt
from symbolic_worker import Step


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
    step = Step()
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
    step = Step()
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
    step = Step()
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


@pytest.mark.parametrize(
    ("mode", "is_short", "num_hit"),
    [
        ("auto", False, 0),  # exact while memory allows
        ("auto", True, 80),
        ("compressed", False, 80),
        ("full", False, 0),
        ("full", True, 0),
    ],
)
@pytest.mark.parametrize("depth", [0, 1])
def test_retained_blocks_alone_serve_who_may_be_compressed(
    mode: str, is_short: bool, num_hit: int, depth: int
) -> None:
    """R blocks of a prefix are cached, its D blocks are gone."""
    echo = settings(recent_tokens=4, admit_full_below=0.9, look_ahead=False)
    world = World(161, echo, budget=300, depth=depth)
    first = world.add("first", prompt(81, 1), "full", max_tokens=2)
    world.step()
    residual = set(world.residual_row(first))
    world.run()
    world.pool.evict_blocks(residual)
    if is_short:
        world.add("hog", prompt(220, 2), "full", max_tokens=20)
        world.step()
    request = world.add("a", [*prompt(81, 1), 1, 2, 3], mode, max_tokens=12)
    assert world.manager.get_computed_blocks(request)[1] == num_hit
    world.step()
    if num_hit:
        assert ledger_of(world, request).taint == num_hit
        counters = world.residual.counters
        assert counters.admitted_compressed == 1, "it did not start with the full cache"
        assert not set(held(world, request)) & set(range(1, 19)), "nothing rebuilt is stored"
    world.run()
    world.check_published()
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


def test_pages_the_newcomer_takes_over_do_not_count_as_freed() -> None:
    world = World(69, settings(recent_tokens=0), budget=200)
    tokens = prompt(121, 1)
    holder = world.add("a", tokens, max_tokens=9)  # 31 + 31 pages; 6 are free
    world.step()
    world.step()
    newcomer = world.add("b", tokens[:80] + prompt(20, 2), "full", max_tokens=3)
    world.step()  # needs 10 pages; the oldest 19 pages of the holder are the newcomer's hit
    assert newcomer in world.running
    assert len(held(world, newcomer)) == 25
    assert held(world, holder)[1] > 20
    world.run()
    world.check_idle()


def test_a_d_block_is_used_only_beside_its_own_r_block() -> None:
    world = World(60, settings(), budget=200)
    tokens = prompt(41, 1)
    step = Step()
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
    world.manager.get_computed_blocks(third)  # as long as it waits, in every step
    assert world.residual.counters.hits_unpaired == 1
