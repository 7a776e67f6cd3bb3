"""What a program writes to a tile of the workspace (rebuild.py): rebuilt positions, and copies."""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.projection import (
    block_cos_sin,
    column_elements,
    project,
    project_rotated,
    split_pairs,
)
from echokv_kernels.gpu.rotation import pair_elements


@triton.jit
def fill_rebuilt(
    workspace_ptr,  # [num_tiles, TILE, nd, 2, HEAD_DIM] model dtype, from the key or the value on
    feature_ptr,  # pool of the features, from the key or the value on
    offsets_ptr,  # [num_sources] int64
    map_ptr,  # [NUM_HEADS, num_sources * HEAD_DIM, HEAD_DIM] cache dtype
    bias_ptr,  # [NUM_HEADS, HEAD_DIM] cache dtype
    has_bias,  # whether there is one
    group_heads_ptr,  # [NUM_HEADS] int32
    coarse_ptr,  # [C, 2, HEAD_DIM / 2] float32
    fine_ptr,  # [256, 2, HEAD_DIM / 2] float32
    position,  # [ROWS] int32
    start,  # int32
    last,  # int32
    slot,  # [ROWS] int64, elements to each position in the workspace
    row,  # [ROWS] int64, elements to each position in the pages of the features
    wanted,  # [ROWS] bool
    head,  # first map
    stride_workspace_head,
    IS_ROTATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Rebuilds HEADS heads, keys (rotated unless the maps are absolute) or values."""
    dtype: tl.constexpr = workspace_ptr.dtype.element_ty
    column = tl.arange(0, HEADS * COLUMNS)
    column_head = head + column // COLUMNS
    if IS_ROTATED:
        element, known = column_elements(column, HEAD_DIM, ROTARY_DIM, INTERLEAVED, COLUMNS)
    else:
        element = column % COLUMNS
        known = element < HEAD_DIM
    known = known & (column_head < NUM_HEADS)
    map_column = column_head * (NUM_SOURCES * HEAD_DIM * HEAD_DIM) + element
    if IS_ROTATED:
        total = project_rotated(
            feature_ptr, offsets_ptr, row, wanted, map_ptr, map_column, known,
            coarse_ptr, fine_ptr, position, start, last, NUM_SOURCES,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, STEP // 2, ROTATION_BLOCK, NUM_BLOCKS,
        )  # fmt: skip
    else:
        total = project(
            feature_ptr, offsets_ptr, row, wanted, map_ptr, map_column, known,
            NUM_SOURCES, HEAD_DIM, STEP,
        )  # fmt: skip
    if HAS_BIAS:
        bias_ptrs = bias_ptr + column_head * HEAD_DIM + element
        bias = tl.load(bias_ptrs, mask=known & has_bias, other=0.0)
        total += bias.to(tl.float32)[None, :]
    if IS_ROTATED:
        HALF: tl.constexpr = COLUMNS // 2
        pair_column = tl.arange(0, HEADS * HALF)
        pair = pair_column % HALF
        pair_head = head + pair_column // HALF
        pair_known = (pair < HEAD_DIM // 2) & (pair_head < NUM_HEADS)
        place = tl.load(group_heads_ptr + pair_head, mask=pair_known, other=0)
        # All heads share the cosines; padding takes those of the last pair.
        cos, sin = block_cos_sin(
            coarse_ptr, fine_ptr, position, start, last,
            tl.minimum(tl.arange(0, HALF), HEAD_DIM // 2 - 1),
            HEAD_DIM, ROTATION_BLOCK, NUM_BLOCKS,
        )  # fmt: skip
        cos, sin = cos[:, None, :], sin[:, None, :]
        a, b = split_pairs(total, HEADS, COLUMNS, INTERLEAVED)
        SHAPE: tl.constexpr = [total.shape[0], HEADS * HALF]
        turned_first = tl.reshape((a * cos - b * sin).to(dtype), SHAPE)
        turned_second = tl.reshape((b * cos + a * sin).to(dtype), SHAPE)
        first, second = pair_elements(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
        at = workspace_ptr + slot[:, None] + (place * stride_workspace_head)[None, :]
        mask = wanted[:, None] & pair_known[None, :]
        tl.store(at + first[None, :], turned_first, mask=mask)
        tl.store(at + second[None, :], turned_second, mask=mask)
    else:
        place = tl.load(group_heads_ptr + column_head, mask=known, other=0)
        at = workspace_ptr + slot[:, None] + (place * stride_workspace_head + element)[None, :]
        tl.store(at, total.to(dtype), mask=wanted[:, None] & known[None, :])


@triton.jit
def fill_copied(
    workspace_ptr,  # as in fill_rebuilt
    group_heads_ptr,  # [NUM_HEADS] int32
    residual_ptr,  # [num_blocks, nd, bs, 2 * HEAD_DIM] cache dtype, from the key or the value on
    fresh_ptr,  # [T, H, HEAD_DIM] model dtype, this step's keys or values
    discarded_ptr,  # [nd] int32
    slot,  # [ROWS] int64
    residual_row,  # [ROWS] int64, elements to each position in its residual page
    token,  # [ROWS] int64, this step's token
    is_rebuilt,  # [ROWS] bool, left alone
    is_exact,  # [ROWS] bool
    is_fresh,  # [ROWS] bool
    head,  # first map
    stride_workspace_head,
    stride_residual_head,
    stride_fresh_token,
    stride_fresh_head,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copies exact and fresh positions; zeroes those that are neither, which nothing may read."""
    column = tl.arange(0, HEADS * COLUMNS)
    column_head = head + column // COLUMNS
    element = column % COLUMNS
    known = (element < HEAD_DIM) & (column_head < NUM_HEADS)
    place = tl.load(group_heads_ptr + column_head, mask=known, other=0)
    fresh_head = tl.load(discarded_ptr + place, mask=known, other=0)
    fresh_row = fresh_ptr + (token * stride_fresh_token)[:, None]
    fresh = tl.load(
        fresh_row + (fresh_head * stride_fresh_head + element)[None, :],
        mask=is_fresh[:, None] & known[None, :],
        other=0.0,
    )
    exact_row = residual_ptr + residual_row[:, None]
    exact = tl.load(
        exact_row + (place * stride_residual_head + element)[None, :],
        mask=is_exact[:, None] & known[None, :],
        other=0.0,
    )
    dtype: tl.constexpr = workspace_ptr.dtype.element_ty
    tl.store(
        workspace_ptr + slot[:, None] + (place * stride_workspace_head + element)[None, :],
        tl.where(is_fresh[:, None], fresh.to(dtype), exact.to(dtype)),
        mask=(is_rebuilt == 0)[:, None] & known[None, :],
    )
