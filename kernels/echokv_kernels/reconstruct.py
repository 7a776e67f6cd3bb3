"""Attention of discarded heads over keys and values rebuilt from the retained ones.

    features   x_K, x_V: the cached heads of a token's sources, concatenated, F elements each
    maps       K_hat_j = x_K Wk_j (+ bk_j),  V_hat_j = x_V Wv_j (+ bv_j)

The key map holds in block-rotated space (design: method.md §3): positions are cut into rotation
blocks, t = t0 + delta, and the map was trained on keys rotated by delta only. Cached source keys
are rotated by t, so they are rotated back by t0, mapped, and rotated forward by t0 again:

    rotation_block B    t0                     meaning
    0                   0                      absolute: cached keys as they are
    1                   t                      un-rotated keys
    else                t // B * B             in between
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .attention import SPAN_LEN, KeyValueContext, attend, check_head_dim, zero_unseen
from .rotary import Rotary
from .store import gather_pages
from .tiles import QueryTiles, Visibility, VisibleLen, cut_spans


@dataclass(frozen=True, eq=False)
class FeatureSource:
    """Where the features of one layer's discarded heads lie.

    Attributes:
        caches: one view [num_blocks, num_heads, block_size, 2 * head_dim] per source layer, all
            with the same block size and addressed by the same block table.
        heads: for each view the int64 indices of the source heads in it, in plan order; None
            stands for all of them.

    Raises:
        ValueError: no view, or views and heads do not pair up, or block sizes differ.
    """

    caches: Sequence[torch.Tensor]
    heads: Sequence[torch.Tensor | None]

    def __post_init__(self) -> None:
        if not self.caches or len(self.caches) != len(self.heads):
            raise ValueError(
                f"{len(self.caches)} caches and {len(self.heads)} head lists; pass one list of "
                "heads (or None) for each of at least one cache"
            )
        shapes = {tuple(cache.shape[2:]) for cache in self.caches}
        if len(shapes) > 1:
            raise ValueError(
                f"source caches have pages of {sorted(shapes)} (tokens, elements); sources must "
                "share one block table, hence one page shape"
            )

    @property
    def block_size(self) -> int:
        return self.caches[0].shape[2]

    @property
    def head_dim(self) -> int:
        return self.caches[0].shape[3] // 2

    @property
    def num_heads(self) -> int:
        return sum(self._counts())

    @property
    def width(self) -> int:
        """F, elements of one feature vector."""
        return self.num_heads * self.head_dim

    def _counts(self) -> list[int]:
        return [
            cache.shape[1] if heads is None else len(heads)
            for cache, heads in zip(self.caches, self.heads, strict=True)
        ]

    def gather(
        self, block_table: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the context positions [start, stop) of each block table row.

        Args:
            block_table: [u, P] int. Positions beyond it repeat its last page.
            start: first position.
            stop: position after the last.

        Returns:
            x_K (keys rotated as cached), x_V: [u, stop - start, F] float32.
        """
        block_size, head_dim = self.block_size, self.head_dim
        first_page = start // block_size
        num_pages = (stop - 1) // block_size + 1 - first_page
        num_rows = block_table.shape[0]
        features = torch.empty(
            2, num_rows, num_pages, block_size, self.num_heads, head_dim,
            dtype=torch.float32, device=block_table.device,
        )  # fmt: skip
        first = 0
        for cache, heads, count in zip(self.caches, self.heads, self._counts(), strict=True):
            pages = gather_pages(cache, block_table, first_page, num_pages, heads)
            slots = pages.unflatten(-1, (2, head_dim)).permute(4, 0, 1, 3, 2, 5)
            features[..., first : first + count, :].copy_(slots)
            first += count
        offset = start - first_page * block_size
        tokens = features.flatten(4, 5).flatten(2, 3)[:, :, offset : offset + stop - start]
        return tokens[0], tokens[1]


