"""Extra source heads from earlier layers.

They cost no bytes, because those layers retain them anyway, but decode reads them once more: its
bytes are those of a layer's source heads. So their number is bounded, and a head is added only
where it takes away some of what the plan loses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from echokv_vllm.train.search.covariance import HeadAt
from echokv_vllm.train.search.score import Scorer

MIN_GAIN = 0.02
"""What a step must take away at least, relative to the mean cost of a layer."""


def heads_in_reach(
    retained: Sequence[tuple[int, ...]], layer: int, heads: range, reach: int
) -> list[HeadAt]:
    """What the `reach` layers before `layer` retain of `heads`, ascending."""
    earlier = range(max(0, layer - reach), layer)
    return [(at, head) for at in earlier for head in retained[at] if head in heads]


def extra_sources(
    scorer: Scorer,
    retained: list[tuple[int, ...]],
    num_kv_heads: int,
    shards: int,
    reach: int,
    max_sources: int,
) -> list[list[HeadAt]]:
    """Choose extra sources for every layer.

    One step adds one head to every shard of a layer, so that shards read equally many. Where all
    heads in reach fit, all are taken.

    Args:
        scorer: Scores sources exactly.
        retained: Retained heads of every layer.
        num_kv_heads: Heads of a layer.
        shards: Head shards.
        reach: Earlier layers to look at.
        max_sources: Source heads of a layer at most, its own included; of all shards.

    Returns:
        (layer, head) pairs for every layer, ascending.
    """
    units = _Units(scorer, retained, num_kv_heads, shards)
    costs = [units.costs(layer, [()] * shards) for layer in range(len(retained))]
    threshold = MIN_GAIN * sum(map(sum, costs)) / len(costs)
    found = []
    for layer, before in enumerate(costs):
        extra: list[tuple[HeadAt, ...]] = [()] * shards
        room = max(0, max_sources - len(retained[layer])) // shards
        everything = [units.in_reach(layer, shard, reach) for shard in range(shards)]
        if sum(before) < threshold:
            room = 0
        elif all(len(heads) == len(everything[0]) <= room for heads in everything):
            extra, room = [tuple(heads) for heads in everything], 0
        for _ in range(room):
            longer = [units.best_addition(layer, shard, extra[shard], reach) for shard in
                      range(shards)]  # fmt: skip
            if any(len(new) == len(old) for new, old in zip(longer, extra, strict=True)):
                break
            after = units.costs(layer, longer)
            if sum(before) - sum(after) < threshold:
                break
            before, extra = after, longer
        found.append(sorted(head for heads in extra for head in heads))
    return found


class _Units:
    """The shards of every layer, each rebuilt for itself."""

    def __init__(
        self, scorer: Scorer, retained: list[tuple[int, ...]], num_kv_heads: int, shards: int
    ) -> None:
        self._scorer = scorer
        self._retained = retained
        self._size = num_kv_heads // shards

    def _heads(self, shard: int) -> range:
        return range(shard * self._size, (shard + 1) * self._size)

    def _cost(self, layer: int, shard: int, extra: tuple[HeadAt, ...]) -> torch.Tensor:
        heads, retained = self._heads(shard), self._retained[layer]
        kept = [(layer, head) for head in retained if head in heads]
        discarded = [head for head in heads if head not in retained]
        if not discarded:
            return torch.zeros(())
        return self._scorer.cost(layer, discarded, [*sorted(extra), *kept])

    def costs(self, layer: int, extra: list[tuple[HeadAt, ...]]) -> list[float]:
        """Cost of every shard of a layer."""
        return [float(self._cost(layer, shard, heads)) for shard, heads in enumerate(extra)]

    def in_reach(self, layer: int, shard: int, reach: int) -> list[HeadAt]:
        """What earlier layers retain of a shard, ascending."""
        return heads_in_reach(self._retained, layer, self._heads(shard), reach)

    def best_addition(
        self, layer: int, shard: int, extra: tuple[HeadAt, ...], reach: int
    ) -> tuple[HeadAt, ...]:
        """The sources with the best one more; unchanged if there is none."""
        candidates = [
            (*extra, head) for head in self.in_reach(layer, shard, reach) if head not in extra
        ]
        if not candidates:
            return extra
        costs = torch.stack([self._cost(layer, shard, heads) for heads in candidates])
        return candidates[int(costs.argmin())]
