"""Work items to one mean per row: the softmax over the programs that shared a request's tokens.

    item      mean, maximum and total of the tokens that one program took of one request
    mean      weighted features of all of them, echoed rows [F], rows of retained heads [HEAD_DIM]

Needs nothing of stock attention, so it runs beside it, before `combine`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.overlap import let_next_begin, wait_for_previous


@triton.jit
def reduce_items(
    item_mean_ptr,  # [items, ROW_PAD, F] cache dtype, at the first column
    maximum_ptr,  # [items, ROW_PAD] float32
    total_ptr,  # [items, ROW_PAD] float32
    first,
    last,
    row,  # [GROUP_PAD] int32
    real,  # [GROUP_PAD] bool
    F: tl.constexpr,
    ROW_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Means [GROUP_PAD, COLUMNS] and log-sum-exps [GROUP_PAD] of rows over items, float32."""
    item = tl.arange(0, ITEMS)
    element = tl.arange(0, COLUMNS)
    largest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, COLUMNS], tl.float32)
    for start in range(first, last, ITEMS):
        mask = ((start + item) < last)[:, None] & real[None, :]
        at = (start + item)[:, None] * ROW_PAD + row[None, :]
        maximum = tl.load(maximum_ptr + at, mask=mask, other=float("-inf"))
        totals = tl.load(total_ptr + at, mask=mask, other=0.0)
        means = tl.load(
            item_mean_ptr + (at.to(tl.int64) * F)[:, :, None] + element[None, None, :],
            mask=mask[:, :, None],
            other=0.0,
        )
        new = tl.maximum(largest, tl.max(maximum, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp2(largest - base)
        weight = totals * tl.exp2(maximum - base[None, :])
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep[:, None] + tl.sum(means.to(tl.float32) * weight[:, :, None], 0)
        largest = new
    seen = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, largest + tl.log2(seen), float("-inf"))
    return acc / seen[:, None], lse


@triton.jit
def reduce_kernel(
    row_source_ptr,  # [NUM_ROWS] int32
    items_ptr,  # [n, 2] int32
    item_mean_ptr,  # [items, ROW_PAD, F] cache dtype
    maximum_ptr,  # [items, ROW_PAD] float32
    total_ptr,  # [items, ROW_PAD] float32
    mean_ptr,  # [n, MEAN_SIZE], written
    lse_ptr,  # [n, NUM_ROWS] float32, log2, written; -inf for rows that saw nothing
    NUM_ECHOED: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    ITEMS: tl.constexpr,
    MEAN_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (n, programs of a request). A part is one KV head's rows, COLUMNS of their features."""
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    ECHO_ROWS: tl.constexpr = NUM_ECHOED * GROUP
    ECHO_PARTS: tl.constexpr = NUM_ECHOED * (F // COLUMNS)
    OWN_PARTS: tl.constexpr = HEAD_DIM // COLUMNS
    NUM_PARTS: tl.constexpr = ECHO_PARTS + (NUM_ROWS - ECHO_ROWS) // GROUP * OWN_PARTS
    let_next_begin(PDL)
    request = tl.program_id(0)
    first = tl.load(items_ptr + 2 * request)
    last = tl.load(items_ptr + 2 * request + 1)
    wait_for_previous(PDL)
    if first == last:
        return
    mean_ptr += request.to(tl.int64) * MEAN_SIZE
    member = tl.arange(0, GROUP_PAD)
    real = member < GROUP
    element = tl.arange(0, COLUMNS)
    for part in range(tl.program_id(1), NUM_PARTS, tl.num_programs(1)):
        if part < ECHO_PARTS:
            head = part // (F // COLUMNS)
            place = part % (F // COLUMNS) * COLUMNS
            source_place = place
            start = head * GROUP * F + place
            width = F
        else:
            own = (part - ECHO_PARTS) // OWN_PARTS
            head = NUM_ECHOED + own
            place = (part - ECHO_PARTS) % OWN_PARTS * COLUMNS
            source_place = place + tl.load(row_source_ptr + head * GROUP) * HEAD_DIM
            start = ECHO_ROWS * F + own * GROUP * HEAD_DIM + place
            width = HEAD_DIM
        row = head * GROUP + member
        mean, lse = reduce_items(
            item_mean_ptr + source_place, maximum_ptr, total_ptr, first, last, row, real,
            F, ROW_PAD, GROUP_PAD, COLUMNS, ITEMS,
        )  # fmt: skip
        out_ptrs = mean_ptr + start + member[:, None] * width + element[None, :]
        tl.store(out_ptrs, mean.to(mean_ptr.dtype.element_ty), mask=real[:, None])
        if place == 0:
            tl.store(lse_ptr + request * NUM_ROWS + row, lse, mask=real)