@dataclass(frozen=True, eq=False)
class EchoMaps:
    """Linear maps from features to the discarded heads of one layer, any float dtype.

    Attributes:
        key: [nd, F, head_dim].
        value: [nd, F, head_dim].
        key_bias: [nd, head_dim], in block-rotated space like the keys; or None.
        value_bias: [nd, head_dim] or None.

    Raises:
        ValueError: shapes disagree.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        num_heads, _, head_dim = self.key.shape
        for name, tensor, shape in (
            ("value", self.value, self.key.shape),
            ("key_bias", self.key_bias, (num_heads, head_dim)),
            ("value_bias", self.value_bias, (num_heads, head_dim)),
        ):
            if tensor is not None and tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; with a key map of "
                    f"{tuple(self.key.shape)} it must be {tuple(shape)}"
                )

    @property
    def num_heads(self) -> int:
        """nd, discarded heads."""
        return self.key.shape[0]

    @property
    def width(self) -> int:
        return self.key.shape[1]

    @property
    def head_dim(self) -> int:
        return self.key.shape[2]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> EchoMaps:
        biases = (
            None if bias is None else bias.to(device=device, dtype=dtype)
            for bias in (self.key_bias, self.value_bias)
        )
        return EchoMaps(
            self.key.to(device=device, dtype=dtype),
            self.value.to(device=device, dtype=dtype),
            *biases,
        )


def block_start(positions: torch.Tensor, rotation_block: int) -> torch.Tensor:
    """First position t0 of the rotation block each position lies in (all 0 for block 0)."""
    if rotation_block == 0:
        return torch.zeros_like(positions)
    return positions // rotation_block * rotation_block


def _project(x: torch.Tensor, maps: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[..., C, F] times [nd, F, d] is [..., C, nd, d], in float32."""
    num_heads, width, head_dim = maps.shape
    matrix = maps.to(torch.float32).permute(1, 0, 2).reshape(width, num_heads * head_dim)
    heads = (x @ matrix).unflatten(-1, (num_heads, head_dim))
    return heads if bias is None else heads + bias.to(torch.float32)


