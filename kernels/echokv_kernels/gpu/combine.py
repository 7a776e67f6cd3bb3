"""The last step of echoed decode: value maps, and the parts that are exact.

    echoed heads     mean over items -> Wv (+ bv)   merged with   exact pages (stock attention)
                                                                  the current token, where its
                                                                  residual page does not exist
    retained heads   mean over items

A tile takes one KV head's rows of several requests, so that they share the value maps. Requests
without work items are left alone: their output is stock attention's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.overlap import wait_for_previous

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def add_part(
    out,  # [ROWS, COLUMNS] float32, weighted by exp2(lse - largest)
    total,  # [ROWS] float32
    largest,  # [ROWS] float32, log2
    part,  # [ROWS, COLUMNS] float32
    lse,  # [ROWS] float32, log2; -inf where the part saw nothing
):
    """Adds one part of a softmax to a running sum."""
    new = tl.maximum(largest, lse)
    base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(largest - base)
    weight = tl.exp2(lse - base)
    out = out * keep[:, None] + tl.where(weight[:, None] > 0, part, 0.0) * weight[:, None]
    return out, total * keep + weight, new


@triton.jit
def project_means(
    mean_ptrs,  # [ROWS, DIM_PAD] pointers to the first source head's features
    mask,  # [ROWS, DIM_PAD] bool
    value_map_ptr,  # [F, HEAD_DIM] of one echoed head
    column,  # [COLUMNS] int32
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some columns of the rows' values, [ROWS, COLUMNS] float32."""
    element = tl.arange(0, DIM_PAD)
    map_mask = (element < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
    map_ptrs = value_map_ptr + element[:, None] * HEAD_DIM + column[None, :]
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for source in tl.range(0, NUM_SOURCES, num_stages=STAGES):
        mean = tl.load(mean_ptrs + source * HEAD_DIM, mask=mask, other=0.0)
        w = tl.load(map_ptrs + source * (HEAD_DIM * HEAD_DIM), mask=map_mask, other=0.0)
        out = tl.dot(mean, w, out, input_precision="ieee")
    return out


@triton.jit(
    do_not_specialize=[
        "num_requests",
        "num_parts",
        "stride_exact_lse_token",
        "stride_exact_lse_part",
        "stride_exact_lse_row",
    ]
)
def combine_kernel(
    output_ptr,  # [T, query heads, HEAD_DIM], written
    query_ptr,  # [T, query heads, HEAD_DIM]
    key_ptr,  # [T, KV heads, HEAD_DIM], this step's
    value_ptr,  # [T, KV heads, HEAD_DIM]
    exact_out_ptr,  # [n, num_parts, rows of the layer's discarded heads, HEAD_DIM]
    exact_lse_ptr,  # the same without HEAD_DIM, float32, natural logarithm
    exact_lens_ptr,  # [n] int32
    exact_ptr,  # [n, residual pages] uint8
    value_map_ptr,  # [NUM_ECHOED, F, HEAD_DIM]
    value_bias_ptr,  # [NUM_ECHOED, HEAD_DIM]
    row_query_ptr,  # [NUM_ROWS] int32
    row_exact_ptr,  # [NUM_ECHOED * GROUP] int32, rows of exact_out
    head_kv_ptr,  # [NUM_ECHOED] int32, KV heads
    query_start_loc_ptr,  # [n + 1] int32
    seq_lens_ptr,  # [n] int32
    items_ptr,  # [n, 2] int32
    mean_ptr,  # [n, MEAN_SIZE]
    lse_ptr,  # [n, NUM_ROWS] float32, log2
    num_requests,
    num_parts,
    stride_output_token,
    stride_output_head,
    stride_query_token,
    stride_query_head,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_exact_out_token,
    stride_exact_out_part,
    stride_exact_out_row,
    stride_exact_lse_token,
    stride_exact_lse_part,
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
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    MEAN_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles of requests, echoed heads times parts of HEAD_DIM, and the retained heads)."""
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    PARTS: tl.constexpr = DIM_PAD // COLUMNS
    line = tl.arange(0, ROWS)
    member = line % GROUP_PAD
    request = tl.program_id(0) * (ROWS // GROUP_PAD) + line // GROUP_PAD
    known = (request < num_requests) & (member < GROUP)
    first = tl.load(items_ptr + 2 * request, mask=known, other=0)
    known = tl.load(items_ptr + 2 * request + 1, mask=known, other=0) > first
    if tl.sum(known.to(tl.int32)) == 0:
        wait_for_previous(PDL)
        return
    element = tl.arange(0, DIM_PAD)
    mask = known[:, None] & (element < HEAD_DIM)[None, :]
    token = tl.load(query_start_loc_ptr + request, mask=known, other=0).to(tl.int64)
    part = tl.program_id(1)
    head = part // PARTS
    if part >= NUM_ECHOED * PARTS:
        head = NUM_ECHOED + (part - NUM_ECHOED * PARTS)
    row = head * GROUP + member
    query_head = tl.load(row_query_ptr + row, mask=known, other=0).to(tl.int64)
    out_ptrs = output_ptr + (token * stride_output_token + query_head * stride_output_head)[:, None]
    mean = mean_ptr + request.to(tl.int64) * MEAN_SIZE
    if head >= NUM_ECHOED:
        own = NUM_ECHOED * GROUP * F + (row - NUM_ECHOED * GROUP) * HEAD_DIM
        wait_for_previous(PDL)
        out = tl.load((mean + own)[:, None] + element[None, :], mask=mask, other=0.0)
        tl.store(out_ptrs + element[None, :], out.to(output_ptr.dtype.element_ty), mask=mask)
        return
    # All of it long before it is used: each would wait for memory again at the end.
    column = part % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    out_mask = known[:, None] & (column < HEAD_DIM)[None, :]
    exact_len = tl.load(exact_lens_ptr + request * stride_exact_len, mask=known, other=0)
    page = (tl.load(seq_lens_ptr + request, mask=known, other=1) - 1) // RESIDUAL_BLOCK_SIZE
    is_exact = tl.load(exact_ptr + request.to(tl.int64) * stride_exact + page, mask=known, other=1)
    has_pages = exact_len > 0
    is_fresh = known & (is_exact == 0)
    exact_row = tl.load(row_exact_ptr + row, mask=known, other=0).to(tl.int64)
    exact_at = request.to(tl.int64) * stride_exact_out_token + exact_row * stride_exact_out_row
    kv_head = tl.load(head_kv_ptr + head).to(tl.int64)
    fresh = is_fresh[:, None] & mask
    key_at = token * stride_key_token + kv_head * stride_key_head
    key = tl.load(key_ptr + key_at[:, None] + element[None, :], mask=fresh, other=0.0)
    query_at = token * stride_query_token + query_head * stride_query_head
    query = tl.load(query_ptr + query_at[:, None] + element[None, :], mask=fresh, other=0.0)
    value_at = token * stride_value_token + kv_head * stride_value_head
    value = tl.load(
        value_ptr + value_at[:, None] + column[None, :],
        mask=is_fresh[:, None] & out_mask,
        other=0.0,
    )
    wait_for_previous(PDL)
    lse = tl.load(lse_ptr + request * NUM_ROWS + row, mask=known, other=float("-inf"))
    exact_ptrs = exact_out_ptr + exact_at[:, None] + column[None, :]
    exact_lse_ptrs = exact_lse_ptr + request.to(tl.int64) * stride_exact_lse_token
    exact_lse_ptrs += exact_row * stride_exact_lse_row
    exact = tl.load(exact_ptrs, mask=has_pages[:, None] & out_mask, other=0.0)
    exact_lse = tl.load(exact_lse_ptrs, mask=has_pages, other=float("-inf"))
    out = project_means(
        (mean + row * F)[:, None] + element[None, :], mask,
        value_map_ptr + head.to(tl.int64) * (F * HEAD_DIM), column,
        NUM_SOURCES, HEAD_DIM, ROWS, DIM_PAD, COLUMNS, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        bias_ptrs = value_bias_ptr + head * HEAD_DIM + column
        out += tl.load(bias_ptrs, mask=column < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    weight = tl.where(lse > float("-inf"), 1.0, 0.0)
    out = out * weight[:, None]
    out, weight, lse = add_part(out, weight, lse, exact.to(tl.float32), exact_lse * LOG2_E)
    # Few: one where stock attention made it.
    for other in range(1, num_parts):
        part_lse = tl.load(
            exact_lse_ptrs + other * stride_exact_lse_part, mask=has_pages, other=float("-inf")
        )
        part_mask = (part_lse > float("-inf"))[:, None] & out_mask
        part_out = tl.load(exact_ptrs + other * stride_exact_out_part, mask=part_mask, other=0.0)
        out, weight, lse = add_part(out, weight, lse, part_out.to(tl.float32), part_lse * LOG2_E)
    score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale_log2
    score = tl.where(is_fresh, score, float("-inf"))
    out, weight, lse = add_part(out, weight, lse, value.to(tl.float32), score)
    out = out / tl.where(weight > 0, weight, 1.0)[:, None]
    tl.store(out_ptrs + column[None, :], out.to(output_ptr.dtype.element_ty), mask=out_mask)
