"""Which sets of heads are worth an exact score: all sets by their cheap cost, or the best found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from echokv_vllm.train.search.criterion import Elimination

Heads = tuple[int, ...]
"""Retained heads, ascending."""

# Up to so many sets are all looked at; with more heads, greedy choice and exchange find good ones.
_MAX_EXHAUSTIVE = 1000
_MAX_SWEEPS = 3


def shortlist(
    everything: Elimination, num_heads: int, sizes: Iterable[int], count: int
) -> dict[int, list[Heads]]:
    """The cheapest sets of every size.

    Args:
        everything: Moments of the heads, none retained yet.
        num_heads: Heads to choose from, at least 2.
        sizes: Set sizes, 1 to num_heads - 1.
        count: Sets per size at most.

    Returns:
        Sets in order of cost for every size.
    """
    wanted = sorted(set(sizes))
    if sum(math.comb(num_heads, size) for size in range(1, wanted[-1] + 1)) <= _MAX_EXHAUSTIVE:
        costs = _all_sets(everything, num_heads, wanted[-1])
    else:
        costs = _good_sets(everything, num_heads, wanted)
    return {
        size: sorted((heads for heads in costs if len(heads) == size), key=costs.__getitem__)[
            :count
        ]
        for size in wanted
    }


def _all_sets(everything: Elimination, num_heads: int, largest: int) -> dict[Heads, float]:
    costs: dict[Heads, float] = {}

    def extend(heads: Heads, state: Elimination) -> None:
        cost = state.cost()
        for head in range(heads[-1] + 1 if heads else 0, num_heads):
            longer = (*heads, head)
            costs[longer] = cost - state.gain(head)
            if len(longer) < largest and head < num_heads - 1:
                extend(longer, state.retain(head))

    extend((), everything)
    return costs


def _good_sets(everything: Elimination, num_heads: int, sizes: list[int]) -> dict[Heads, float]:
    costs: dict[Heads, float] = {}
    path: Heads = ()
    state = everything
    while len(path) < sizes[-1]:
        best = _try_all(path, state, num_heads, costs)
        state = state.retain(*set(best) - set(path))
        path = best
        if len(path) in sizes:
            _exchange(everything, path, num_heads, costs)
    return costs


def _try_all(heads: Heads, state: Elimination, num_heads: int, costs: dict[Heads, float]) -> Heads:
    """Note the cost of every set with one more head; the best of them."""
    cost = state.cost()
    tried = {
        tuple(sorted((*heads, head))): cost - state.gain(head)
        for head in range(num_heads)
        if head not in heads
    }
    costs.update(tried)
    return min(tried, key=tried.__getitem__)


def _exchange(
    everything: Elimination, heads: Heads, num_heads: int, costs: dict[Heads, float]
) -> None:
    """Swap one head at a time while that helps, noting the cost of every set tried."""
    for _ in range(_MAX_SWEEPS):
        swaps = [
            _try_all(tuple(kept for kept in heads if kept != head), state, num_heads, costs)
            for head, state in _without_each(everything, heads)
        ]
        best = min(swaps, key=costs.__getitem__)
        if costs[best] >= costs[heads]:
            return
        heads = best


def _without_each(state: Elimination, heads: Heads) -> Iterator[tuple[int, Elimination]]:
    """Every head of a set, with the state in which all the others are retained."""
    if len(heads) == 1:
        yield heads[0], state
        return
    half = len(heads) // 2
    for first, rest in ((heads[:half], heads[half:]), (heads[half:], heads[:half])):
        inner = state
        for head in rest:
            inner = inner.retain(head)
        yield from _without_each(inner, first)
