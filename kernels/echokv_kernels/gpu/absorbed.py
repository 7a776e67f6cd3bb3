"""Decode attention over echoed context, by absorbed queries: one pass over the retained pages.

The tokens of compressed decodes are cut into equal shares, one per program, and a share at the end
of a request into work items (step_plan). A program takes its items chunk by chunk. Features whose
sums fit the registers take one loop over the tokens (fused.py), others two:

    scores    S[token, row]       A . x_K, masked, to scratch; running maximum
    weights   P[token, row]       exp2(S - m), to scratch
    values    acc[F, row]         sum_t P x_V(t)

A row is one query head of a discarded KV head; or of a retained KV head that is a source, whose
attention comes free in the same pass because it is its own feature. Rows share each token's
features, so the pass reads the retained pages once and nothing else grows with the context. The
scratch belongs to the program and is reused for every chunk, so it stays in the L2 cache and its
size does not depend on batch or context.

Scores are in units of log2: exp2 is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.absorb import made_ahead, ready_line
from echokv_kernels.gpu.overlap import let_next_begin, wait_for_previous
from echokv_kernels.gpu.shares import find_request, own_share
from echokv_kernels.gpu.softmax import chunk_weights
from echokv_kernels.gpu.tiles import load_absorbed, load_pages, source_offsets


@triton.jit
def absorbed_scores(
    pool_ptr,  # PagedFeatures.pool
    block_stride,
    source_offset_ptr,  # [NUM_SOURCES] int64
    table_ptr,  # [pages] int32 of one request
    exact_ptr,  # [residual pages] uint8 of one request
    query_ptr,  # [query heads, HEAD_DIM] of the request's token
    stride_query_head,
    absorbed_ptr,
    offset_ptr,
    scores_ptr,  # [CHUNK, ROW_PAD] float32
    row_query,  # [ROW_PAD] int32
    row_source,  # [ROW_PAD] int32
    maximum,  # [ROW_PAD] float32
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
    HEADS_PER_STEP: tl.constexpr,
    DIM_PAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Masked scores of the positions [start, stop) to scratch; the new running maximum."""
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    NUM_STEPS: tl.constexpr = NUM_SOURCES // HEADS_PER_STEP
    row = tl.arange(0, ROW_PAD)
    element = tl.arange(0, DIM_PAD)
    slot = tl.arange(0, BLOCK_T)
    known = element < HEAD_DIM
    echoed = row < ECHO_ROWS
    # A retained head is its own feature: its query is its row's part of one source head.
    own_ptrs = query_ptr + row_query.to(tl.int64) * stride_query_head
    largest = tl.zeros([BLOCK_T, ROW_PAD], tl.float32) + maximum[None, :]
    acc = tl.zeros([BLOCK_T, ROW_PAD], tl.float32)
    page = load_pages(table_ptr, start + slot, stop, BLOCK_SIZE)
    exact = tl.load(
        exact_ptr + (start + slot) // RESIDUAL_BLOCK_SIZE, mask=start + slot < stop, other=1
    )
    offsets = source_offsets(source_offset_ptr, 0, HEADS_PER_STEP)
    for i in tl.range(0, tl.cdiv(stop - start, BLOCK_T) * NUM_STEPS, num_stages=STAGES):
        step = i % NUM_STEPS
        local = i // NUM_STEPS * BLOCK_T
        position = start + local + slot
        inside = position < stop
        x_row = page.to(tl.int64) * block_stride + position % BLOCK_SIZE * (2 * HEAD_DIM)
        x_ptrs = pool_ptr + x_row[:, None] + element[None, :]
        x_mask = inside[:, None] & known[None, :]
        block = 0
        if ROTATION_BLOCK != 0:
            block = (start + local) // ROTATION_BLOCK - start // ROTATION_BLOCK
        if step == 0:
            acc = tl.zeros([BLOCK_T, ROW_PAD], tl.float32)
        for head in tl.static_range(HEADS_PER_STEP):
            source = step * HEADS_PER_STEP + head
            x = tl.load(x_ptrs + offsets[head], mask=x_mask, other=0.0)
            a = load_absorbed(
                absorbed_ptr, own_ptrs, row_source, block, source, ECHO_ROWS, F, HEAD_DIM, ROW_PAD,
                DIM_PAD, True,
            )  # fmt: skip
            acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
        following = start + (i + 1) // NUM_STEPS * BLOCK_T + slot
        page = load_pages(table_ptr, following, stop, BLOCK_SIZE)
        if NUM_STEPS > 1:
            offsets = source_offsets(source_offset_ptr, (i + 1) % NUM_STEPS, HEADS_PER_STEP)
        if step == NUM_STEPS - 1:
            scores = acc
            if HAS_BIAS:
                bias = tl.load(offset_ptr + block * ECHO_ROWS + row, mask=echoed, other=0.0)
                scores += bias[None, :]
            # The current token of echoed heads is exact or fresh, never rebuilt.
            rebuilt = inside & (position < seq_len - 1) & (exact == 0)
            visible = (echoed[None, :] & rebuilt[:, None]) | (~echoed[None, :] & inside[:, None])
            scores = tl.where(visible, scores * scale_log2, float("-inf"))
            largest = tl.maximum(largest, scores)
            tl.store(scores_ptr + (local + slot)[:, None] * ROW_PAD + row[None, :], scores)
        exact = tl.load(
            exact_ptr + following // RESIDUAL_BLOCK_SIZE, mask=following < stop, other=1
        )
    return tl.max(largest, 0)


