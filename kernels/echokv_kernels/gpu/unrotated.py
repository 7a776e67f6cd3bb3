"""Decode attention over echoed context whose keys are mapped un-rotated (rotation block 1).

Every token has a rotation of its own, so no query can be absorbed: the keys themselves are rebuilt,
one product of features and key maps per token, and everything else follows from that product being
the work. A program takes its work items chunk by chunk, and a chunk tile by tile. With s the first
position of a tile and t = s + i:

    plain      R(-t) x_K(t)                       the tile's features, to scratch
    rebuilt    k = plain . Wk (+ bk)              [tile, columns of some heads] after the other
    scores     (R(-s) q) . (R(i) k)               R(-s) q made once per chunk, R(i) one small table
    values     as in absorbed decode

Scratch belongs to the program and is reused, so tiles stay in the L2 cache and the product's loop
holds loads and tensor core instructions only. Rows and scores are those of absorbed.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from echokv_kernels.gpu.absorbed import weighted_values
from echokv_kernels.gpu.launch import UNROTATED
from echokv_kernels.gpu.plain import fill_places, plain_features, turn_queries
from echokv_kernels.gpu.projection import column_elements
from echokv_kernels.gpu.shares import find_request, own_share

if TYPE_CHECKING:
    from echokv_kernels.gpu.decode import DecodeBatch
    from echokv_kernels.gpu.heads import EchoedHeads
    from echokv_kernels.gpu.launch import DecodeTiles
    from echokv_kernels.gpu.rotation import RotationTable
    from echokv_kernels.gpu.scratch import DecodeScratch, DecodeShape


@triton.jit
def retained_scores(
    pool_ptr,
    source_offset_ptr,  # [NUM_SOURCES] int64
    own_source_ptr,  # [retained rows] int32
    x_row,
    inside,
    own_query_ptr,  # [retained rows, DIM_PAD]
    scores_ptr,  # [BLOCK_M, ROW_PAD] float32, of the first retained row
    scale_log2,
    NUM_OWN: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scores of retained heads, which are sources themselves: cached keys as they are."""
    slot = tl.arange(0, BLOCK_M)
    element = tl.arange(0, DIM_PAD)
    known = tl.max_constancy(element < HEAD_DIM, 8)
    member = tl.arange(0, ROWS)
    real = member < GROUP
    offset = tl.multiple_of(tl.load(source_offset_ptr + tl.load(own_source_ptr)), 16)
    for own in tl.range(0, NUM_OWN, num_stages=2):
        x = tl.load(
            pool_ptr + offset + x_row[:, None] + element[None, :],
            mask=inside[:, None] & known[None, :],
            other=0.0,
        )
        # One head ahead: this load and the next depend on each other.
        later = tl.minimum(own + 1, NUM_OWN - 1)
        later = tl.load(own_source_ptr + later * GROUP)
        offset = tl.multiple_of(tl.load(source_offset_ptr + later), 16)
        row = own * GROUP + member
        q = tl.load(
            own_query_ptr + (row * DIM_PAD)[:, None] + element[None, :],
            mask=real[:, None],
            other=0.0,
        )
        scores = tl.dot(x, tl.trans(q), input_precision="ieee") * scale_log2
        scores = tl.where(inside[:, None], scores, float("-inf"))
        to = scores_ptr + (slot * ROW_PAD)[:, None] + row[None, :]
        tl.store(to, scores, mask=real[None, :])


