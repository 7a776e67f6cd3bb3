"""What all layers of one step need to know about its requests, on the device.

A *decode* is a request with one query token; any longer one is a *prefill chunk*; one without
query tokens or without any token is padding. A request is *compressed* when one of its tokens
lies in a residual page that is not exact (`store.exact_pages`).

Stock paged attention reads a request through two block-table rows, one per group, each with the
number of tokens it may read. Part 0 is R, part 1 is D:

    request                    R row, length            D row, length
    decode, not compressed     R table, seq_len         D table, seq_len
    decode, compressed         R table, 0               its exact pages in order, their tokens
    prefill, not compressed    R table, seq_len         D table, seq_len
    prefill, compressed        R table, seq_len         D table, 0

Compressed decodes are laid end to end on one axis of tokens, each rounded up to whole tiles and
followed by a gap for the time that beginning with a request takes. The axis is cut into equal
shares, one per program: all programs end together, whatever the lengths are. A share that reaches
into another request is two work items; item number = share + request, so that no two items have
the same number and a request's items follow each other. A share of nothing but a gap is no item.

    shares      |     0     |     1     |     2     |     3     |
    requests    |0                 |1          |2               |
    items       |0          |1     |2    |3    |4   |5          |
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from .store import exact_pages


@dataclass(frozen=True)
class Shares:
    """How the tokens of compressed decodes are cut.

    Attributes:
        num_shares: at most so many shares, one per program.
        align: requests and shares are rounded up to a multiple of it, tokens.
        min_len: a share has at least so many tokens.
        request_cost: tokens whose time a program needs to begin with a request.
        rotation_block: a line of absorbed queries per so many tokens; 0: one line per request,
            1: none.

    Raises:
        ValueError: a number is out of range.
    """

    num_shares: int
    align: int
    min_len: int
    request_cost: int
    rotation_block: int

    @property
    def gap(self) -> int:
        """Places on the axis behind each request."""
        return -(-self.request_cost // self.align) * self.align

    def __post_init__(self) -> None:
        for name, minimum in (("num_shares", 1), ("align", 1), ("min_len", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        for name in ("request_cost", "rotation_block"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")


class StepKind(enum.IntEnum):
    """What is known of all requests of a step before the device has looked at their pages.

    Attributes:
        MIXED: nothing.
        FULL: none lacks a residual page. `StepPlan.broken` tells if that was wrong.
        COMPRESSED: every decode is to be treated as compressed, also one whose pages are all exact.
    """

    MIXED = 0
    FULL = 1
    COMPRESSED = 2


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Persistent device buffers; captured graphs keep their addresses.

    Entries of requests that are not in the step, and columns beyond a request's length, keep what
    an earlier step left there.

    Attributes:
        exact: [max_reqs, PD] uint8, 1 where a D page holds what its place in the table says.
        compressed: [max_reqs] int32, 1 if a token of the request lies in a page that is not exact.
        tables: [2 * max_reqs, max(PR, PD)] int32, block-table rows; `row_of` finds them.
        lens: [2 * max_reqs] int32, tokens that may be read through each row.
        token_end: [max_reqs] int64, where each request and its gap end on the axis of compressed
            decodes.
        line_end: [max_reqs] int32, rotation blocks of the compressed decodes up to and including
            each: a line of absorbed queries for each block.
        share_len: [1] int64, tokens per share.
        items: [max_reqs, 2] int32, each request's first work item and the one behind its last,
            equal where there are none.
        broken: [1] int32 in host memory that the device can write, set once a step that was
            promised to be full was not.
        paired: whether a request's two rows are neighbours; otherwise all R rows come first.
        retained_block_size: tokens per R page.
        residual_block_size: tokens per D page.
        max_reqs: requests there is room for.
    """

    exact: torch.Tensor
    compressed: torch.Tensor
    tables: torch.Tensor
    lens: torch.Tensor
    token_end: torch.Tensor
    line_end: torch.Tensor
    share_len: torch.Tensor
    items: torch.Tensor
    broken: torch.Tensor
    paired: bool
    retained_block_size: int
    residual_block_size: int
    max_reqs: int

    @classmethod
    def allocate(
        cls,
        max_reqs: int,
        max_model_len: int,
        retained_block_size: int,
        residual_block_size: int,
        paired: bool,
        device: torch.device,
    ) -> StepPlan:
        """Buffers for up to `max_reqs` requests of up to `max_model_len` tokens.

        Raises:
            ValueError: a size is below 1.
        """
        sizes = {
            "max_reqs": max_reqs,
            "max_model_len": max_model_len,
            "retained_block_size": retained_block_size,
            "residual_block_size": residual_block_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        retained_pages = -(-max_model_len // retained_block_size)
        residual_pages = -(-max_model_len // residual_block_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            exact=zeros(max_reqs, residual_pages, dtype=torch.uint8),
            compressed=zeros(max_reqs),
            tables=zeros(2 * max_reqs, max(retained_pages, residual_pages)),
            lens=zeros(2 * max_reqs),
            token_end=zeros(max_reqs, dtype=torch.int64),
            line_end=zeros(max_reqs),
            share_len=torch.ones(1, dtype=torch.int64, device=device),
            items=zeros(max_reqs, 2),
            broken=torch.zeros(
                1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
            ),
            paired=paired,
            retained_block_size=retained_block_size,
            residual_block_size=residual_block_size,
            max_reqs=max_reqs,
        )

    @property
    def row_strides(self) -> tuple[int, int]:
        """Rows from one request to the next, and from a request's R row to its D row."""
        return (2, 1) if self.paired else (1, self.max_reqs)

    def row_of(self, request: int, part: int) -> int:
        """Row of `tables` and `lens`; part 0 is R, part 1 is D."""
        per_request, per_part = self.row_strides
        return request * per_request + part * per_part


def check_step(
    plan: StepPlan,
    owner: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_reqs: int,
) -> None:
    """Checks what `plan_step` is given, without looking at device data.

    Raises:
        ValueError: an argument does not fit; see `plan_step`.
    """
    if not 0 <= num_reqs <= plan.max_reqs:
        raise ValueError(
            f"num_reqs is {num_reqs}; the plan has room for 0 to {plan.max_reqs}, allocate a "
            "larger one"
        )
    if owner.dtype != torch.int64 or owner.dim() != 1 or not owner.is_contiguous():
        raise ValueError(
            f"owner has dtype {owner.dtype} and shape {tuple(owner.shape)}; pass contiguous "
            "int64, one per block"
        )
    for name, table in zip(("retained_table", "residual_table"), tables, strict=True):
        if (
            table.dtype != torch.int32
            or table.dim() != 2
            or table.shape[0] < num_reqs
            or table.shape[1] < 1
            or table.stride(1) != 1
        ):
            raise ValueError(
                f"{name} has dtype {table.dtype}, shape {tuple(table.shape)} and strides "
                f"{table.stride()}; pass int32 rows, contiguous, for at least {num_reqs} requests"
            )
    lengths = (("query_start_loc", query_start_loc, num_reqs + 1), ("seq_lens", seq_lens, num_reqs))
    for name, tensor, needed in lengths:
        if tensor.dim() != 1 or tensor.shape[0] < needed or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; pass at least {needed} contiguous numbers"
            )
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} has dtype {tensor.dtype}; pass int32 or int64")


