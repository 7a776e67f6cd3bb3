"""Attention over exact keys and values, in pages or just computed.

Portable: plain PyTorch on any device, float32 inside whatever the input. It serves on CPUs and
is the reference of the Triton kernels.

One loop serves every kind of context (`attend`): rows of queries (tiles.QueryTiles) against spans
of context positions, longest rows first, a bounded number of rows at a time, each row only in the
spans where it sees something. A `Context` says where keys and values come from.
"""

from __future__ import annotations

from typing import Protocol

import torch

from .softmax import OnlineSoftmax
from .store import gather_pages
from .tiles import QueryTiles, Visibility, VisibleLen, cut_spans

SPAN_LEN = 512  # context tokens per step: long enough for efficient products
_WORKING_SET = 1 << 24  # float32 elements one step may use, 64 MiB


class Context(Protocol):
    """Keys and values that rows of queries attend to.

    Attributes:
        value_size: elements of what is averaged, which `finish` turns into the output.
    """

    value_size: int

    def spans(self, length: int, query_tile: int) -> list[tuple[int, int]]:
        """Cuts context positions [0, length) into steps."""

    def row_size(self, query_tile: int) -> int:
        """Float32 elements one row takes in the largest step, roughly."""

    def state_shape(self, query: torch.Tensor) -> tuple[int, int, int]:
        """[w, *, *] shape of the scores without their last axis."""

    def step(
        self,
        query: torch.Tensor,
        request: torch.Tensor,
        span: tuple[int, int],
        seen: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and values of one span.

        Args:
            query: [w, heads, G * Q, head_dim] float32, already scaled.
            request: [w] int64.
            span: first context position, and the one after the last.
            seen: [w, C] bool, some query of the row sees the token. What is stored elsewhere may
                be NaN.

        Returns:
            scores [*state_shape, C] contiguous, NaN allowed where not seen; values
            [w, *, C, value_size] finite everywhere. Both float32.
        """

    def finish(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Turns averages [*state_shape, value_size] into outputs [w, heads, G * Q, head_dim]."""


def attend(
    query: torch.Tensor,
    num_kv_heads: int,
    context: Context,
    work: list[tuple[QueryTiles, Visibility]],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all query tokens over a context.

    Args:
        query: [T, num_kv_heads * G, head_dim], any float dtype; head i belongs to KV head i // G.
        num_kv_heads: heads of the context.
        context: where keys and values come from.
        work: disjoint sets of rows, and what they see.
        scale: factor of the scores.

    Returns:
        out [T, num_kv_heads * G, head_dim], lse [T, num_kv_heads * G], float32; 0 and -inf for
        tokens without a row and queries that see nothing.

    Raises:
        ValueError: the number of query heads is no multiple of `num_kv_heads`.
    """
    num_tokens, num_heads, head_dim = query.shape
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly; pass the query "
            "heads of exactly the KV heads in the cache"
        )
    # Padding is written to one more token, which is cut off at the end.
    out = torch.zeros(num_tokens + 1, num_heads, head_dim, dtype=torch.float32, device=query.device)
    lse = out.new_full((num_tokens + 1, num_heads), float("-inf"))
    for tiles, visibility in work:
        assert tiles.num_tokens <= num_tokens, (
            f"rows address {tiles.num_tokens} tokens, the query has {num_tokens}"
        )
        row_limit = visibility.limit.amax(1)
        spans = context.spans(int(row_limit.amax()), tiles.query_tile)
        if not spans:
            continue
        touched = visibility.touched(spans)
        order = row_limit.argsort(descending=True, stable=True)
        order = order[touched.any(1)[order]]
        if not len(order):
            continue
        rows_at_once = max(1, _WORKING_SET // context.row_size(tiles.query_tile))
        for rows in order.split(rows_at_once):
            token = tiles.token[rows]
            grouped = query[token].to(torch.float32).mul_(scale)
            grouped = grouped.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
            part, part_lse = _attend_rows(
                grouped.flatten(2, 3), context, visibility, rows, spans, touched[rows]
            )
            at = torch.where(tiles.valid[rows], token, num_tokens)
            out[at] = part.unflatten(2, (-1, tiles.query_tile)).flatten(1, 2).transpose(1, 2)
            lse[at] = part_lse.view(len(rows), num_heads, tiles.query_tile).transpose(1, 2)
    return out[:num_tokens], lse[:num_tokens]


def _attend_rows(
    query: torch.Tensor,
    context: Context,
    visibility: Visibility,
    rows: torch.Tensor,
    spans: list[tuple[int, int]],
    touched: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One set of rows [w] over all spans; `query` as in `Context.step`.

    Returns out [w, heads, G * Q, head_dim] and lse [*state_shape].
    """
    softmax = OnlineSoftmax(context.state_shape(query), context.value_size, query.device)
    for i, num_touched in enumerate(touched.sum(0).tolist()):
        if num_touched == 0:
            continue
        some = None if num_touched == len(rows) else touched[:, i].nonzero().squeeze(1)
        here = rows if some is None else rows[some]
        visible = visibility.visible(here, *spans[i])
        scores, values = context.step(
            query if some is None else query[some],
            visibility.request[here],
            spans[i],
            visible.any(1),
        )
        if not bool(visible.all()):
            by_query = scores.view(len(here), -1, visible.shape[1], visible.shape[2])
            by_query.masked_fill_(~visible[:, None], float("-inf"))
        softmax.update(scores, values, some)
    out, lse = softmax.finish()
    return context.finish(out, lse), lse


def distinct(
    request: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The requests of some rows, each once, so that its context is fetched once.

    Args:
        request: [w] int64.
        seen: [w, C] bool.

    Returns:
        The requests [u], which tokens any of their rows sees [u, C], and the place [w] of each
        row's request among them; None if the rows are one per request already.
    """
    requests, place = request.unique(return_inverse=True)
    if len(requests) == len(request):
        return request, seen, None
    count = torch.zeros(len(requests), seen.shape[1], dtype=torch.int32, device=seen.device)
    return requests, count.index_add_(0, place, seen.to(torch.int32)) > 0, place


def zero_unseen(values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Zeroes what no query sees: a weight of 0 does not silence NaN.

    Args:
        values: [u, ..., C, size].
        seen: [u, C] bool.
    """
    if bool(seen.all()):
        return values
    shape = (seen.shape[0], *[1] * (values.dim() - 3), seen.shape[1], 1)
    return torch.where(seen.view(shape), values, 0.0)


class KeyValueContext:
    """A context whose keys and values can be fetched span by span; subclasses say how.

    Args:
        num_heads: KV heads.
        head_dim: elements of one key or value.
        group: query heads per KV head.
    """

    def __init__(self, num_heads: int, head_dim: int, group: int) -> None:
        self._num_heads = num_heads
        self._head_dim = head_dim
        self._group = group
        self.value_size = head_dim

    def spans(self, length: int, query_tile: int) -> list[tuple[int, int]]:
        return cut_spans(length, SPAN_LEN)

    def row_size(self, query_tile: int) -> int:
        per_token = 4 * self._head_dim + 2 * self._group * query_tile
        return SPAN_LEN * self._num_heads * per_token

    def state_shape(self, query: torch.Tensor) -> tuple[int, int, int]:
        return query.shape[0], query.shape[1], query.shape[2]

    def step(
        self,
        query: torch.Tensor,
        request: torch.Tensor,
        span: tuple[int, int],
        seen: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        requests, seen, place = distinct(request, seen)
        key, value = self.fetch(requests, span, seen)
        if place is not None:
            key, value = key[place], value[place]
        return query @ key.transpose(-1, -2), value

    def finish(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return out

    def fetch(
        self, requests: torch.Tensor, span: tuple[int, int], seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fetches a span of some requests.

        Args:
            requests: [u] int64.
            span: first context position, and the one after the last.
            seen: [u, C] bool, tokens that some query of the request sees.

        Returns:
            Keys and values [u, heads, C, head_dim] float32; values are finite even where not seen.
        """
        raise NotImplementedError


class _PagedContext(KeyValueContext):
    def __init__(self, cache: torch.Tensor, block_table: torch.Tensor, group: int) -> None:
        super().__init__(cache.shape[1], cache.shape[3] // 2, group)
        self._cache = cache
        self._block_table = block_table

    def spans(self, length: int, query_tile: int) -> list[tuple[int, int]]:
        block_size = self._cache.shape[2]
        return cut_spans(length, max(SPAN_LEN, block_size), block_size)

    def fetch(
        self, requests: torch.Tensor, span: tuple[int, int], seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, stop = span
        block_size = self._cache.shape[2]
        pages = gather_pages(
            self._cache,
            self._block_table[requests],
            start // block_size,
            (stop - start) // block_size,
        )
        num_requests, num_pages, num_heads = pages.shape[:3]
        slots = torch.empty(
            num_requests, num_heads, num_pages, block_size, 2 * self._head_dim,
            dtype=torch.float32, device=pages.device,
        )  # fmt: skip
        slots.copy_(pages.transpose(1, 2))
        key, value = slots.flatten(2, 3).split(self._head_dim, dim=-1)
        return key, zero_unseen(value, seen)


class _FreshContext(KeyValueContext):
    def __init__(
        self, key: torch.Tensor, value: torch.Tensor, query_start_loc: torch.Tensor, group: int
    ) -> None:
        super().__init__(key.shape[1], key.shape[2], group)
        self._key = key
        self._value = value
        self._start = query_start_loc.to(device=key.device, dtype=torch.int64)

    def fetch(
        self, requests: torch.Tensor, span: tuple[int, int], seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        position = torch.arange(*span, device=self._key.device)
        token = (self._start[requests, None] + position).clamp(max=self._key.shape[0] - 1)
        key, value = (
            tensor[token].transpose(1, 2).to(torch.float32).contiguous()
            for tensor in (self._key, self._value)
        )
        return key, zero_unseen(value, seen)


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: list[QueryTiles],
    visible_len: VisibleLen,
    scale: float,
    *,
    max_len: int,
    page_mask: torch.Tensor | None = None,
    page_mask_block_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over keys and values in pages.

    Args:
        query: [T, num_heads * G, head_dim], the query heads of the cache's heads, in its order.
        cache: [num_blocks, num_heads, block_size, 2 * head_dim]; unused slots may be NaN.
        block_table: [n, P] int.
        tiles: rows of the query tokens (`split_queries`).
        visible_len: "causal" (a query at position p sees positions 0 to p) or [n] int, number of
            leading positions every query of the request sees.
        scale: factor of the scores.
        max_len: no request is longer; positions from it on are not seen.
        page_mask: [n, Pm] bool; a token t counts only if
            `page_mask[r, t // page_mask_block_size]`. None: all count.
        page_mask_block_size: tokens per page of the mask.

    Returns:
        out [T, num_heads * G, head_dim], lse [T, num_heads * G], float32; 0 and -inf where a
        query sees nothing.

    Raises:
        ValueError: head counts or head sizes do not match.
    """
    num_heads, head_dim = cache.shape[1], cache.shape[3] // 2
    check_head_dim(query, head_dim)
    context = _PagedContext(cache, block_table, query.shape[1] // num_heads)
    max_len = min(max_len, block_table.shape[1] * cache.shape[2])
    work = [
        (tile, Visibility.of(tile, visible_len, max_len, page_mask, page_mask_block_size))
        for tile in tiles
    ]
    return attend(query, num_heads, context, work, scale)


def fresh_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: list[QueryTiles],
    query_start_loc: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention among the tokens that one step computes for the same request.

    Args:
        query: [T, num_heads * G, head_dim].
        key: [T, num_heads, head_dim], rotated like the query.
        value: [T, num_heads, head_dim].
        tiles: rows of the query tokens.
        query_start_loc: [n + 1] int, first token of each request.
        scale: factor of the scores.

    Returns:
        out, lse: as in `paged_attention`.

    Raises:
        ValueError: head counts or head sizes do not match.
    """
    check_head_dim(query, key.shape[2])
    context = _FreshContext(key, value, query_start_loc, query.shape[1] // key.shape[1])
    start = query_start_loc.to(device=key.device, dtype=torch.int64)
    work = [
        (tile, Visibility(tile.request, tile.token - start[tile.request, None] + 1))
        for tile in tiles
    ]
    return attend(query, key.shape[1], context, work, scale)


def check_head_dim(query: torch.Tensor, head_dim: int) -> None:
    """Raises ValueError if query heads and key heads differ in size."""
    if query.shape[-1] != head_dim:
        raise ValueError(
            f"query heads have {query.shape[-1]} elements, key heads {head_dim}; they must agree"
        )
