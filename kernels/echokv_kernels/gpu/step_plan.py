"""Planning one step on the device, in two launches. Reference: `echokv_kernels.step_plan`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from echokv_kernels.step_plan import Shares, StepKind, StepPlan, check_step

PAGE_BLOCK = 1024  # columns of a block table per round of a program
PAGE_WARPS = 8
FULL, COMPRESSED = tl.constexpr(int(StepKind.FULL)), tl.constexpr(int(StepKind.COMPRESSED))


@triton.jit
def _request(
    query_start_loc_ptr,  # [>= n + 1] int32 or int64
    seq_lens_ptr,  # [>= n] int32 or int64
    request,
    mask,
):
    """Query tokens and all tokens (0 for padding) of requests, int32; undefined if masked."""
    start = tl.load(query_start_loc_ptr + request, mask=mask)
    end = tl.load(query_start_loc_ptr + request + 1, mask=mask)
    query_len = (end - start).to(tl.int32)
    seq_len = tl.load(seq_lens_ptr + request, mask=mask).to(tl.int32)
    return query_len, tl.where(query_len > 0, seq_len, 0)


@triton.jit
def _copy_row(
    row_ptr,  # [columns of tables] int32, written
    table_ptr,  # [PR] int32
    num_pages,
    PAGE_BLOCK: tl.constexpr,
):
    for first in range(0, num_pages, PAGE_BLOCK):
        column = first + tl.arange(0, PAGE_BLOCK)
        mask = column < num_pages
        tl.store(row_ptr + column, tl.load(table_ptr + column, mask=mask), mask=mask)


@triton.jit
def _find_exact(
    exact_ptr,  # [PD] uint8, written
    row_ptr,  # [columns of tables] int32, written
    owner_ptr,  # [num_blocks] int64
    retained_table_ptr,  # [PR] int32
    residual_table_ptr,  # [PD] int32
    retained_columns,
    num_pages,
    seq_len,
    is_decode,
    RETAINED_BLOCK: tl.constexpr,
    RESIDUAL_BLOCK: tl.constexpr,
    PAGE_BLOCK: tl.constexpr,
):
    """Number of pages that are not exact, and tokens in the pages written to the row."""
    num_kept = 0
    missing = tl.zeros([PAGE_BLOCK], tl.int32)
    kept_tokens = tl.zeros([PAGE_BLOCK], tl.int32)
    for first in range(0, num_pages, PAGE_BLOCK):
        column = first + tl.arange(0, PAGE_BLOCK)
        known = column < num_pages
        token = column * RESIDUAL_BLOCK
        page = tl.load(residual_table_ptr + column, mask=known, other=0)
        place = tl.minimum(token // RETAINED_BLOCK, retained_columns - 1)
        retained = tl.load(retained_table_ptr + place, mask=known, other=0).to(tl.int64)
        tag = retained * RETAINED_BLOCK + token % RETAINED_BLOCK
        present = known & (page != 0)
        stamp = tl.load(owner_ptr + page.to(tl.int64), mask=present, other=-1)
        exact = present & (stamp == tag)
        tl.store(exact_ptr + column, exact.to(tl.uint8), mask=known)
        kept = tl.where(is_decode, exact, known)
        rank = tl.cumsum(kept.to(tl.int32), 0)
        tl.store(row_ptr + num_kept + rank - 1, page, mask=kept)
        num_kept += tl.sum(kept.to(tl.int32), 0)
        missing += known.to(tl.int32) - exact.to(tl.int32)
        kept_tokens += tl.where(kept, tl.minimum(seq_len - token, RESIDUAL_BLOCK), 0)
    return tl.sum(missing, 0), tl.sum(kept_tokens, 0)


@triton.jit(do_not_specialize=["kind"])
def _rows_kernel(
    exact_ptr,  # [max_reqs, PD] uint8
    compressed_ptr,  # [max_reqs] int32
    tables_ptr,  # [2 * max_reqs, max(PR, PD)] int32
    lens_ptr,  # [2 * max_reqs] int32
    broken_ptr,  # [1] int32
    owner_ptr,  # [num_blocks] int64
    retained_table_ptr,  # [>= n, PR] int32
    residual_table_ptr,  # [>= n, PD] int32
    query_start_loc_ptr,  # [>= n + 1] int32 or int64
    seq_lens_ptr,  # [>= n] int32 or int64
    retained_columns,
    residual_columns,
    kind,  # StepKind
    stride_exact,
    stride_tables,
    stride_retained_table,
    stride_residual_table,
    ROWS_PER_REQUEST: tl.constexpr,
    ROWS_PER_PART: tl.constexpr,
    RETAINED_BLOCK: tl.constexpr,
    RESIDUAL_BLOCK: tl.constexpr,
    PAGE_BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_len, seq_len = _request(query_start_loc_ptr, seq_lens_ptr, request, None)
    is_decode = query_len == 1
    row = request * ROWS_PER_REQUEST
    retained_table_ptr += request * stride_retained_table
    if part == 0:
        num_pages = tl.minimum(tl.cdiv(seq_len, RETAINED_BLOCK), retained_columns)
        _copy_row(tables_ptr + row * stride_tables, retained_table_ptr, num_pages, PAGE_BLOCK)
    else:
        num_pages = tl.minimum(tl.cdiv(seq_len, RESIDUAL_BLOCK), residual_columns)
        num_missing, kept_len = _find_exact(
            exact_ptr + request * stride_exact,
            tables_ptr + (row + ROWS_PER_PART) * stride_tables,
            owner_ptr,
            retained_table_ptr,
            residual_table_ptr + request * stride_residual_table,
            retained_columns,
            num_pages,
            seq_len,
            is_decode,
            RETAINED_BLOCK,
            RESIDUAL_BLOCK,
            PAGE_BLOCK,
        )
        compressed = num_missing > 0
        if (kind == FULL) & compressed:
            tl.store(broken_ptr, 1)
        compressed = compressed | ((kind == COMPRESSED) & is_decode)
        tl.store(compressed_ptr + request, compressed.to(tl.int32))
        tl.store(lens_ptr + row, tl.where(is_decode & compressed, 0, seq_len))
        usable = is_decode | (num_missing == 0)
        tl.store(lens_ptr + row + ROWS_PER_PART, tl.where(usable, kept_len, 0))


@triton.jit(do_not_specialize=["num_reqs", "num_shares", "align", "min_len", "gap"])
def _shares_kernel(
    token_end_ptr,  # [max_reqs] int64
    line_end_ptr,  # [max_reqs] int32
    share_len_ptr,  # [1] int64
    items_ptr,  # [max_reqs, 2] int32
    compressed_ptr,  # [max_reqs] int32
    query_start_loc_ptr,  # [>= n + 1] int32 or int64
    seq_lens_ptr,  # [>= n] int32 or int64
    num_reqs,
    num_shares,
    align,
    min_len,
    gap,
    ROTATION_BLOCK: tl.constexpr,
    REQUEST_BLOCK: tl.constexpr,
):
    request = tl.arange(0, REQUEST_BLOCK)
    known = request < num_reqs
    query_len, seq_len = _request(query_start_loc_ptr, seq_lens_ptr, request, known)
    compressed = tl.load(compressed_ptr + request, mask=known, other=0)
    tokens = tl.where((query_len == 1) & (compressed != 0), seq_len, 0)
    padded = ((tokens + align - 1) // align * align).to(tl.int64) + tl.where(tokens > 0, gap, 0)
    share_len = tl.maximum((tl.sum(padded, 0) + num_shares - 1) // num_shares, min_len)
    share_len = (share_len + align - 1) // align * align
    tl.store(share_len_ptr, share_len)
    end = tl.cumsum(padded, 0)
    tl.store(token_end_ptr + request, end, mask=known)
    first_share, last_share = (end - padded) // share_len, (end - gap - 1) // share_len
    num_items = tl.where(padded > 0, last_share - first_share + 1, 0).to(tl.int32)
    first = tl.where(padded > 0, first_share, 0).to(tl.int32) + request
    tl.store(items_ptr + 2 * request, first, mask=known)
    tl.store(items_ptr + 2 * request + 1, first + num_items, mask=known)
    if ROTATION_BLOCK == 0:
        lines = (tokens > 0).to(tl.int32)
    elif ROTATION_BLOCK == 1:
        lines = tokens * 0
    else:
        lines = (tokens + ROTATION_BLOCK - 1) // ROTATION_BLOCK
    tl.store(line_end_ptr + request, tl.cumsum(lines, 0), mask=known)


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
    """Fills the plan of one step, after `stamp_owners`. No allocation, no synchronisation.

    Arguments and errors are those of `echokv_kernels.step_plan.plan_step`. The grid follows
    `num_reqs`, so a captured graph serves every step that is padded to as many requests.
    """
    tables = (retained_table, residual_table)
    check_step(plan, owner, tables, query_start_loc, seq_lens, num_reqs)
    if num_reqs == 0:
        return
    rows_per_request, rows_per_part = plan.row_strides
    _rows_kernel[(num_reqs, 2)](
        plan.exact,
        plan.compressed,
        plan.tables,
        plan.lens,
        plan.broken,
        owner,
        retained_table,
        residual_table,
        query_start_loc,
        seq_lens,
        min(retained_table.shape[1], plan.tables.shape[1]),
        min(residual_table.shape[1], plan.exact.shape[1]),
        int(kind),
        plan.exact.stride(0),
        plan.tables.stride(0),
        retained_table.stride(0),
        residual_table.stride(0),
        ROWS_PER_REQUEST=rows_per_request,
        ROWS_PER_PART=rows_per_part,
        RETAINED_BLOCK=plan.retained_block_size,
        RESIDUAL_BLOCK=plan.residual_block_size,
        PAGE_BLOCK=PAGE_BLOCK,
        num_warps=PAGE_WARPS,
    )
    _shares_kernel[(1,)](
        plan.token_end,
        plan.line_end,
        plan.share_len,
        plan.items,
        plan.compressed,
        query_start_loc,
        seq_lens,
        num_reqs,
        shares.num_shares,
        shares.align,
        shares.min_len,
        shares.gap,
        ROTATION_BLOCK=shares.rotation_block,
        # Of the plan's size, not the step's: one variant is compiled, before serving.
        REQUEST_BLOCK=max(32, triton.next_power_of_2(plan.max_reqs)),
        num_warps=4,
    )
