"""Scores of one tile of cached keys that are mapped un-rotated (unrotated.py), to scratch.

Keys of echoed heads are rebuilt from plain features, rotated forward within the tile and multiplied
by queries that were turned back to its first position; they never leave registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.projection import column_elements


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
    place_ptr,  # [2, 256, HALF_PAD]: cosines, then sines of the places in a tile
    exact_ptr,  # [residual pages] uint8 of one request
    scores_ptr,  # [BLOCK_M, ROW_PAD] float32 of this tile
    start,
    stop,
    seq_len,
    scale_log2,
    width,  # F, as a number that the compiler does not know
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
    # Two loops: one loop would have to wait for every product before the next. If the length of the
    # inner one were known, it would be unrolled, and spill registers (9 % of the time).
    for group in range(0, NUM_GROUPS):
        acc = tl.zeros([BLOCK_M, HEADS * COLUMNS], tl.float32)
        real = known & (group * HEADS + column // COLUMNS < NUM_ECHOED)
        real = tl.max_constancy(real, 8)
        group_map = key_map_ptr + group * (HEADS * F * HEAD_DIM)
        for k in tl.range(0, width, STEP, num_stages=STAGES):
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
    sin = tl.load(at + 256 * HALF_PAD).to(tl.float32)[:, None, :]
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
