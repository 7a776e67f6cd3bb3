"""What a plan search is asked for, and which ratios can be reached. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

_TOLERANCE = 0.01


@dataclass(frozen=True)
class SearchOptions:
    """One plan search.

    Attributes:
        ratio: Bytes of the retained heads over bytes of all heads, rounded to whole heads by at
            most 0.01.
        uniform: Every layer retains equally many heads.
        shards: Every layer retains equally many heads in each of so many contiguous groups of
            heads, and rebuilds a head from its own group only (tensor parallelism).
        neighbours: Also look for source heads in so many earlier layers.
        max_sources: Source heads of a layer at most, its own included, where there are neighbours.
            None: as many as the layer has KV heads, so that decode reads no more than of a full
            cache.
        rotation_block: B of the maps' key space.
        ridge: Ridge of the maps, relative to the mean squared feature.
        max_position: Positions are spread over [0, max_position).
        recent_tokens: Recent tokens that stay exact.
        sink_tokens: First tokens that stay exact.
        batch_size: Sequences per forward pass.
        seed: Seed of position offsets, sampled queries and labels.
        max_tokens: Moments are summed over at most so many tokens.
        num_probes: Sequences whose queries are sampled; at most a quarter of all (but 4).
        num_queries: Sampled queries per sequence.
        shortlist: Sets of heads per layer whose cost is computed exactly; half as many per number
            of heads when layers may differ in it.

    Raises:
        ValueError: If a number is out of range.
    """

    ratio: float
    uniform: bool = False
    shards: int = 1
    neighbours: int = 0
    max_sources: int | None = None
    rotation_block: int = 64
    ridge: float = 1e-4
    max_position: int = 131_072
    recent_tokens: int = 128
    sink_tokens: int = 4
    batch_size: int = 4
    seed: int = 0
    max_tokens: int = 262_144
    num_probes: int = 24
    num_queries: int = 128
    shortlist: int = 12

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        for name in ("shards", "batch_size", "max_tokens", "num_probes", "num_queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours} must be at least 0")


def check_ratio(ratio: float) -> None:
    """Refuse what is no share of the bytes.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if not 0 < ratio < 1:
        raise ValueError(
            f"ratio={ratio} must lie between 0 and 1: the share of the cache's bytes that stays, "
            "such as 0.5"
        )


def head_budget(
    ratio: float,
    num_layers: int,
    num_kv_heads: int,
    shards: int = 1,
    uniform: bool = False,
    max_sources: int | None = None,
) -> int:
    """Heads that one shard retains, over all layers together.

    Every layer retains at least one head per shard, and at least one layer discards some.

    Raises:
        ValueError: If the ratio cannot be reached within 0.01; names those that can. Or if a layer
            would have more than `max_sources`.
    """
    check_ratio(ratio)
    if num_kv_heads % shards:
        raise ValueError(
            f"shards={shards} does not divide the model's {num_kv_heads} KV heads; choose a "
            "divisor of it"
        )
    heads_per_shard = num_kv_heads // shards
    if heads_per_shard == 1:
        raise ValueError(
            f"shards={shards} leaves one KV head per shard, which nothing in its shard can "
            "rebuild; use fewer shards, or a plan without a search (paper-0.5, paper-0.3)"
        )
    step = num_layers if uniform else 1
    full = num_layers * heads_per_shard
    allowed = range(num_layers, full, step)
    best = min(allowed, key=lambda budget: (abs(budget / full - ratio), budget))
    if abs(best / full - ratio) > _TOLERANCE + 1e-9:
        around = [budget / full for budget in allowed if abs(budget - ratio * full) < step]
        nearest = around or [best / full]
        constraint = f"{num_layers} layers of {num_kv_heads} KV heads, shards={shards}" + (
            ", uniform" if uniform else ""
        )
        remedy = "choose one of these" + (", or uniform=False (--no-uniform)" if uniform else "")
        raise ValueError(
            f"ratio={ratio} cannot be reached with {constraint}; reachable are "
            f"{allowed[0] / full:.4g} to {allowed[-1] / full:.4g} in steps of {step / full:.4g}, "
            f"nearest {' and '.join(f'{value:.4g}' for value in nearest)}; {remedy}"
        )
    # Some layer retains as many heads as the mean.
    check_max_sources(max_sources, -(-best * shards // num_layers))
    return best


def check_max_sources(max_sources: int | None, num_retained: int) -> None:
    """Refuse a bound that a layer's own retained heads, which are its sources, exceed.

    Raises:
        ValueError: If they do.
    """
    if max_sources is not None and max_sources < num_retained:
        raise ValueError(
            f"max_sources={max_sources} is below the {num_retained} heads that a layer retains, "
            f"which are its sources; use {num_retained} or more, or a lower ratio"
        )