@triton.jit
def weighted_values(
    pool_ptr,
    block_stride,
    source_offset_ptr,
    table_ptr,
    scores_ptr,  # [CHUNK, ROW_PAD] float32
    weights_ptr,  # [CHUNK, ROW_PAD] cache dtype, written
    sum_ptr,  # [ROW_PAD, F] float32: what waits for the item's next chunk
    mean_ptr,  # [ROW_PAD, F] cache dtype: the item's result
    earlier_maximum,  # [ROW_PAD] float32, of the scores of earlier chunks
    maximum,  # [ROW_PAD] float32, with this one's
    total,  # [ROW_PAD] float32, weights of earlier chunks
    row_source,  # [ROW_PAD] int32, the source head whose sum a row needs; -1: all, -2: none
    start,
    stop,
    is_first,
    is_last,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROW_PAD: tl.constexpr,
    HEADS_PER_STEP: tl.constexpr,
    DIM_PAD: tl.constexpr,
    STAGES: tl.constexpr,
    WEIGHT_T: tl.constexpr,
):
    """Adds the chunk's weighted value features to the sums; the last chunk leaves their mean.

    Returns `total` with this chunk's weights.
    """
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    NUM_STEPS: tl.constexpr = NUM_SOURCES // HEADS_PER_STEP
    row = tl.arange(0, ROW_PAD)
    element = tl.arange(0, DIM_PAD)
    slot = tl.arange(0, BLOCK_T)
    known = element < HEAD_DIM
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    shrink = tl.exp2(earlier_maximum - base)
    total = total * shrink + chunk_weights(
        scores_ptr, weights_ptr, base, stop - start, ROW_PAD, WEIGHT_T, STAGES
    )
    part = 1.0 / tl.where(total > 0, total, 1.0)
    # Weights are written and read with different thread mappings.
    tl.debug_barrier()
    for step in range(NUM_STEPS):
        offsets = source_offsets(source_offset_ptr, step, HEADS_PER_STEP)
        sums = ()
        for _ in tl.static_range(HEADS_PER_STEP):
            sums += (tl.zeros([DIM_PAD, ROW_PAD], tl.float32),)  # type: ignore[assignment]
        page = load_pages(table_ptr, start + slot, stop, BLOCK_SIZE)
        for first in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
            position = first + slot
            inside = position < stop
            x_row = page.to(tl.int64) * block_stride + position % BLOCK_SIZE * (2 * HEAD_DIM)
            x_ptrs = pool_ptr + x_row[:, None] + (HEAD_DIM + element)[None, :]
            w_ptrs = weights_ptr + (position - start)[:, None] * ROW_PAD + row[None, :]
            weights = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
            new = ()
            for head in tl.static_range(HEADS_PER_STEP):
                x = tl.load(
                    x_ptrs + offsets[head], mask=inside[:, None] & known[None, :], other=0.0
                )
                acc = tl.dot(tl.trans(x), weights, sums[head], input_precision="ieee")
                new += (acc,)  # type: ignore[assignment]
            sums = new
            page = load_pages(table_ptr, position + BLOCK_T, stop, BLOCK_SIZE)
        for head in tl.static_range(HEADS_PER_STEP):
            source = step * HEADS_PER_STEP + head
            at = row[None, :] * F + (source * HEAD_DIM + element)[:, None]
            mask = known[:, None] & ((row_source == -1) | (row_source == source))[None, :]
            acc = sums[head]
            if is_first == 0:
                acc += tl.load(sum_ptr + at, mask=mask, other=0.0) * shrink[None, :]
            if is_last:
                mean = (acc * part[None, :]).to(mean_ptr.dtype.element_ty)
                tl.store(mean_ptr + at, mean, mask=mask)
            else:
                tl.store(sum_ptr + at, acc, mask=mask)
    return total


