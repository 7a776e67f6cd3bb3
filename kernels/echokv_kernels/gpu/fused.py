"""Absorbed decode in one loop: keys and values of a tile together, sums in registers.

A tile's scores need all features of its keys, and its sums as many registers as there are rows
times features. Where those fit (`DecodeTiles.is_fused`), nothing goes to memory between scores and
values, which leaves the L2 cache's bandwidth, the limit here, to the features. Rows of retained
heads have scores and sums of one source head only, so they have tiles of their own, unless the
padding of the echoed rows has room for them (JOINT).
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.absorb import made_ahead, ready_line
from echokv_kernels.gpu.overlap import let_next_begin, wait_for_previous
from echokv_kernels.gpu.shares import find_request, own_share
from echokv_kernels.gpu.softmax import add_weights
from echokv_kernels.gpu.tiles import load_absorbed, load_pages, source_offsets


@triton.jit
def fused_tiles(
    pool_ptr,  # PagedFeatures.pool
    block_stride,
    source_offset_ptr,  # [NUM_SOURCES] int64
    table_ptr,  # [pages] int32 of one request
    exact_ptr,  # [residual pages] uint8 of one request
    absorbed_ptr,  # [blocks, ECHO_ROWS, F], of the first position's rotation block on
    offset_ptr,  # the same without F, float32
    own_ptrs,  # [ECHO_PAD] pointers to queries of retained heads; where JOINT
    row_source,  # [ECHO_PAD] int32, their source heads; where JOINT
    own_query,  # [OWN_PAD, DIM_PAD], queries of retained heads; where not
    own_source,  # [OWN_PAD] int32, their source heads; where not
    state,  # maximum [ECHO_PAD], total [ECHO_PAD, BLOCK_T], and the same of OWN_PAD; float32
    sums,  # NUM_SOURCES times [ECHO_PAD, DIM_PAD] float32
    own_sum,  # [OWN_PAD, DIM_PAD] float32
    start,
    stop,
    seq_len,
    scale_log2,
    ROTATION_BLOCK: tl.constexpr,
    ECHO_ROWS: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_OWN: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RESIDUAL_BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ECHO_PAD: tl.constexpr,
    OWN_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax state and weighted value features after the positions [start, stop).

    ONE_BLOCK: they share a rotation block, whose absorbed queries stay in shared memory.
    """
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    row = tl.arange(0, ECHO_PAD)
    element = tl.arange(0, DIM_PAD)
    slot = tl.arange(0, BLOCK_T)
    known = element < HEAD_DIM
    offsets = source_offsets(source_offset_ptr, 0, NUM_SOURCES)
    queries = ()
    if ONE_BLOCK:
        for source in tl.static_range(NUM_SOURCES):
            a = load_absorbed(
                absorbed_ptr, own_ptrs, row_source, 0, source, ECHO_ROWS, F, HEAD_DIM, ECHO_PAD,
                DIM_PAD, JOINT,
            )  # fmt: skip
            queries += (a,)  # type: ignore[assignment]
    page = load_pages(table_ptr, start + slot, stop, BLOCK_SIZE)
    exact = tl.load(
        exact_ptr + (start + slot) // RESIDUAL_BLOCK_SIZE, mask=start + slot < stop, other=1
    )
    maximum, total, own_maximum, own_total = state
    for first in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        position = first + slot
        inside = position < stop
        x_row = page.to(tl.int64) * block_stride + position % BLOCK_SIZE * (2 * HEAD_DIM)
        x_ptrs = pool_ptr + x_row[:, None] + element[None, :]
        x_mask = inside[:, None] & known[None, :]
        block = 0
        if not ONE_BLOCK:
            block = first // ROTATION_BLOCK - start // ROTATION_BLOCK
        scores = tl.zeros([ECHO_PAD, BLOCK_T], tl.float32)
        own_scores = tl.zeros([OWN_PAD, BLOCK_T], tl.float32)
        for source in tl.static_range(NUM_SOURCES):
            key = tl.load(x_ptrs + offsets[source], mask=x_mask, other=0.0)
            if ONE_BLOCK:
                a = queries[source]
            else:
                a = load_absorbed(
                    absorbed_ptr, own_ptrs, row_source, block, source, ECHO_ROWS, F, HEAD_DIM,
                    ECHO_PAD, DIM_PAD, JOINT,
                )  # fmt: skip
            scores = tl.dot(a, tl.trans(key), scores, input_precision="ieee")
            if HAS_OWN:
                product = tl.dot(own_query, tl.trans(key), input_precision="ieee")
                own_scores = tl.where((own_source == source)[:, None], product, own_scores)
        following = position + BLOCK_T
        page = load_pages(table_ptr, following, stop, BLOCK_SIZE)
        if HAS_BIAS:
            bias = tl.load(offset_ptr + block * ECHO_ROWS + row, mask=row < ECHO_ROWS, other=0.0)
            scores += bias[:, None]
        # The current token of echoed heads is exact or fresh, never rebuilt.
        rebuilt = inside & (position < seq_len - 1) & (exact == 0)
        visible = rebuilt[None, :]
        if JOINT:
            visible = tl.where((row < ECHO_ROWS)[:, None], visible, inside[None, :])
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        exact = tl.load(
            exact_ptr + following // RESIDUAL_BLOCK_SIZE, mask=following < stop, other=1
        )
        weights, keep, maximum, total = add_weights(scores, maximum, total)
        if HAS_OWN:
            own_scores = tl.where(inside[None, :], own_scores * scale_log2, float("-inf"))
            own_weights, own_keep, own_maximum, own_total = add_weights(
                own_scores, own_maximum, own_total
            )
            own_sum *= own_keep[:, None]
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
            if HAS_OWN:
                more = tl.dot(own_weights.to(value.dtype), value, own_sum, input_precision="ieee")
                own_sum = tl.where((own_source == source)[:, None], more, own_sum)
        sums = new
    return (maximum, total, own_maximum, own_total), sums, own_sum


