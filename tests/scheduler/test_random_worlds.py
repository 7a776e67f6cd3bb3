"""Every invariant after every step of random worlds."""

from __future__ import annotations

import pytest
from random_worlds import play


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