def rebuild(
    features: tuple[torch.Tensor, torch.Tensor],
    maps: EchoMaps,
    positions: torch.Tensor,
    rotation: Rotary,
    rotation_block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the discarded heads.

    Args:
        features: x_K, x_V [..., C, F] float32, keys rotated as cached.
        maps: the layer's maps.
        positions: [..., C] int64 or broadcastable to it, position of each token.
        rotation: the model's rotary embedding.
        rotation_block: rotation block the maps were trained with.

    Returns:
        K_hat rotated by the token's position, V_hat: [..., nd, C, head_dim] float32.
    """
    x_key, x_value = features
    if rotation_block:
        source_heads = x_key.unflatten(-1, (-1, maps.head_dim))
        t0 = block_start(positions, rotation_block)
        x_key = rotation.rotate(source_heads, -t0).flatten(-2)
    key = _project(x_key, maps.key, maps.key_bias)
    if rotation_block:
        key = rotation.rotate(key, t0)
    value = _project(x_value, maps.value, maps.value_bias)
    return key.transpose(-2, -3), value.transpose(-2, -3)


class _RebuiltContext(KeyValueContext):
    def __init__(
        self,
        source: FeatureSource,
        maps: EchoMaps,
        block_table: torch.Tensor,
        rotation: Rotary,
        rotation_block: int,
        group: int,
    ) -> None:
        super().__init__(maps.num_heads, maps.head_dim, group)
        self._source = source
        self._maps = maps.to(dtype=torch.float32)
        self._block_table = block_table
        self._rotation = rotation
        self._rotation_block = rotation_block

    def spans(self, length: int, query_tile: int) -> list[tuple[int, int]]:
        block_size = self._source.block_size
        return cut_spans(length, max(SPAN_LEN, block_size), block_size)

    def row_size(self, query_tile: int) -> int:
        # Gathered features, their rotated copy and the pages they came from.
        return super().row_size(query_tile) + SPAN_LEN * 6 * self._source.width

    def fetch(
        self, requests: torch.Tensor, span: tuple[int, int], seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_key, x_value = self._source.gather(self._block_table[requests], *span)
        positions = torch.arange(*span, device=x_key.device)
        features = x_key, zero_unseen(x_value, seen)
        return rebuild(features, self._maps, positions, self._rotation, self._rotation_block)


def inexact_work(
    tiles: list[QueryTiles],
    visible_len: VisibleLen,
    max_len: int,
    exact_mask: torch.Tensor,
    exact_block_size: int,
) -> list[tuple[QueryTiles, Visibility]]:
    """Rows that see the visible tokens outside exact pages. Tokens beyond the mask are not exact.

    Args:
        tiles: rows of the query tokens.
        visible_len: as in `attention.paged_attention`.
        max_len: no request is longer.
        exact_mask: [n, PD] bool.
        exact_block_size: tokens per page of the mask.
    """
    num_pages = -(-max_len // exact_block_size)
    missing = max(0, num_pages - exact_mask.shape[1])
    inexact = torch.nn.functional.pad(~exact_mask[:, :num_pages], (0, missing), value=True)
    return [
        (tile, Visibility.of(tile, visible_len, max_len, inexact, exact_block_size))
        for tile in tiles
    ]


def check_shapes(
    query: torch.Tensor,
    source: FeatureSource,
    maps: EchoMaps,
    rotation: Rotary,
    rotation_block: int,
) -> None:
    """Raises ValueError if query, sources, maps and rotation do not belong together."""
    check_head_dim(query, maps.head_dim)
    if source.width != maps.width or source.head_dim != maps.head_dim:
        raise ValueError(
            f"sources give features of {source.width} elements in heads of {source.head_dim}, "
            f"the maps want {maps.width} in heads of {maps.head_dim}; pass the sources of the "
            "maps' plan"
        )
    if rotation.head_dim != maps.head_dim:
        raise ValueError(
            f"the rotation is for heads of {rotation.head_dim} elements, the maps' have "
            f"{maps.head_dim}"
        )
    if rotation_block < 0:
        raise ValueError(
            f"rotation_block is {rotation_block}; use 0 (absolute), 1 (un-rotated) or a longer "
            "block"
        )


def rebuilt_attention(
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
    """Attention of discarded heads over the context tokens whose exact pages are gone.

    Token t of request r counts if it is visible and `not exact_mask[r, t // exact_block_size]`.
    Where no token counts nothing is read.

    Args:
        query: [T, nd * G, head_dim], query heads of the discarded heads, in the maps' order.
        source: where the features lie.
        maps: the layer's maps.
        block_table: [n, P] int, retained pages.
        tiles: rows of the query tokens.
        visible_len: [n] int, leading positions every query of the request sees; or "causal".
        exact_mask: [n, PD] bool (`store.exact_pages`).
        exact_block_size: tokens per residual page.
        rotation: the model's rotary embedding.
        rotation_block: rotation block the maps were trained with.
        scale: factor of the scores.
        max_len: no request is longer; positions from it on are not seen.

    Returns:
        out [T, nd * G, head_dim], lse [T, nd * G], float32; 0 and -inf where a query sees nothing.

    Raises:
        ValueError: sources, maps, rotation and query do not belong together.
    """
    check_shapes(query, source, maps, rotation, rotation_block)
    group = query.shape[1] // maps.num_heads
    context = _RebuiltContext(source, maps, block_table, rotation, rotation_block, group)
    max_len = min(max_len, block_table.shape[1] * source.block_size)
    work = inexact_work(tiles, visible_len, max_len, exact_mask, exact_block_size)
    return attend(query, maps.num_heads, context, work, scale)
