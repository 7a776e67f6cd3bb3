"""The last step of echoed decode: items to one sum, value maps, and the parts that are exact.

    echoed heads     sum over items -> Wv (+ bv)   merged with   exact pages (stock attention)
                                                                 the current token, where its
                                                                 residual page does not exist
    retained heads   sum over items

One program per request, head and source head; the program that finishes a head last, seen by a
counter, adds up the source heads' parts and merges. Requests without work items are left alone:
their output is stock attention's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.shares import item_range

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def item_weights(
    maximum_ptr,  # [items, ROW_PAD] float32
    total_ptr,  # [items, ROW_PAD] float32
    first,
    last,
    row,  # [ROWS] int32
    real,  # [ROWS] bool
    ROW_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Maximum over items and sum of weights relative to it, [ROWS] float32 each."""
    item = tl.arange(0, ITEMS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    base = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(first, last, ITEMS):
        at = (start + item)[:, None] * ROW_PAD + row[None, :]
        mask = ((start + item) < last)[:, None] & real[None, :]
        maximum = tl.load(maximum_ptr + at, mask=mask, other=float("-inf"))
        weight = tl.load(total_ptr + at, mask=mask, other=0.0)
        new = tl.maximum(largest, tl.max(maximum, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        total *= tl.exp2(largest - base)
        total += tl.sum(tl.exp2(maximum - base[None, :]) * weight, 0)
        largest = new
    return largest, base, total


@triton.jit
def sum_items(
    sum_ptr,  # [items, ROW_PAD, F] float32
    maximum_ptr,
    first,
    last,
    base,  # [ROWS] float32
    first_row,
    source,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROW_PAD: tl.constexpr,
    F: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ITEMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One source head's weighted features over all items of a request, [ROWS, DIM_PAD] float32.

    Items and rows lie along one axis, and a small product adds up the items of each row.
    """
    line = tl.arange(0, ITEMS * GROUP_PAD)
    member = line % GROUP_PAD
    row = tl.arange(0, ROWS)
    element = tl.arange(0, DIM_PAD)
    inside = element < HEAD_DIM
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for start in range(first, last, ITEMS):
        item = start + line // GROUP_PAD
        real = (item < last) & (member < GROUP)
        at = item * ROW_PAD + first_row + member
        maximum = tl.load(maximum_ptr + at, mask=real, other=float("-inf"))
        sums = tl.load(
            sum_ptr + at.to(tl.int64)[:, None] * F + source * HEAD_DIM + element[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        weight = tl.exp2(maximum[None, :] - base[:, None])
        weight = tl.where(row[:, None] == member[None, :], weight, 0.0)
        acc = tl.dot(weight, sums, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_part(
    out,  # [ROWS, DIM_PAD] float32, weighted by exp2(lse - largest)
    total,  # [ROWS] float32
    largest,  # [ROWS] float32, log2
    part,  # [ROWS, DIM_PAD] float32
    lse,  # [ROWS] float32, log2; -inf where the part saw nothing
):
    """Adds one part of a softmax to a running sum."""
    new = tl.maximum(largest, lse)
    base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(largest - base)
    weight = tl.exp2(lse - base)
    out = out * keep[:, None] + tl.where(weight[:, None] > 0, part, 0.0) * weight[:, None]
    return out, total * keep + weight, new


@triton.jit(do_not_specialize=["stride_exact_lse_token", "stride_exact_lse_row"])
def combine_kernel(
    output_ptr,  # [T, query heads, HEAD_DIM], written
    query_ptr,  # [T, query heads, HEAD_DIM]
    key_ptr,  # [T, KV heads, HEAD_DIM], this step's
    value_ptr,  # [T, KV heads, HEAD_DIM]
    exact_out_ptr,  # [n, rows of the layer's discarded heads, HEAD_DIM]
    exact_lse_ptr,  # the same without HEAD_DIM, float32, natural logarithm
    exact_lens_ptr,  # [n] int32
    exact_ptr,  # [n, residual pages] uint8
    value_map_ptr,  # [NUM_ECHOED, F, HEAD_DIM]
    value_bias_ptr,  # [NUM_ECHOED, HEAD_DIM]
    row_query_ptr,  # [NUM_ROWS] int32
    row_source_ptr,  # [NUM_ROWS] int32
    row_exact_ptr,  # [NUM_ECHOED * GROUP] int32, rows of exact_out
    head_kv_ptr,  # [NUM_ECHOED] int32, KV heads
    query_start_loc_ptr,  # [n + 1] int32
    seq_lens_ptr,  # [n] int32
    token_end_ptr,  # [n] int64
    share_len_ptr,  # [1] int64
    sum_ptr,  # [items, ROW_PAD, F] float32
    maximum_ptr,  # [items, ROW_PAD] float32
    total_ptr,  # [items, ROW_PAD] float32
    part_ptr,  # [n, NUM_ECHOED, NUM_SOURCES, ROWS, HEAD_DIM] float32
    counter_ptr,  # [n, NUM_ECHOED] int32, 0 between launches
    stride_output_token,
    stride_output_head,
    stride_query_token,
    stride_query_head,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_exact_out_token,
    stride_exact_out_row,
    stride_exact_lse_token,
    stride_exact_lse_row,
    stride_exact_len,
    stride_exact,
    scale_log2,
    NUM_ECHOED: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL_BLOCK_SIZE: tl.constexpr,
    ROW_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ITEMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the module's docstring. Grid: (n, echoed and retained heads, source heads)."""
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    request = tl.program_id(0)
    head = tl.program_id(1)
    source = tl.program_id(2)
    first, last = item_range(token_end_ptr, share_len_ptr, request)
    if first == last:
        return
    # Long before they are used: each would wait for memory again at the end.
    exact_len = tl.load(exact_lens_ptr + request * stride_exact_len)
    page = (tl.load(seq_lens_ptr + request) - 1) // RESIDUAL_BLOCK_SIZE
    is_exact = tl.load(exact_ptr + request.to(tl.int64) * stride_exact + page)
    member = tl.arange(0, ROWS)
    element = tl.arange(0, DIM_PAD)
    real = member < GROUP
    inside = element < HEAD_DIM
    mask = real[:, None] & inside[None, :]
    row = head * GROUP + member
    token = tl.load(query_start_loc_ptr + request).to(tl.int64)
    query_head = tl.load(row_query_ptr + row, mask=real, other=0).to(tl.int64)
    out_ptrs = output_ptr + token * stride_output_token
    out_ptrs = out_ptrs + query_head[:, None] * stride_output_head + element[None, :]
    largest, base, total = item_weights(
        maximum_ptr, total_ptr, first, last, row, real, ROW_PAD, ROWS, ITEMS
    )
    seen = tl.where(total > 0, total, 1.0)
    if head >= NUM_ECHOED:
        if source > 0:
            return
        own = tl.load(row_source_ptr + head * GROUP)
        acc = sum_items(
            sum_ptr, maximum_ptr, first, last, base, head * GROUP, own,
            GROUP, GROUP_PAD, ROW_PAD, F, HEAD_DIM, ROWS, DIM_PAD, ITEMS, PRECISION,
        )  # fmt: skip
        tl.store(out_ptrs, (acc / seen[:, None]).to(output_ptr.dtype.element_ty), mask=mask)
        return
    w_ptrs = value_map_ptr + (head * NUM_SOURCES + source) * (HEAD_DIM * HEAD_DIM)
    w_ptrs = w_ptrs + element[:, None] * HEAD_DIM + element[None, :]
    w = tl.load(w_ptrs, mask=inside[:, None] & inside[None, :], other=0.0)
    acc = sum_items(
        sum_ptr, maximum_ptr, first, last, base, head * GROUP, source,
        GROUP, GROUP_PAD, ROW_PAD, F, HEAD_DIM, ROWS, DIM_PAD, ITEMS, PRECISION,
    )  # fmt: skip
    dtype = value_map_ptr.dtype.element_ty
    part = tl.dot((acc / seen[:, None]).to(dtype), w, input_precision="ieee")
    part_row = (request * NUM_ECHOED + head) * NUM_SOURCES
    part_at = member[:, None] * HEAD_DIM + element[None, :]
    if NUM_SOURCES > 1:
        SIZE: tl.constexpr = ROWS * HEAD_DIM
        tl.store(part_ptr + (part_row + source).to(tl.int64) * SIZE + part_at, part, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + request * NUM_ECHOED + head, 1, sem="acq_rel")
        if arrived < NUM_SOURCES - 1:
            return
        tl.store(counter_ptr + request * NUM_ECHOED + head, 0)
        part = tl.zeros([ROWS, DIM_PAD], tl.float32)
        for other in range(NUM_SOURCES):
            part += tl.load(
                part_ptr + (part_row + other).to(tl.int64) * SIZE + part_at, mask=mask, other=0.0
            )
    if HAS_BIAS:
        bias = tl.load(value_bias_ptr + head * HEAD_DIM + element, mask=inside, other=0.0)
        part += bias[None, :].to(tl.float32)
    lse = tl.where(total > 0, largest + tl.log2(seen), float("-inf"))
    weight = tl.where(total > 0, 1.0, 0.0)
    out, weight, lse = part * weight[:, None], weight, lse

    if exact_len > 0:
        exact_row = tl.load(row_exact_ptr + row, mask=real, other=0).to(tl.int64)
        exact = tl.load(
            exact_out_ptr
            + request.to(tl.int64) * stride_exact_out_token
            + exact_row[:, None] * stride_exact_out_row
            + element[None, :],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        exact_lse = tl.load(
            exact_lse_ptr
            + request.to(tl.int64) * stride_exact_lse_token
            + exact_row * stride_exact_lse_row,
            mask=real,
            other=float("-inf"),
        )
        out, weight, lse = add_part(out, weight, lse, exact, exact_lse * LOG2_E)
    if is_exact == 0:
        kv_head = tl.load(head_kv_ptr + head).to(tl.int64)
        key = tl.load(
            key_ptr + token * stride_key_token + kv_head * stride_key_head + element,
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        value = tl.load(
            value_ptr + token * stride_value_token + kv_head * stride_value_head + element,
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        query = tl.load(
            query_ptr
            + token * stride_query_token
            + query_head[:, None] * stride_query_head
            + element[None, :],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        score = tl.sum(query * key[None, :], 1) * scale_log2
        out, weight, lse = add_part(
            out, weight, lse, tl.zeros([ROWS, DIM_PAD], tl.float32) + value[None, :], score
        )
    out = out / tl.where(weight > 0, weight, 1.0)[:, None]
    tl.store(out_ptrs, out.to(output_ptr.dtype.element_ty), mask=mask)
