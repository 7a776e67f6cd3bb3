"""Attention of discarded heads without rebuilding them: the maps move to the query.

Scores need only one vector per query and rotation block, values one projection per query (design:
method.md §3), both linear in the cached features:

    q'      = R(t0)^T q                    the query, rotated back to the block's start
    a       = R(t0) (Wk_j q')              F elements, rotated forward head by head
    score_t = a . x_K(t)  (+ q' . bk_j)    straight from the cached, rotated source keys
    out     = Wv_j^T (sum_t p_t x_V(t))  (+ bv_j)

Reads F elements per token for keys and F for values, whatever the number of discarded heads.
"""

from __future__ import annotations

import torch

from .attention import SPAN_LEN, attend, distinct, zero_unseen
from .reconstruct import EchoMaps, FeatureSource, check_shapes, inexact_work
from .rotary import Rotary
from .tiles import QueryTiles, VisibleLen, cut_blocks, cut_spans

_ABSORBED_SIZE = 1 << 22  # float32 elements of one row's absorbed queries per span, 16 MiB


class _AbsorbedContext:
    """Features as keys and values; the discarded heads are one wide head to the online softmax."""

    def __init__(
        self,
        source: FeatureSource,
        maps: EchoMaps,
        block_table: torch.Tensor,
        rotation: Rotary,
        rotation_block: int,
        group: int,
    ) -> None:
        self._source = source
        self._maps = maps.to(dtype=torch.float32)
        self._block_table = block_table
        self._rotation = rotation
        self._rotation_block = rotation_block
        self._group = group
        self.value_size = source.width

    def _blocks_per_span(self, query_tile: int) -> int:
        if self._rotation_block == 0:
            return 1
        absorbed_size = self._maps.num_heads * self._group * query_tile * self._source.width
        return max(1, min(SPAN_LEN // self._rotation_block, _ABSORBED_SIZE // absorbed_size))

    def spans(self, length: int, query_tile: int) -> list[tuple[int, int]]:
        blocks = self._blocks_per_span(query_tile)
        block_len = self._rotation_block or max(length, 1)
        if blocks == 1 or length <= block_len:
            return cut_blocks(length, SPAN_LEN, block_len)
        return cut_spans(length, blocks * block_len, block_len)

    def row_size(self, query_tile: int) -> int:
        num_queries = self._maps.num_heads * self._group * query_tile
        absorbed = 3 * self._blocks_per_span(query_tile) * num_queries * self._source.width
        return absorbed + SPAN_LEN * (5 * self._source.width + 3 * num_queries)

    def state_shape(self, query: torch.Tensor) -> tuple[int, int, int]:
        return query.shape[0], 1, query.shape[1] * query.shape[2]

    def step(
        self,
        query: torch.Tensor,
        request: torch.Tensor,
        span: tuple[int, int],
        seen: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        requests, seen, place = distinct(request, seen)
        x_key, x_value = self._source.gather(self._block_table[requests], *span)
        x_value = zero_unseen(x_value, seen)
        if place is not None:
            x_key, x_value = x_key[place], x_value[place]
        absorbed, offset = self._absorb(query, span)
        by_block = x_key.unflatten(1, (absorbed.shape[1], -1))
        scores = absorbed @ by_block.transpose(-1, -2)
        if offset is not None:
            scores = scores + offset[..., None]
        return scores.transpose(1, 2).flatten(2, 3).contiguous()[:, None], x_value[:, None]

    def _absorb(
        self, query: torch.Tensor, span: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Absorbed queries of every rotation block in the span.

        Args:
            query: [w, nd, M, head_dim] float32.
            span: whole rotation blocks, or a part of one.

        Returns:
            a [w, blocks, nd * M, F], and the scores' offset [w, blocks, nd * M] if keys have a
            bias.
        """
        start, stop = span
        block_len = self._rotation_block
        num_blocks = max(1, (stop - start) // block_len) if block_len else 1
        query = query[:, None].expand(-1, num_blocks, -1, -1, -1)
        if block_len:
            t0 = start // block_len + torch.arange(num_blocks, device=query.device)
            cos, sin = (
                angle[None, :, None, None] for angle in self._rotation.cos_sin(t0 * block_len)
            )
            query = self._rotation.turn(query, cos, -sin)
        absorbed = query @ self._maps.key.transpose(1, 2)
        if block_len:
            heads = absorbed.unflatten(-1, (-1, self._maps.head_dim))
            absorbed = self._rotation.turn(heads, cos[..., None, :], sin[..., None, :]).flatten(-2)
        offset = None
        if self._maps.key_bias is not None:
            offset = (query @ self._maps.key_bias[:, :, None]).squeeze(-1).flatten(2)
        return absorbed.flatten(2, 3), offset

    def finish(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        mean = out.unflatten(2, (self._maps.num_heads, -1)).squeeze(1)
        heads = mean @ self._maps.value
        if self._maps.value_bias is None:
            return heads
        # Weights add up to 1, unless the query saw nothing.
        seen = lse.view(heads.shape[:-1]) > float("-inf")
        return heads + self._maps.value_bias[:, None] * seen[..., None]


def absorbed_decode(
    query: torch.Tensor,
    source: FeatureSource,
    maps: EchoMaps,
    block_table: torch.Tensor,
    tiles: list[QueryTiles],
    visible_len: VisibleLen,
    exact_mask: torch.Tensor,
    exact_block_size: int,
    rotation: Rotary,
    rotation_block: int,
    scale: float,
    *,
    max_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reconstruct.rebuilt_attention`, same arguments and result, by absorbed queries.

    Cheaper than rebuilding when a row has few queries (decoding).

    Raises:
        ValueError: sources, maps, rotation and query do not belong together; or the rotation
            block is 1, where every token would need its own absorbed query.
    """
    check_shapes(query, source, maps, rotation, rotation_block)
    if rotation_block == 1:
        raise ValueError(
            "rotation_block is 1: un-rotated keys cannot be absorbed into the query; use "
            "reconstruct.rebuilt_attention"
        )
    group = query.shape[1] // maps.num_heads
    context = _AbsorbedContext(source, maps, block_table, rotation, rotation_block, group)
    max_len = min(max_len, block_table.shape[1] * source.block_size)
    work = inexact_work(tiles, visible_len, max_len, exact_mask, exact_block_size)
    return attend(query, maps.num_heads, context, work, scale)