@triton.jit(do_not_specialize=["num_requests", "max_lines"])
def absorbed_decode_kernel(
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
    scores_ptr,  # [programs, CHUNK * ROW_PAD] float32
    weights_ptr,  # the same, cache dtype
    sum_ptr,  # [programs, ROW_PAD, F] float32
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
    DIM_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    SCORE_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    VALUE_T: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
    VALUE_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs; see the module's docstring."""
    ECHO_ROWS: tl.constexpr = NUM_ECHOED * GROUP
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    program = tl.program_id(0)
    position, share_end = own_share(token_end_ptr, share_len_ptr, num_requests)
    if position >= share_end:
        wait_for_previous(PDL)
        return
    own_line = max_lines + program * NUM_BLOCKS
    scores = scores_ptr + program.to(tl.int64) * (CHUNK * ROW_PAD)
    weights = weights_ptr + program.to(tl.int64) * (CHUNK * ROW_PAD)
    sums = sum_ptr + program.to(tl.int64) * (ROW_PAD * F)
    row = tl.arange(0, ROW_PAD)
    row_query = tl.load(row_query_ptr + row, mask=row < NUM_ROWS, other=0)
    row_source = tl.load(row_source_ptr + row, mask=row < NUM_ROWS, other=-2)
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
        maximum = tl.full([ROW_PAD], float("-inf"), tl.float32)
        total = tl.zeros([ROW_PAD], tl.float32)
        # In this order: what follows finds everything older than this kernel complete.
        wait_for_previous(PDL)
        let_next_begin(PDL)
        # A chunk begins where the item does if its absorbed queries are made ahead, so that the
        # share of a long request is one chunk and not two: each costs three pipelines' beginnings.
        ahead = made_ahead(request_line, item_stop, max_lines, ROTATION_BLOCK)
        origin = tl.where(ahead, item_start, item_start // CHUNK * CHUNK)
        for first in range(origin, item_stop, CHUNK):
            start = tl.maximum(item_start, first)
            stop = tl.minimum(item_stop, first + CHUNK)
            line = ready_line(
                query, stride_query_head, key_map_ptr, key_bias_ptr, row_query_ptr, coarse_ptr,
                fine_ptr, absorbed_ptr, offset_ptr, request_line, own_line, max_lines, start, stop,
                ROTATION_BLOCK, NUM_BLOCKS, NUM_ECHOED, GROUP, NUM_SOURCES, HEAD_DIM, ROTARY_DIM,
                INTERLEAVED, HAS_BIAS, GROUP_PAD, BLOCK_M, HALF_PAD, DIM_PAD,
            )  # fmt: skip
            absorbed = absorbed_ptr + line * (ECHO_ROWS * F)
            offset = offset_ptr + line * ECHO_ROWS
            new_maximum = absorbed_scores(
                pool_ptr, block_stride, source_offset_ptr, table, exact, query,
                stride_query_head, absorbed, offset, scores, row_query, row_source, maximum,
                start, stop, seq_len, scale_log2, ROTATION_BLOCK, ECHO_ROWS, NUM_SOURCES,
                HEAD_DIM, HAS_BIAS, BLOCK_SIZE, RESIDUAL_BLOCK_SIZE, BLOCK_T, ROW_PAD,
                SCORE_HEADS, DIM_PAD, SCORE_STAGES,
            )  # fmt: skip
            tl.debug_barrier()
            total = weighted_values(
                pool_ptr, block_stride, source_offset_ptr, table, scores, weights, sums, means,
                maximum, new_maximum, total, row_source, start, stop, start == item_start,
                stop == item_stop, NUM_SOURCES, HEAD_DIM, BLOCK_SIZE, VALUE_T, ROW_PAD, VALUE_HEADS,
                DIM_PAD, VALUE_STAGES, BLOCK_T,
            )  # fmt: skip
            maximum = new_maximum
            tl.debug_barrier()
        tl.store(maximum_ptr + item * ROW_PAD + row, maximum)
        tl.store(total_ptr + item * ROW_PAD + row, total)
        position = behind
