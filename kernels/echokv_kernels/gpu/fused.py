"""Absorbed decode in one loop: keys and values of a tile together, sums in registers.

A tile's scores need all features of its keys, and its sums as many registers as there are rows
times features. Where those fit (`DecodeTiles.is_fused`), nothing goes to memory between scores and
values, which leaves the L2 cache's bandwidth, the limit here, to the features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.tiles import load_absorbed, load_pages, source_offsets


@triton.jit
def fused_tiles(
    pool_ptr,  # PagedFeatures.pool
    block_stride,
    source_offset_ptr,  # [NUM_SOURCES] int64
    table_ptr,  # [pages] int32 of one request
    exact_ptr,  # [residual pages] uint8 of one request
    query_ptr,  # [query heads, HEAD_DIM] of the request's token
    stride_query_head,
    absorbed_ptr,  # of the first position's rotation block
    offset_ptr,
    row_query,  # [ROW_PAD] int32
    row_source,  # [ROW_PAD] int32
    maximum,  # [ROW_PAD] float32
    total,  # [ROW_PAD, BLOCK_T] float32
    sums,  # NUM_SOURCES times [ROW_PAD, DIM_PAD] float32
    start,
    stop,
    seq_len,
    scale_log2,
    ROTATION_BLOCK: tl.constexpr,
    ECHO_ROWS: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RESIDUAL_BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROW_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax state and weighted value features after the positions [start, stop).

    ONE_BLOCK: they share a rotation block, whose absorbed queries stay in shared memory.
    """
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    row = tl.arange(0, ROW_PAD)
    element = tl.arange(0, DIM_PAD)
    slot = tl.arange(0, BLOCK_T)
    known = element < HEAD_DIM
    echoed = row < ECHO_ROWS
    own_ptrs = query_ptr + row_query.to(tl.int64) * stride_query_head
    offsets = source_offsets(source_offset_ptr, 0, NUM_SOURCES)
    queries = ()
    if ONE_BLOCK:
        for source in tl.static_range(NUM_SOURCES):
            a = load_absorbed(
                absorbed_ptr, own_ptrs, row_source, 0, source, ECHO_ROWS, F, HEAD_DIM, ROW_PAD,
                DIM_PAD,
            )  # fmt: skip
            queries += (a,)  # type: ignore[assignment]
    page = load_pages(table_ptr, start + slot, stop, BLOCK_SIZE)
    exact = tl.load(
        exact_ptr + (start + slot) // RESIDUAL_BLOCK_SIZE, mask=start + slot < stop, other=1
    )
    for first in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        position = first + slot
        inside = position < stop
        x_row = page.to(tl.int64) * block_stride + position % BLOCK_SIZE * (2 * HEAD_DIM)
        x_ptrs = pool_ptr + x_row[:, None] + element[None, :]
        x_mask = inside[:, None] & known[None, :]
        block = 0
        if not ONE_BLOCK:
            block = first // ROTATION_BLOCK - start // ROTATION_BLOCK
        scores = tl.zeros([ROW_PAD, BLOCK_T], tl.float32)
        for source in tl.static_range(NUM_SOURCES):
            key = tl.load(x_ptrs + offsets[source], mask=x_mask, other=0.0)
            if ONE_BLOCK:
                a = queries[source]
            else:
                a = load_absorbed(
                    absorbed_ptr, own_ptrs, row_source, block, source, ECHO_ROWS, F, HEAD_DIM,
                    ROW_PAD, DIM_PAD,
                )  # fmt: skip
            scores = tl.dot(a, tl.trans(key), scores, input_precision="ieee")
        following = position + BLOCK_T
        page = load_pages(table_ptr, following, stop, BLOCK_SIZE)
        if HAS_BIAS:
            bias = tl.load(offset_ptr + block * ECHO_ROWS + row, mask=echoed, other=0.0)
            scores += bias[:, None]
        # The current token of echoed heads is exact or fresh, never rebuilt.
        rebuilt = inside & (position < seq_len - 1) & (exact == 0)
        visible = (echoed[:, None] & rebuilt[None, :]) | (~echoed[:, None] & inside[None, :])
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        exact = tl.load(
            exact_ptr + following // RESIDUAL_BLOCK_SIZE, mask=following < stop, other=1
        )
        largest = tl.maximum(maximum, tl.max(scores, 1))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        keep = tl.exp2(maximum - base)
        maximum = largest
        weights = tl.exp2(scores - base[:, None])
        total = total * keep[:, None] + weights
        new = ()
        for source in tl.static_range(NUM_SOURCES):
            value = tl.load(x_ptrs + (offsets[source] + HEAD_DIM), mask=x_mask, other=0.0)
            acc = tl.dot(
                weights.to(value.dtype),
                value,
                sums[source] * keep[:, None],
                input_precision="ieee",
            )
            new += (acc,)  # type: ignore[assignment]
        sums = new
    return maximum, total, sums