@triton.jit(do_not_specialize=["num_requests", "max_lines"])
def fused_decode_kernel(
    query_ptr,  # [T, query heads, HEAD_DIM]
    pool_ptr,  # PagedFeatures.pool
    source_offset_ptr,  # [NUM_SOURCES] int64
    key_map_ptr,  # [NUM_ECHOED, F, HEAD_DIM]
    key_bias_ptr,  # [NUM_ECHOED, HEAD_DIM]
    row_query_ptr,  # [NUM_ROWS] int32
    row_source_ptr,  # [NUM_ROWS] int32
    table_ptr,  # [n, retained pages] int32
    exact_ptr,  # [n, residual pages] uint8
    query_start_loc_ptr,  # [n + 1] int32
    seq_lens_ptr,  # [n] int32
    token_end_ptr,  # [n] int64
    line_end_ptr,  # [n] int32
    share_len_ptr,  # [1] int64
    coarse_ptr,
    fine_ptr,
    absorbed_ptr,  # [max_lines + programs * NUM_BLOCKS, NUM_ECHOED * GROUP, F]
    offset_ptr,  # the same without F, float32
    mean_ptr,  # [items, ROW_PAD, F], cache dtype
    maximum_ptr,  # [items, ROW_PAD] float32
    total_ptr,  # [items, ROW_PAD] float32
    num_requests,
    max_lines,
    stride_query_token,
    stride_query_head,
    stride_table,
    stride_exact,
    block_stride,
    scale_log2,
    ROTATION_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_ECHOED: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RESIDUAL_BLOCK_SIZE: tl.constexpr,
    NUM_REQUESTS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROW_PAD: tl.constexpr,
    ECHO_PAD: tl.constexpr,
    OWN_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    STAGES: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs, each with an equal share of all tokens (shares.py): its items."""
    ECHO_ROWS: tl.constexpr = NUM_ECHOED * GROUP
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    program = tl.program_id(0)
    position, share_end = own_share(token_end_ptr, share_len_ptr, num_requests)
    if position >= share_end:
        wait_for_previous(PDL)
        return
    own_line = max_lines + program * NUM_BLOCKS
    JOINT: tl.constexpr = NUM_ROWS <= ECHO_PAD
    OWN_ROWS: tl.constexpr = 0 if JOINT else NUM_ROWS - ECHO_ROWS
    SUM_ROWS: tl.constexpr = NUM_ROWS if JOINT else ECHO_ROWS
    row = tl.arange(0, ECHO_PAD)
    row_query = tl.load(row_query_ptr + row, mask=row < SUM_ROWS, other=0).to(tl.int64)
    row_source = tl.load(row_source_ptr + row, mask=row < SUM_ROWS, other=-2)
    own = tl.arange(0, OWN_PAD)
    element = tl.arange(0, DIM_PAD)
    known = element < HEAD_DIM
    own_mask = (own < OWN_ROWS)[:, None] & known[None, :]
    own_head = tl.load(row_query_ptr + ECHO_ROWS + own, mask=own < OWN_ROWS, other=0).to(tl.int64)
    own_source = tl.load(row_source_ptr + ECHO_ROWS + own, mask=own < OWN_ROWS, other=-1)
    while position < share_end:
        request, before, behind, request_line, seq_len, token = find_request(
            token_end_ptr, line_end_ptr, seq_lens_ptr, query_start_loc_ptr, position, num_requests,
            NUM_REQUESTS,
        )  # fmt: skip
        item = tl.cast(program + request, tl.int64)
        query = query_ptr + token * stride_query_token
        table = table_ptr + request.to(tl.int64) * stride_table
        exact = exact_ptr + request.to(tl.int64) * stride_exact
        means = mean_ptr + item * (ROW_PAD * F)
        item_start = (position - before).to(tl.int32)
        item_stop = tl.minimum(share_end - before, seq_len).to(tl.int32)
        own_ptrs = query + own_head[:, None] * stride_query_head + element[None, :]
        own_query = tl.load(own_ptrs, mask=own_mask, other=0.0)
        state = (
            tl.full([ECHO_PAD], float("-inf"), tl.float32),
            tl.zeros([ECHO_PAD, BLOCK_T], tl.float32),
            tl.full([OWN_PAD], float("-inf"), tl.float32),
            tl.zeros([OWN_PAD, BLOCK_T], tl.float32),
        )
        acc = ()
        for _ in tl.static_range(NUM_SOURCES):
            acc += (tl.zeros([ECHO_PAD, DIM_PAD], tl.float32),)  # type: ignore[assignment]
        own_acc = tl.zeros([OWN_PAD, DIM_PAD], tl.float32)
        # Whole where all its absorbed queries are made ahead: every chunk starts a pipeline anew.
        ahead = made_ahead(request_line, item_stop, max_lines, ROTATION_BLOCK)
        step = tl.where(ahead, 1 << 30, CHUNK)
        # In this order: what follows finds everything older than this kernel complete.
        wait_for_previous(PDL)
        let_next_begin(PDL)
        for chunk in range(item_start // step, tl.cdiv(item_stop, step)):
            start = tl.maximum(item_start, chunk * step)
            stop = tl.minimum(item_stop, (chunk + 1) * step)
            line = ready_line(
                query, stride_query_head, key_map_ptr, key_bias_ptr, row_query_ptr, coarse_ptr,
                fine_ptr, absorbed_ptr, offset_ptr, request_line, own_line, max_lines, start, stop,
                ROTATION_BLOCK, NUM_BLOCKS, NUM_ECHOED, GROUP, NUM_SOURCES, HEAD_DIM, ROTARY_DIM,
                INTERLEAVED, HAS_BIAS, GROUP_PAD, BLOCK_M, HALF_PAD, DIM_PAD,
            )  # fmt: skip
            absorbed = absorbed_ptr + line * (ECHO_ROWS * F)
            offset = offset_ptr + line * ECHO_ROWS
            size = ROTATION_BLOCK if ONE_BLOCK and ROTATION_BLOCK != 0 else 1 << 30
            origin = start // size * size
            for begin in range(origin, stop, size):
                block = (begin - origin) // size
                state, acc, own_acc = fused_tiles(
                    pool_ptr, block_stride, source_offset_ptr, table, exact,
                    absorbed + block * (ECHO_ROWS * F), offset + block * ECHO_ROWS,
                    query + row_query * stride_query_head, row_source, own_query, own_source,
                    state, acc, own_acc, tl.maximum(start, begin),
                    tl.minimum(stop, begin + size), seq_len, scale_log2, ROTATION_BLOCK, ECHO_ROWS,
                    JOINT, OWN_ROWS > 0, NUM_SOURCES, HEAD_DIM, HAS_BIAS, BLOCK_SIZE,
                    RESIDUAL_BLOCK_SIZE, BLOCK_T, ECHO_PAD, OWN_PAD, DIM_PAD, ONE_BLOCK, STAGES,
                )  # fmt: skip
            # The next chunk may overwrite the program's own lines.
            tl.debug_barrier()
        maximum, total, own_maximum, own_total = state
        is_row, is_own = row < SUM_ROWS, own < OWN_ROWS
        item_row = item * ROW_PAD
        weight, own_weight = tl.sum(total, 1), tl.sum(own_total, 1)
        tl.store(maximum_ptr + item_row + row, maximum, mask=is_row)
        tl.store(total_ptr + item_row + row, weight, mask=is_row)
        tl.store(maximum_ptr + item_row + ECHO_ROWS + own, own_maximum, mask=is_own)
        tl.store(total_ptr + item_row + ECHO_ROWS + own, own_weight, mask=is_own)
        # Means, not sums: 16 bits hold them, and half as many bytes wait at the end.
        weight = 1.0 / tl.where(weight > 0, weight, 1.0)
        own_weight = 1.0 / tl.where(own_weight > 0, own_weight, 1.0)
        dtype = mean_ptr.dtype.element_ty
        out = means + row[:, None] * F + element[None, :]
        for source in tl.static_range(NUM_SOURCES):
            wanted = (row_source == -1) | (row_source == source)
            mean = (acc[source] * weight[:, None]).to(dtype)
            tl.store(out + source * HEAD_DIM, mean, mask=wanted[:, None] & known[None, :])
        own_out = means + (ECHO_ROWS + own)[:, None] * F + (own_source * HEAD_DIM)[:, None]
        own_mean = (own_acc * own_weight[:, None]).to(dtype)
        tl.store(own_out + element[None, :], own_mean, mask=own_mask)
        position = behind