def _ceil_div(number: torch.Tensor, divisor: int | torch.Tensor) -> torch.Tensor:
    return (number + divisor - 1) // divisor


def _plan_rows(
    plan: StepPlan,
    owner: torch.Tensor,
    retained_table: torch.Tensor,
    residual_table: torch.Tensor,
    decode: torch.Tensor,
    seq_lens: torch.Tensor,
    kind: StepKind,
) -> None:
    """Everything but the work items; decode [n] bool, seq_lens [n] int64, 0 for padding."""
    n = seq_lens.shape[0]
    sizes = (plan.retained_block_size, plan.residual_block_size)
    covers = []  # [n, pages] bool, which columns of each table lie within the request
    for table, size in zip((retained_table, residual_table), sizes, strict=True):
        column = torch.arange(table.shape[1], device=owner.device)
        covers.append(column < _ceil_div(seq_lens, size)[:, None])
    # Columns beyond the length may hold anything.
    retained = torch.where(covers[0], retained_table, 0)
    residual = torch.where(covers[1], residual_table, 0)
    exact = exact_pages(owner, retained, residual, *sizes)
    missing = covers[1] & ~exact
    compressed = missing.any(1)
    if kind is StepKind.FULL and bool(compressed.any()):
        plan.broken.fill_(1)
    if kind is StepKind.COMPRESSED:
        compressed |= decode
    kept = covers[1] & (exact | ~decode[:, None])
    first_token = torch.arange(residual.shape[1], device=owner.device) * sizes[1]
    tokens = (seq_lens[:, None] - first_token).clamp(max=sizes[1])
    exact_len = torch.where(kept, tokens, 0).sum(1)

    per_request, per_part = plan.row_strides
    row = torch.arange(n, device=owner.device) * per_request
    request, column = covers[0].nonzero(as_tuple=True)
    plan.tables[row[request], column] = retained[request, column]
    request, column = kept.nonzero(as_tuple=True)
    place = kept.cumsum(1)[request, column] - 1
    plan.tables[row[request] + per_part, place] = residual[request, column]
    request, column = covers[1].nonzero(as_tuple=True)
    plan.exact[request, column] = exact[request, column].to(torch.uint8)
    plan.compressed[:n] = compressed.to(torch.int32)
    plan.lens[row] = torch.where(decode & compressed, 0, seq_lens).to(torch.int32)
    plan.lens[row + per_part] = torch.where(~decode & compressed, 0, exact_len).to(torch.int32)


