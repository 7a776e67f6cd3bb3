"""Decode attention over echoed context whose keys are mapped un-rotated (rotation block 1).

Every token has a rotation of its own, so no query can be absorbed: the keys themselves are rebuilt,
one product of features and key maps per token, and everything else follows from that product being
the work. A program takes its work items chunk by chunk, and a chunk tile by tile. With s the first
position of a tile and t = s + i:

    plain      R(-t) x_K(t)                       the tile's features, to scratch
    rebuilt    k = plain . Wk (+ bk)              [tile, columns of some heads] after the other
    scores     (R(-s) q) . (R(i) k)               R(-s) q made once per chunk, R(i) one small table
    values     as in absorbed decode

Scratch belongs to the program and is reused, so tiles stay in the L2 cache (hints tell it to prefer
them to features, which are read once), and the product's loop holds loads and tensor core
instructions only. Rows and scores are those of absorbed.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from echokv_kernels.gpu.absorbed import weighted_values
from echokv_kernels.gpu.launch import UNROTATED
from echokv_kernels.gpu.plain import plain_features, turn_queries
from echokv_kernels.gpu.shares import find_request, own_share
from echokv_kernels.gpu.unrotated_scores import largest_scores, rebuilt_scores, retained_scores

if TYPE_CHECKING:
    from echokv_kernels.gpu.decode import DecodeBatch
    from echokv_kernels.gpu.heads import EchoedHeads
    from echokv_kernels.gpu.rotation import RotationTable
    from echokv_kernels.gpu.scratch import DecodeScratch, DecodeShape


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
    width,
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
            place_ptr, exact_ptr, tile_scores, first, stop, seq_len, scale_log2, width,
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
    place_ptr,  # RotationTable.places, or places_half where the cache has 16 bits
    plain_ptr,  # [programs, BLOCK_M, F]
    turned_ptr,  # [programs, turned size], see turn_queries
    scores_ptr,  # [programs, CHUNK * ROW_PAD] float32
    weights_ptr,  # the same, cache dtype
    sum_ptr,  # [programs, ROW_PAD, F] float32
    mean_ptr,  # [items, ROW_PAD, F], cache dtype
    maximum_ptr,  # [items, ROW_PAD] float32
    total_ptr,  # [items, ROW_PAD] float32
    num_requests,
    stride_query_token,
    stride_query_head,
    stride_table,
    stride_exact,
    block_stride,
    scale_log2,
    width,  # F
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
    WEIGHT_T: tl.constexpr,
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
    weights = weights_ptr + place * (CHUNK * ROW_PAD)
    sums = sum_ptr + place * (ROW_PAD * F)
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
        means = mean_ptr + tl.cast(item, tl.int64) * (ROW_PAD * F)
        item_start = (position - before).to(tl.int32)
        item_stop = tl.minimum(share_end - before, seq_len).to(tl.int32)
        maximum = tl.full([ROW_PAD], float("-inf"), tl.float32)
        total = tl.zeros([ROW_PAD], tl.float32)
        for start in range(item_start, item_stop, CHUNK):
            stop = tl.minimum(start + CHUNK, item_stop)
            unrotated_chunk(
                pool_ptr, block_stride, source_offset_ptr, table, exact,
                query_ptr + token * stride_query_token, stride_query_head, key_map_ptr,
                key_bias_ptr, row_query_ptr, row_source_ptr, coarse_ptr, fine_ptr, place_ptr,
                plain, turned, scores, start, stop, seq_len, scale_log2, width,
                NUM_TILES, NUM_ECHOED, NUM_ROWS, GROUP, NUM_SOURCES, HEAD_DIM, ROTARY_DIM,
                INTERLEAVED, HAS_BIAS, BLOCK_SIZE, RESIDUAL_BLOCK_SIZE, BLOCK_M, ROW_PAD, HALF_PAD,
                HEADS, STEP, ROWS, OWN_ROWS, PAIRS, SCORE_STAGES,
            )  # fmt: skip
            new_maximum = largest_scores(scores, stop - start, maximum, NUM_ROWS, ROW_PAD, WEIGHT_T)
            total = weighted_values(
                pool_ptr, block_stride, source_offset_ptr, table, scores, weights, sums, means,
                maximum, new_maximum, total, row_source, start, stop, start == item_start,
                stop == item_stop, NUM_SOURCES, HEAD_DIM, BLOCK_SIZE, VALUE_T, ROW_PAD, VALUE_HEADS,
                2 * HALF_PAD, VALUE_STAGES, WEIGHT_T,
            )  # fmt: skip
            maximum = new_maximum
            tl.debug_barrier()
        tl.store(maximum_ptr + item * ROW_PAD + row, maximum)
        tl.store(total_ptr + item * ROW_PAD + row, total)
        position = behind


def unrotated_sizes(heads: EchoedHeads, shape: DecodeShape) -> tuple[int, int]:
    """Elements of one program's plain features and turned queries."""
    dim_pad = heads.dim_pad
    block_m = UNROTATED.tile_len(shape.chunk_len)
    echo_rows = heads.num_echoed * heads.group
    turned = shape.chunk_len // block_m * echo_rows + heads.num_rows - echo_rows
    return block_m * heads.maps.width, turned * dim_pad


def launch_unrotated(
    query: torch.Tensor,
    heads: EchoedHeads,
    batch: DecodeBatch,
    scratch: DecodeScratch,
    shape: DecodeShape,
    rotation: RotationTable,
    scale_log2: float,
) -> None:
    """Fills `scratch.item_mean`, `maximum` and `total`; arguments as in `decode.attend_context`."""
    features, maps, plan = heads.features, heads.maps, batch.plan
    assert maps.key.numel() < 2**31, "elements of a layer's key maps are counted in 32 bits"
    head_dim, group = maps.head_dim, heads.group
    dim_pad = heads.dim_pad
    sizes = UNROTATED.fit(maps.key.dtype.itemsize)
    columns = sizes.heads(heads.num_echoed, dim_pad)
    places = rotation.places_half if maps.key.dtype.itemsize == 2 else rotation.places
    unrotated_decode_kernel[(scratch.num_programs,)](
        query, features.pool, features.offsets, maps.key,
        maps.key if maps.key_bias is None else maps.key_bias,
        heads.row_query, heads.row_source, batch.retained_table, plan.exact,
        batch.query_start_loc, batch.seq_lens, plan.token_end, plan.share_len,
        rotation.coarse, rotation.fine, places, scratch.plain, scratch.turned,
        scratch.scores, scratch.weights, scratch.sums, scratch.item_mean, scratch.maximum,
        scratch.total,
        batch.num_reqs, query.stride(0), query.stride(1), batch.retained_table.stride(0),
        plan.exact.stride(0), features.block_stride, scale_log2, maps.width,
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
        VALUE_HEADS=sizes.value_heads(features.num_heads, head_dim),
        VALUE_T=sizes.value_len,
        WEIGHT_T=shape.block_len,
        SCORE_STAGES=sizes.num_stages,
        VALUE_STAGES=sizes.value_stages,
        num_warps=sizes.num_warps,
        **heads.counts,
    )  # fmt: skip
