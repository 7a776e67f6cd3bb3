"""The part of an echo plan that one tensor-parallel rank serves, in the rank's own head numbers.

    plan: 8 heads, shards=2, retained 0 1 4 5         rank 0 of 2: heads 0-3, retained 0 1
                                                      rank 1 of 2: heads 4-7, retained 0 1 (4 5)

A discarded head is rebuilt from heads of its own shard only. A rank that owns several shards
(serving with fewer ranks than shards) has one echo group per shard.
"""

from __future__ import annotations

from dataclasses import dataclass

from echokv_vllm.plan import EchoPlan


@dataclass(frozen=True)
class EchoGroup:
    """Discarded heads of one layer and shard, with the features they share.

    Attributes:
        discarded: Places of the heads among the rank's discarded heads of the layer.
        map_rows: Rows of the checkpoint's maps, in the same order.
        sources: (layer, places of the source heads in that layer's R page), feature order.
    """

    discarded: tuple[int, ...]
    map_rows: tuple[int, ...]
    sources: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class RankLayer:
    """What one rank stores for one layer.

    Attributes:
        retained: The rank's KV heads kept in R pages, in page order.
        discarded: The rank's KV heads kept in D pages, in page order.
        groups: How the discarded heads are rebuilt.
    """

    retained: tuple[int, ...]
    discarded: tuple[int, ...]
    groups: tuple[EchoGroup, ...]


def rank_layers(plan: EchoPlan, rank: int, tp_size: int) -> tuple[RankLayer, ...]:
    """The layers of ``plan`` as rank ``rank`` of ``tp_size`` sees them.

    Raises:
        ValueError: The plan's shards cannot be dealt out to the ranks.
    """
    if plan.shards % tp_size:
        way_out = f", or train with --shards {tp_size}"
        if plan.num_kv_heads % tp_size:
            way_out = f"; no plan can deal the model's {plan.num_kv_heads} KV heads to {tp_size}"
        raise ValueError(
            f"The checkpoint's plan {plan.name!r} has {plan.shards} head shard(s), which cannot be "
            f"served with --tensor-parallel-size {tp_size}: the ranks would need each other's "
            f"heads. Use a size that divides {plan.shards}{way_out}."
        )
    heads_per_rank = plan.num_kv_heads // tp_size
    own = range(rank * heads_per_rank, (rank + 1) * heads_per_rank)
    return tuple(_rank_layer(plan, layer, own) for layer in range(plan.num_layers))


def _rank_layer(plan: EchoPlan, layer: int, own: range) -> RankLayer:
    all_discarded = plan.discarded(layer)
    discarded = [head for head in all_discarded if head in own]
    groups = []
    for shard in sorted({plan.shard_of(head) for head in discarded}):
        heads = [head for head in discarded if plan.shard_of(head) == shard]
        groups.append(
            EchoGroup(
                discarded=tuple(discarded.index(head) for head in heads),
                map_rows=tuple(all_discarded.index(head) for head in heads),
                sources=_sources(plan, layer, shard, own),
            )
        )
    return RankLayer(
        retained=tuple(head - own.start for head in plan.layers[layer].retained if head in own),
        discarded=tuple(head - own.start for head in discarded),
        groups=tuple(groups),
    )


def _sources(
    plan: EchoPlan, layer: int, shard: int, own: range
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    sources: list[tuple[int, list[int]]] = []
    for source_layer, head in plan.source_heads(layer, shard):
        stored = [h for h in plan.layers[source_layer].retained if h in own]
        if not sources or sources[-1][0] != source_layer:
            sources.append((source_layer, []))
        sources[-1][1].append(stored.index(head))
    return tuple((source_layer, tuple(places)) for source_layer, places in sources)
