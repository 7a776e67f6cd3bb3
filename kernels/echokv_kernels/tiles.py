"""How the work of one step is cut: query tokens into rows, context positions into spans.

    flat token axis      r0 r0 r0 r1 r2 r2 r2 r2 r2          query_start_loc 0 3 4 9
    decode rows  (Q=1)   [r1]
    prefill rows (Q=4)   [r0 r0 r0 --] [r2 r2 r2 r2] [r2 -- -- --]      -- is padding

A row belongs to one request, so one gather of its context serves all its queries. A span is a
range of context positions; it is the same range for every row that looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

VisibleLen = Literal["causal"] | torch.Tensor

DEFAULT_QUERY_TILE = 64


@dataclass(frozen=True, eq=False)
class QueryTiles:
    """Query tokens grouped into W rows of up to Q tokens of one request.

    Attributes:
        request: [W] int64, index of the row's request.
        token: [W, Q] int64, index into the flat token axis; padding repeats the row's last token.
        valid: [W, Q] bool, false for padding.
        position: [W, Q] int64, position of the token in its own sequence; padding as in `token`.
        num_tokens: length of the part of the flat token axis that requests own.
        query_tile: Q.
    """

    request: torch.Tensor
    token: torch.Tensor
    valid: torch.Tensor
    position: torch.Tensor
    num_tokens: int
    query_tile: int

    @classmethod
    def build(
        cls,
        query_start_loc_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        query_tile: int,
        requests: torch.Tensor | None = None,
    ) -> QueryTiles:
        """Cuts the queries of `requests` (default: all) into rows, request after request.

        Args:
            query_start_loc_cpu: [n + 1] int on the CPU, first flat token of each request; the
                number of rows depends on it, so it must not live on an accelerator.
            seq_lens: [n] int on the device of the result, context plus query tokens.
            query_tile: Q, at least 1.
            requests: indices of the wanted requests, int64 on the CPU.

        Raises:
            ValueError: shapes disagree, or `query_tile` is not positive.
        """
        num_requests = query_start_loc_cpu.shape[0] - 1
        if seq_lens.shape != (num_requests,):
            raise ValueError(
                f"seq_lens has shape {tuple(seq_lens.shape)}; query_start_loc describes "
                f"{num_requests} requests, so it must be ({num_requests},)"
            )
        if query_tile < 1:
            raise ValueError(f"query_tile is {query_tile}; it must be at least 1")
        device = seq_lens.device
        start = query_start_loc_cpu.to(torch.int64)
        if requests is None:
            requests = torch.arange(num_requests, device="cpu")
        query_len = start[requests + 1] - start[requests]
        num_rows = (query_len + query_tile - 1) // query_tile
        request = requests.repeat_interleave(num_rows)
        first_row = (num_rows.cumsum(0) - num_rows).repeat_interleave(num_rows)
        row_in_request = torch.arange(request.shape[0], device="cpu") - first_row
        column = torch.arange(query_tile, device="cpu")
        token = start[request, None] + row_in_request[:, None] * query_tile + column
        end = start[request + 1, None]
        valid = token < end
        token = token.minimum(end - 1)
        # A request's last query token sits at the last position of its sequence.
        from_end = (end - token).to(device)
        request = request.to(device)
        return cls(
            request=request,
            token=token.to(device),
            valid=valid.to(device),
            position=seq_lens.to(torch.int64)[request, None] - from_end,
            num_tokens=int(start[-1]),
            query_tile=query_tile,
        )


def split_queries(
    query_start_loc_cpu: torch.Tensor,
    seq_lens: torch.Tensor,
    query_tile: int = DEFAULT_QUERY_TILE,
) -> list[QueryTiles]:
    """One set of rows for requests with a single query token (Q=1), one for the others.

    Empty sets are left out, and so are requests without query tokens.

    Args:
        query_start_loc_cpu: [n + 1] int on the CPU.
        seq_lens: [n] int on the device of the result.
        query_tile: Q of the second set.
    """
    query_len = query_start_loc_cpu.diff()
    tiles = []
    for chosen, tile in ((query_len == 1, 1), (query_len > 1, query_tile)):
        requests = chosen.nonzero().squeeze(1)
        if requests.numel():
            tiles.append(QueryTiles.build(query_start_loc_cpu, seq_lens, tile, requests))
    return tiles


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which context positions each query of a set of rows may see.

    Attributes:
        request: [W] int64, index of the row's request.
        limit: [W, Q] int64, number of leading positions the query may see.
        page_mask: [n, Pm] bool, pages of each request that count; None if all do. Columns
            beyond a request's length may hold anything.
        page_mask_block_size: tokens per page of the mask.
    """

    request: torch.Tensor
    limit: torch.Tensor
    page_mask: torch.Tensor | None = None
    page_mask_block_size: int = 1

    @classmethod
    def of(
        cls,
        tiles: QueryTiles,
        visible_len: VisibleLen,
        max_len: int,
        page_mask: torch.Tensor | None = None,
        page_mask_block_size: int = 1,
    ) -> Visibility:
        """Visibility of a context that is causal, or as long as `visible_len` for every query."""
        if isinstance(visible_len, torch.Tensor):
            limit = visible_len.to(torch.int64)[tiles.request, None].expand_as(tiles.token)
        elif visible_len == "causal":
            limit = tiles.position + 1
        else:
            raise ValueError(
                f'visible_len is {visible_len!r}; it must be "causal" or a tensor with one length '
                "per request"
            )
        if page_mask is not None:
            max_len = min(max_len, page_mask.shape[1] * page_mask_block_size)
        return cls(tiles.request, limit.clamp(max=max_len), page_mask, page_mask_block_size)

    def touched(self, spans: list[tuple[int, int]]) -> torch.Tensor:
        """[W, len(spans)] bool: the row sees at least one position of the span.

        Exact, so that a span in which no page counts costs nothing but this.
        """
        start, stop = torch.tensor(spans, dtype=torch.int64, device=self.limit.device).unbind(1)
        stop = torch.minimum(self.limit.amax(1)[:, None], stop)
        touched = start < stop
        if self.page_mask is None:
            return touched
        counted = torch.nn.functional.pad(self.page_mask.cumsum(1, dtype=torch.int32), (1, 0))
        first_page = (start // self.page_mask_block_size).clamp(max=self.page_mask.shape[1])
        last_page = torch.where(touched, (stop - 1) // self.page_mask_block_size, 0)
        row = self.request[:, None]
        return touched & (counted[row, last_page + 1] > counted[row, first_page])

    def visible(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """[w, Q, stop - start] bool: what each query of the chosen rows sees of a span."""
        position = torch.arange(start, stop, device=self.limit.device)
        visible = position < self.limit[rows][..., None]
        if self.page_mask is None:
            return visible
        page = (position // self.page_mask_block_size).clamp(max=self.page_mask.shape[1] - 1)
        return visible & self.page_mask[self.request[rows, None], page][:, None]


def cut_spans(length: int, span_len: int, align: int = 1) -> list[tuple[int, int]]:
    """Cuts positions [0, length) into spans of whole multiples of `align`.

    Args:
        length: number of positions.
        span_len: the longest span; at least `align`.
        align: all spans start and end at multiples of it, so the last may reach beyond `length`.
    """
    step = span_len // align * align
    end = -(-length // align) * align
    return [(start, min(start + step, end)) for start in range(0, end, step)]


def cut_blocks(length: int, span_len: int, block_len: int) -> list[tuple[int, int]]:
    """Cuts positions [0, length) into spans that do not cross a multiple of `block_len`.

    Args:
        length: number of positions.
        span_len: the longest span.
        block_len: tokens per block.
    """
    return [
        (start, min(start + span_len, block + block_len, length))
        for block in range(0, length, block_len)
        for start in range(block, min(block + block_len, length), span_len)
    ]
