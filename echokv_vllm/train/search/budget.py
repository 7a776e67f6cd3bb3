"""Spreads one budget of retained heads over the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def spread(costs: Sequence[Mapping[int, float]], budget: int) -> list[int]:
    """Sizes of least total cost that add up to a budget, by dynamic programming.

    Args:
        costs: For every layer, its cost for every allowed number of retained heads.
        budget: Retained heads of all layers together.

    Returns:
        The number of every layer.

    Raises:
        ValueError: If no allowed numbers add up to the budget.
    """
    # heads spent so far -> least cost and the numbers behind it
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer_costs in costs:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (cost, sizes) in best.items():
            for size, extra in layer_costs.items():
                candidate = (cost + extra, (*sizes, size))
                total = spent + size
                if total <= budget and (total not in longer or candidate < longer[total]):
                    longer[total] = candidate
        best = longer
    if budget not in best:
        raise ValueError(f"no allowed numbers of heads add up to {budget}; found {sorted(best)}")
    return list(best[budget][1])
