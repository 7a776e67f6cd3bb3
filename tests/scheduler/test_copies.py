"""A prefix that was computed again serves those after it, whatever copies of it are cached."""

from __future__ import annotations

import pytest
from echo_pool import settings
from paged_world import World, ledger_of, prompt

SHARED = 192  # tokens of the prefix that all requests begin with


def after_pressure(**changes: int) -> World:
    """A world whose cache has the prefix's retained heads, but no longer all of its residuals."""
    echo = settings(recent_tokens=8, admit_full_below=0.9, look_ahead=False, **changes)
    pages = SHARED // echo.residual_block_size
    world = World(2001, echo, budget=2000)
    first = world.add("first", [*prompt(SHARED, 1), *prompt(9, 2)], "auto", max_tokens=3)
    world.step()
    residual = world.residual_row(first)
    world.run()
    world.pool.evict_blocks(set(residual[pages // 2 :]))
    return world


def num_hit(world: World, name: str, seed: int, mode: str) -> int:
    request = world.add(name, [*prompt(SHARED, 1), *prompt(9, seed)], mode, max_tokens=3)
    world.step()
    num_adopted = ledger_of(world, request).num_adopted
    world.run()
    world.check_published()
    return num_adopted


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 8), (12, 8)])
@pytest.mark.parametrize("mode", ["auto", "full"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_prefix_is_computed_again_once(sizes: tuple[int, int], mode: str, is_mixed: bool) -> None:
    world = after_pressure(retained_block_size=sizes[0], residual_block_size=sizes[1])
    hits = []
    for index in range(4):
        if is_mixed:  # compressed ones read and publish the old retained heads
            assert num_hit(world, f"c{index}", 500 + index, "compressed") == SHARED
        hits.append(num_hit(world, f"r{index}", 100 + index, mode))
    assert hits == [SHARED // 2, SHARED, SHARED, SHARED]
    assert world.residual.counters.hits_unpaired == 0
    world.check_idle()


def test_after_a_burst_of_pinned_requests_the_prefix_is_computed_again_once() -> None:
    """As it comes about: pressure takes the residuals of a prefix that others hold."""
    echo = settings(recent_tokens=8, admit_full_below=0.9, look_ahead=False)
    world = World(2001, echo, budget=2000)
    num_hit(world, "a", 2, "auto")
    world.add("b", [*prompt(SHARED, 1), *prompt(1000, 4)], "auto", max_tokens=60)
    world.step()
    world.step()
    world.add("h", prompt(3200, 5), "full", max_tokens=4)
    world.run()
    assert world.residual.counters.pages_dropped > 0
    hits = [num_hit(world, f"r{index}", 100 + index, "auto") for index in range(4)]
    assert hits[0] < SHARED and hits[1:] == [SHARED] * 3


def test_copies_that_already_make_pairs_are_left_alone() -> None:
    world = World(400, settings(), budget=400)
    tokens = [*prompt(SHARED, 1), *prompt(9, 2)]
    for name in "ab":  # both are admitted before either has published anything
        request = world.add(name, tokens, "full", max_tokens=3)
        request.skip_reading_prefix_cache = True
    world.step()
    rows = [world.rows[name] for name in "ab"]
    cached = world.pool.cached_block_hash_to_block
    for row in rows:
        for page in (*row[0][:48], *row[1][:48]):
            assert cached.contain(world.pool.blocks[page].block_hash, page)
    world.run()
    world.check_idle()


def test_a_running_request_keeps_blocks_that_left_the_cache() -> None:
    world = after_pressure()
    holder = world.add("holder", [*prompt(SHARED, 1), *prompt(9, 3)], "compressed", max_tokens=90)
    world.step()
    old = list(world.rows["holder"][0][:48])
    assert num_hit_beside(world, "again") == SHARED // 2
    assert world.rows["holder"][0][:48] == old
    assert all(world.pool.blocks[page].ref_cnt == 1 for page in old[24:])
    assert all(world.pool.blocks[page].block_hash is None for page in old[24:])
    world.run()  # the symbolic worker raises if a token read is not the holder's
    assert holder in world.finished
    world.check_idle()


def num_hit_beside(world: World, name: str) -> int:
    request = world.add(name, [*prompt(SHARED, 1), *prompt(9, 7)], "full", max_tokens=3)
    world.step()
    return ledger_of(world, request).num_adopted