@triton.jit
def rebuilt_scores(
    plain_ptr,  # [BLOCK_M, F]
    turned_ptr,  # [ECHO_ROWS, 2, HALF_PAD] of this tile
    key_map_ptr,  # [NUM_ECHOED, F, HEAD_DIM]
    key_bias_ptr,  # [NUM_ECHOED, HEAD_DIM]
    place_ptr,  # as in fill_places
    exact_ptr,  # [residual pages] uint8 of one request
    scores_ptr,  # [BLOCK_M, ROW_PAD] float32 of this tile
    start,
    stop,
    seq_len,
    scale_log2,
    NUM_ECHOED: tl.constexpr,
    GROUP: tl.constexpr,
    F: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL_BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Masked scores of echoed rows: keys of HEADS heads at a time, never leaving registers."""
    COLUMNS: tl.constexpr = 2 * HALF_PAD
    NUM_GROUPS: tl.constexpr = (NUM_ECHOED + HEADS - 1) // HEADS
    ALL_KNOWN: tl.constexpr = (COLUMNS == HEAD_DIM) and (NUM_ECHOED % HEADS == 0)
    slot = tl.arange(0, BLOCK_M)
    step = tl.arange(0, STEP)
    column = tl.arange(0, HEADS * COLUMNS)
    element, known = column_elements(column, HEAD_DIM, ROTARY_DIM, INTERLEAVED, COLUMNS)
    map_column = column // COLUMNS * (F * HEAD_DIM) + element
    x_at = (slot * F)[:, None] + step[None, :]
    w_at = (step * HEAD_DIM)[:, None] + map_column[None, :]
    # Two loops: one loop would have to wait for every product before the next.
    for group in range(0, NUM_GROUPS):
        acc = tl.zeros([BLOCK_M, HEADS * COLUMNS], tl.float32)
        real = known & (group * HEADS + column // COLUMNS < NUM_ECHOED)
        real = tl.max_constancy(real, 8)
        group_map = key_map_ptr + group * (HEADS * F * HEAD_DIM)
        for k in tl.range(0, F, STEP, num_stages=STAGES):
            x = tl.load(plain_ptr + k + x_at)
            w_ptrs = group_map + k * HEAD_DIM + w_at
            w = tl.load(w_ptrs) if ALL_KNOWN else tl.load(w_ptrs, mask=real[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        if HAS_BIAS:
            at = group * (HEADS * HEAD_DIM) + column // COLUMNS * HEAD_DIM + element
            bias = tl.load(key_bias_ptr + at, mask=real, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        score_keys(
            acc, turned_ptr, place_ptr, exact_ptr, scores_ptr, group, start, stop, seq_len,
            scale_log2, key_map_ptr.dtype.element_ty, NUM_ECHOED, GROUP, INTERLEAVED,
            RESIDUAL_BLOCK_SIZE, BLOCK_M, ROW_PAD, HALF_PAD, HEADS, ROWS,
        )  # fmt: skip


@triton.jit
def score_keys(
    keys,  # [BLOCK_M, HEADS * 2 * HALF_PAD] float32, un-rotated, columns as in column_elements
    turned_ptr,  # here and below as in rebuilt_scores
    place_ptr,
    exact_ptr,
    scores_ptr,
    group,
    start,
    stop,
    seq_len,
    scale_log2,
    dtype: tl.constexpr,
    NUM_ECHOED: tl.constexpr,
    GROUP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    RESIDUAL_BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rotates keys forward within the tile, multiplies them by the queries, masks and stores."""
    slot = tl.arange(0, BLOCK_M)
    pair_column = tl.arange(0, HEADS * HALF_PAD)
    pair = pair_column % HALF_PAD
    member = tl.arange(0, ROWS)
    row = group * (HEADS * GROUP) + member
    real = (member < HEADS * GROUP) & (row < NUM_ECHOED * GROUP)
    # Rows of several heads share one product; each meets zeros in the others' columns.
    own = real[:, None] & (member[:, None] // GROUP == (pair_column // HALF_PAD)[None, :])
    q_ptrs = turned_ptr + (row * (2 * HALF_PAD))[:, None] + pair[None, :]
    q_first = tl.load(q_ptrs, mask=own, other=0.0)
    q_second = tl.load(q_ptrs + HALF_PAD, mask=own, other=0.0)
    position = start + slot
    inside = position < stop
    exact = tl.load(exact_ptr + position // RESIDUAL_BLOCK_SIZE, mask=inside, other=1)
    at = place_ptr + (slot * HALF_PAD)[:, None] + tl.arange(0, HALF_PAD)[None, :]
    cos = tl.load(at).to(tl.float32)[:, None, :]
    sin = tl.load(at + BLOCK_M * HALF_PAD).to(tl.float32)[:, None, :]
    if INTERLEAVED:
        keys = tl.reshape(keys, [BLOCK_M, HEADS, HALF_PAD, 2])
    else:
        keys = tl.permute(tl.reshape(keys, [BLOCK_M, HEADS, 2, HALF_PAD]), [0, 1, 3, 2])
    a, b = tl.split(keys)
    first = tl.reshape((a * cos - b * sin).to(dtype), [BLOCK_M, HEADS * HALF_PAD])
    second = tl.reshape((b * cos + a * sin).to(dtype), [BLOCK_M, HEADS * HALF_PAD])
    scores = tl.dot(first, tl.trans(q_first), input_precision="ieee")
    scores = tl.dot(second, tl.trans(q_second), scores, input_precision="ieee")
    # The current token of echoed heads is exact or fresh, never rebuilt.
    rebuilt = inside & (position < seq_len - 1) & (exact == 0)
    scores = tl.where(rebuilt[:, None], scores * scale_log2, float("-inf"))
    to = scores_ptr + (slot * ROW_PAD)[:, None] + row[None, :]
    tl.store(to, scores, mask=real[None, :])


@triton.jit
def largest_scores(
    scores_ptr,  # [CHUNK, ROW_PAD] float32
    num_tokens,
    maximum,  # [ROW_PAD] float32
    NUM_ROWS: tl.constexpr,
    ROW_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Running maximum of the rows' scores; padding rows' are undefined, so theirs stays."""
    row = tl.arange(0, ROW_PAD)
    slot = tl.arange(0, BLOCK_T)
    largest = tl.zeros([BLOCK_T, ROW_PAD], tl.float32) + maximum[None, :]
    for first in range(0, num_tokens, BLOCK_T):
        at = scores_ptr + (first + slot)[:, None] * ROW_PAD + row[None, :]
        mask = ((first + slot) < num_tokens)[:, None] & (row < NUM_ROWS)[None, :]
        largest = tl.maximum(largest, tl.load(at, mask=mask, other=float("-inf")))
    return tl.max(largest, 0)


@triton.jit
def unrotated_chunk(
    pool_ptr,
    block_stride,
    source_offset_ptr,
    table_ptr,
    exact_ptr,
    query_ptr,
    stride_query_head,
    key_map_ptr,
    key_bias_ptr,
    row_query_ptr,
    row_source_ptr,
    coarse_ptr,
    fine_ptr,
    place_ptr,
    plain_ptr,
    turned_ptr,
    scores_ptr,
    start,
    stop,
    seq_len,
    scale_log2,
    NUM_TILES: tl.constexpr,
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
    BLOCK_M: tl.constexpr,
    ROW_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
):
    """Masked scores of the positions [start, stop) to scratch; padding rows are left alone."""
    ECHO_ROWS: tl.constexpr = NUM_ECHOED * GROUP
    turn_queries(
        query_ptr, stride_query_head, row_query_ptr, coarse_ptr, fine_ptr, turned_ptr, start, stop,
        NUM_TILES, ECHO_ROWS, NUM_ROWS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_M, HALF_PAD,
    )  # fmt: skip
    slot = tl.arange(0, BLOCK_M)
    for tile in range(0, tl.cdiv(stop - start, BLOCK_M)):
        first = start + tile * BLOCK_M
        position = first + slot
        inside = position < stop
        page = tl.load(table_ptr + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        x_row = page * block_stride + position % BLOCK_SIZE * (2 * HEAD_DIM)
        plain_features(
            pool_ptr, source_offset_ptr, x_row, inside, coarse_ptr, fine_ptr, plain_ptr, first,
            NUM_SOURCES, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_M, PAIRS,
        )  # fmt: skip
        # Scratch is written and read with different thread mappings, here and below.
        tl.debug_barrier()
        tile_scores = scores_ptr + tile * (BLOCK_M * ROW_PAD)
        if NUM_ROWS > ECHO_ROWS:
            retained_scores(
                pool_ptr, source_offset_ptr, row_source_ptr + ECHO_ROWS, x_row, inside,
                turned_ptr + NUM_TILES * ECHO_ROWS * (2 * HALF_PAD), tile_scores + ECHO_ROWS,
                scale_log2, NUM_ROWS // GROUP - NUM_ECHOED, GROUP, HEAD_DIM, BLOCK_M, ROW_PAD,
                2 * HALF_PAD, OWN_ROWS,
            )  # fmt: skip
        rebuilt_scores(
            plain_ptr, turned_ptr + tile * (ECHO_ROWS * 2 * HALF_PAD), key_map_ptr, key_bias_ptr,
            place_ptr, exact_ptr, tile_scores, first, stop, seq_len, scale_log2,
            NUM_ECHOED, GROUP, NUM_SOURCES * HEAD_DIM, HEAD_DIM, ROTARY_DIM, INTERLEAVED, HAS_BIAS,
            RESIDUAL_BLOCK_SIZE, BLOCK_M, ROW_PAD, HALF_PAD, HEADS, STEP, ROWS, SCORE_STAGES,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_requests"])
def unrotated_decode_kernel(
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
    share_len_ptr,  # [1] int64
    coarse_ptr,
    fine_ptr,
    place_ptr,  # [programs, 2, BLOCK_M, HALF_PAD] float16, or float32 like the cache
    plain_ptr,  # [programs, BLOCK_M, F]
    turned_ptr,  # [programs, turned size], see turn_queries
    scores_ptr,  # [programs, CHUNK * ROW_PAD] float32
    sum_ptr,  # [items, ROW_PAD, F] float32
    maximum_ptr,  # [items, ROW_PAD] float32
    total_ptr,  # [items, ROW_PAD] float32
    num_requests,
    stride_query_token,
    stride_query_head,
    stride_table,
    stride_exact,
    block_stride,
    scale_log2,
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
    BLOCK_M: tl.constexpr,
    ROW_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    VALUE_T: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
    VALUE_STAGES: tl.constexpr,
):
    """Persistent programs; see the module's docstring."""
    ECHO_ROWS: tl.constexpr = NUM_ECHOED * GROUP
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    NUM_TILES: tl.constexpr = CHUNK // BLOCK_M
    TURNED: tl.constexpr = (NUM_TILES * ECHO_ROWS + NUM_ROWS - ECHO_ROWS) * (2 * HALF_PAD)
    program = tl.program_id(0)
    position, share_end = own_share(token_end_ptr, share_len_ptr, num_requests)
    if position >= share_end:
        return
    place = program.to(tl.int64)
    plain = plain_ptr + place * (BLOCK_M * F)
    turned = turned_ptr + place * TURNED
    scores = scores_ptr + place * (CHUNK * ROW_PAD)
    places = place_ptr + place * (2 * BLOCK_M * HALF_PAD)
    fill_places(places, fine_ptr, HEAD_DIM, BLOCK_M, HALF_PAD)
    row = tl.arange(0, ROW_PAD)
    row_source = tl.load(row_source_ptr + row, mask=row < NUM_ROWS, other=-2)
    while position < share_end:
        # Its lines are nobody's: there is nothing to absorb.
        request, before, behind, _, seq_len, token = find_request(
            token_end_ptr, seq_lens_ptr, seq_lens_ptr, query_start_loc_ptr, position, num_requests,
            NUM_REQUESTS,
        )  # fmt: skip
        item = program + request
        table = table_ptr + request.to(tl.int64) * stride_table
        exact = exact_ptr + request.to(tl.int64) * stride_exact
        sums = sum_ptr + tl.cast(item, tl.int64) * (ROW_PAD * F)
        item_start = (position - before).to(tl.int32)
        item_stop = tl.minimum(share_end - before, seq_len).to(tl.int32)
        maximum = tl.full([ROW_PAD], float("-inf"), tl.float32)
        total = tl.zeros([ROW_PAD], tl.float32)
        for start in range(item_start, item_stop, CHUNK):
            stop = tl.minimum(start + CHUNK, item_stop)
            unrotated_chunk(
                pool_ptr, block_stride, source_offset_ptr, table, exact,
                query_ptr + token * stride_query_token, stride_query_head, key_map_ptr,
                key_bias_ptr, row_query_ptr, row_source_ptr, coarse_ptr, fine_ptr, places,
                plain, turned, scores, start, stop, seq_len, scale_log2,
                NUM_TILES, NUM_ECHOED, NUM_ROWS, GROUP, NUM_SOURCES, HEAD_DIM, ROTARY_DIM,
                INTERLEAVED, HAS_BIAS, BLOCK_SIZE, RESIDUAL_BLOCK_SIZE, BLOCK_M, ROW_PAD, HALF_PAD,
                HEADS, STEP, ROWS, OWN_ROWS, PAIRS, SCORE_STAGES,
            )  # fmt: skip
            new_maximum = largest_scores(scores, stop - start, maximum, NUM_ROWS, ROW_PAD, VALUE_T)
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            shrink = tl.exp2(maximum - base)
            total = total * shrink + weighted_values(
                pool_ptr, block_stride, source_offset_ptr, table, scores, sums, base, shrink,
                row_source, start, stop, start == item_start,
                NUM_SOURCES, HEAD_DIM, BLOCK_SIZE, VALUE_T, ROW_PAD, VALUE_HEADS, 2 * HALF_PAD,
                VALUE_STAGES,
            )  # fmt: skip
            maximum = new_maximum
            tl.debug_barrier()
        tl.store(maximum_ptr + item * ROW_PAD + row, maximum)
        tl.store(total_ptr + item * ROW_PAD + row, total)
        position = behind


def unrotated_sizes(heads: EchoedHeads, shape: DecodeShape) -> tuple[int, int, int]:
    """Elements of one program's table of angles, plain features and turned queries."""
    dim_pad = heads.dim_pad
    block_m = UNROTATED.tile_len(shape.chunk_len)
    echo_rows = heads.num_echoed * heads.group
    turned = shape.chunk_len // block_m * echo_rows + heads.num_rows - echo_rows
    return block_m * dim_pad, block_m * heads.maps.width, turned * dim_pad


def launch_unrotated(
    query: torch.Tensor,
    heads: EchoedHeads,
    batch: DecodeBatch,
    scratch: DecodeScratch,
    shape: DecodeShape,
    tiles: DecodeTiles,
    rotation: RotationTable,
    scale_log2: float,
) -> None:
    """Fills `scratch.sums`, `maximum` and `total`; arguments as in `decode.attend_context`."""
    features, maps, plan = heads.features, heads.maps, batch.plan
    assert maps.key.numel() < 2**31, "elements of a layer's key maps are counted in 32 bits"
    head_dim, group = maps.head_dim, heads.group
    dim_pad = heads.dim_pad
    sizes = UNROTATED.fit(maps.key.dtype.itemsize)
    columns = sizes.heads(heads.num_echoed, dim_pad)
    unrotated_decode_kernel[(scratch.num_programs,)](
        query, features.pool, features.offsets, maps.key,
        maps.key if maps.key_bias is None else maps.key_bias,
        heads.row_query, heads.row_source, batch.retained_table, plan.exact,
        batch.query_start_loc, batch.seq_lens, plan.token_end, plan.share_len,
        rotation.coarse, rotation.fine, scratch.places, scratch.plain, scratch.turned,
        scratch.scores, scratch.sums, scratch.maximum, scratch.total,
        batch.num_reqs, query.stride(0), query.stride(1), batch.retained_table.stride(0),
        plan.exact.stride(0), features.block_stride, scale_log2,
        CHUNK=shape.chunk_len,
        NUM_ROWS=heads.num_rows,
        ROTARY_DIM=rotation.rotary_dim,
        INTERLEAVED=rotation.interleaved,
        HAS_BIAS=maps.key_bias is not None,
        BLOCK_SIZE=features.block_size,
        RESIDUAL_BLOCK_SIZE=plan.residual_block_size,
        NUM_REQUESTS=triton.next_power_of_2(plan.max_reqs),
        BLOCK_M=sizes.tile_len(shape.chunk_len),
        ROW_PAD=heads.row_pad,
        HALF_PAD=dim_pad // 2,
        HEADS=columns,
        STEP=min(sizes.step, maps.width & -maps.width),
        ROWS=max(16, triton.next_power_of_2(columns * group)),
        OWN_ROWS=max(16, triton.next_power_of_2(group)),
        PAIRS=min(sizes.pairs, dim_pad // 2),
        VALUE_HEADS=tiles.heads_per_step(features.num_heads, head_dim),
        VALUE_T=tiles.value_len,
        SCORE_STAGES=sizes.num_stages,
        VALUE_STAGES=tiles.value_stages,
        num_warps=sizes.num_warps,
        **heads.counts,
    )  # fmt: skip