def plan_step(
    plan: StepPlan,
    owner: torch.Tensor,
    retained_table: torch.Tensor,
    residual_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_reqs: int,
    shares: Shares,
    kind: StepKind = StepKind.MIXED,
) -> None:
    """Fills the plan of one step, after `store.stamp_owners`.

    Args:
        plan: written in place: the entries of the first `num_reqs` requests and `share_len`.
        owner: [num_blocks] int64.
        retained_table: [>= n, PR] int32, block ids of the R pages.
        residual_table: [>= n, PD] int32, block ids of the D pages, 0 where there is none.
        query_start_loc: [>= n + 1] int32, first query token of each request.
        seq_lens: [>= n] int32, tokens of each request including this step's. They must fit the
            tables and the plan.
        num_reqs: n, requests of the step including padding.
        shares: how compressed decodes are cut.
        kind: what the caller knows of all requests.

    Raises:
        ValueError: too many requests for the plan, or a dtype or shape does not fit.
    """
    tables = (retained_table, residual_table)
    check_step(plan, owner, tables, query_start_loc, seq_lens, num_reqs)
    if num_reqs == 0:
        return
    query_lens = query_start_loc[: num_reqs + 1].to(torch.int64).diff()
    lens = torch.where(query_lens > 0, seq_lens[:num_reqs].to(torch.int64), 0)
    decode = query_lens == 1
    columns = (plan.tables.shape[1], plan.exact.shape[1])
    retained, residual = (
        table[:num_reqs, :width] for table, width in zip(tables, columns, strict=True)
    )
    _plan_rows(plan, owner, retained, residual, decode, lens, kind)
    plan_shares(plan, torch.where(decode & plan.compressed[:num_reqs].bool(), lens, 0), shares)


def plan_shares(plan: StepPlan, tokens: torch.Tensor, shares: Shares) -> None:
    """Fills `token_end`, `line_end`, `share_len` and `items`.

    Args:
        plan: written in place.
        tokens: [n] int64, 0 for requests that are not compressed decodes.
        shares: how they are cut.
    """
    padded = _ceil_div(tokens, shares.align) * shares.align + torch.where(tokens > 0, shares.gap, 0)
    share_len = _ceil_div(padded.sum(), shares.num_shares).clamp(min=shares.min_len)
    share_len = _ceil_div(share_len, shares.align) * shares.align
    end = padded.cumsum(0)
    plan.share_len.copy_(share_len)
    plan.token_end[: tokens.shape[0]] = end
    request = torch.arange(tokens.shape[0], device=tokens.device)
    first = torch.where(tokens > 0, (end - padded) // share_len, 0) + request
    last = torch.where(tokens > 0, (end - shares.gap - 1) // share_len + request + 1, first)
    plan.items[: tokens.shape[0]] = torch.stack((first, last), 1).to(torch.int32)
    if shares.rotation_block == 0:
        lines = (tokens > 0).to(torch.int64)
    elif shares.rotation_block == 1:
        lines = torch.zeros_like(tokens)
    else:
        lines = _ceil_div(tokens, shares.rotation_block)
    plan.line_end[: tokens.shape[0]] = lines.cumsum(0).to(torch.int32)
