"""What decode with un-rotated keys prepares: plain features and turned queries.

Tiles begin at any position s; place i of a tile is position s + i. A key is rotated forward by i
only, and the queries are rotated back by s, which leaves their product as it was.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.projection import _in_runs
from echokv_kernels.gpu.rotation import cos_sin, pair_elements


@triton.jit
def turn_queries(
    query_ptr,  # [query heads, HEAD_DIM] of one token
    stride_query_head,
    row_query_ptr,  # [NUM_ROWS] int32
    coarse_ptr,
    fine_ptr,
    turned_ptr,  # [NUM_TILES, ECHO_ROWS, 2, HALF_PAD], then [retained rows, 2 * HALF_PAD]
    start,
    stop,
    NUM_TILES: tl.constexpr,
    ECHO_ROWS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Echoed rows' queries rotated back by each tile's start, as pairs; retained rows' as is."""
    ROWS: tl.constexpr = 16
    dtype = turned_ptr.dtype.element_ty
    pair = tl.arange(0, HALF_PAD)
    known = pair < HEAD_DIM // 2
    first, second = pair_elements(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    for row_start in range(0, ECHO_ROWS, ROWS):
        row = row_start + tl.arange(0, ROWS)
        real = row < ECHO_ROWS
        mask = real[:, None] & known[None, :]
        query_head = tl.load(row_query_ptr + row, mask=real, other=0).to(tl.int64)
        q_ptrs = query_ptr + query_head[:, None] * stride_query_head
        a = tl.load(q_ptrs + first[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(q_ptrs + second[None, :], mask=mask, other=0.0).to(tl.float32)
        for tile in range(0, tl.cdiv(stop - start, BLOCK_M)):
            origin = start + tile * BLOCK_M + tl.arange(0, 1)
            cos, sin = cos_sin(coarse_ptr, fine_ptr, origin, pair, HEAD_DIM)
            to = turned_ptr + ((tile * ECHO_ROWS + row) * (2 * HALF_PAD))[:, None] + pair[None, :]
            # Padding pairs are written too: they meet zeros that must not be made NaN.
            tl.store(to, (a * cos + b * sin).to(dtype), mask=real[:, None])
            tl.store(to + HALF_PAD, (b * cos - a * sin).to(dtype), mask=real[:, None])
    element = tl.arange(0, 2 * HALF_PAD)
    for row_start in range(ECHO_ROWS, NUM_ROWS, ROWS):
        row = row_start + tl.arange(0, ROWS)
        real = row < NUM_ROWS
        query_head = tl.load(row_query_ptr + row, mask=real, other=0).to(tl.int64)
        q = tl.load(
            query_ptr + query_head[:, None] * stride_query_head + element[None, :],
            mask=real[:, None] & (element < HEAD_DIM)[None, :],
            other=0.0,
        )
        to = turned_ptr + NUM_TILES * ECHO_ROWS * (2 * HALF_PAD)
        to += ((row - ECHO_ROWS) * (2 * HALF_PAD))[:, None] + element[None, :]
        tl.store(to, q.to(dtype), mask=real[:, None])


@triton.jit
def load_pairs(
    head_ptr,  # [ROWS, 1] pointers to the first element of a head
    mask,  # [ROWS, 1] bool
    chunk,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The chunk's pairs of a head: first and second elements, or [ROWS, 2 * PAIRS] neighbours."""
    if INTERLEAVED:
        element = chunk * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
        known = tl.max_constancy(element < HEAD_DIM, 8)[None, :]
        x_first = tl.load(
            head_ptr + element[None, :], mask=mask & known, other=0.0, eviction_policy="evict_first"
        )
        x_second = x_first
    else:
        pair = chunk * PAIRS + tl.arange(0, PAIRS)
        known = tl.max_constancy(pair < HEAD_DIM // 2, 8)[None, :]
        first, second = pair_elements(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
        if ROTARY_DIM != HEAD_DIM:
            first = _in_runs(first, HEAD_DIM, ROTARY_DIM)
            second = _in_runs(second, HEAD_DIM, ROTARY_DIM)
        x_first = tl.load(
            head_ptr + first[None, :], mask=mask & known, other=0.0, eviction_policy="evict_first"
        )
        x_second = tl.load(
            head_ptr + second[None, :], mask=mask & known, other=0.0, eviction_policy="evict_first"
        )
    return x_first, x_second


@triton.jit
def store_turned_back(
    head_ptr,  # [ROWS, 1] pointers, written
    x_first,  # here and below as load_pairs returns them
    x_second,
    cos,  # [ROWS, PAIRS] float32
    sin,
    chunk,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Rotates the chunk's pairs of a head back."""
    dtype = x_first.dtype
    if INTERLEAVED:
        element = chunk * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
        known = tl.max_constancy(element < HEAD_DIM, 8)[None, :]
        a, b = tl.split(tl.reshape(x_first.to(tl.float32), [cos.shape[0], PAIRS, 2]))
        back = tl.join(a * cos + b * sin, b * cos - a * sin)
        back = tl.reshape(back, [cos.shape[0], 2 * PAIRS]).to(dtype)
        tl.store(head_ptr + element[None, :], back, mask=known, eviction_policy="evict_last")
    else:
        pair = chunk * PAIRS + tl.arange(0, PAIRS)
        known = tl.max_constancy(pair < HEAD_DIM // 2, 8)[None, :]
        first, second = pair_elements(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
        if ROTARY_DIM != HEAD_DIM:
            first = _in_runs(first, HEAD_DIM, ROTARY_DIM)
            second = _in_runs(second, HEAD_DIM, ROTARY_DIM)
        a, b = x_first.to(tl.float32), x_second.to(tl.float32)
        tl.store(
            head_ptr + first[None, :],
            (a * cos + b * sin).to(dtype),
            mask=known,
            eviction_policy="evict_last",
        )
        tl.store(
            head_ptr + second[None, :],
            (b * cos - a * sin).to(dtype),
            mask=known,
            eviction_policy="evict_last",
        )


@triton.jit
def plain_features(
    pool_ptr,
    source_offset_ptr,  # [NUM_SOURCES] int64
    x_row,  # [BLOCK_M] int64, elements to each token's slot
    inside,  # [BLOCK_M] bool
    coarse_ptr,
    fine_ptr,
    plain_ptr,  # [BLOCK_M, F], written
    start,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Features of the tile that begins at position `start`, rotated back by their positions."""
    HALF: tl.constexpr = HEAD_DIM // 2
    slot = tl.arange(0, BLOCK_M)
    to = plain_ptr + (slot * (NUM_SOURCES * HEAD_DIM))[:, None]
    mask = inside[:, None]
    for chunk in tl.static_range((HALF + PAIRS - 1) // PAIRS):
        pair = chunk * PAIRS + tl.arange(0, PAIRS)
        known = (pair < HALF)[None, :]
        # Angle of the tile's start plus angle of the place in the tile.
        tile_cos, tile_sin = cos_sin(coarse_ptr, fine_ptr, start + tl.arange(0, 1), pair, HEAD_DIM)
        at = fine_ptr + (slot * HEAD_DIM)[:, None] + pair[None, :]
        place_cos = tl.load(at, mask=known, other=1.0)
        place_sin = tl.load(at + HALF, mask=known, other=0.0)
        cos = tile_cos * place_cos - tile_sin * place_sin
        sin = tile_sin * place_cos + tile_cos * place_sin
        x_ptrs = pool_ptr + x_row[:, None]
        a, b = load_pairs(
            x_ptrs + tl.multiple_of(tl.load(source_offset_ptr), 16), mask, chunk,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, PAIRS,
        )  # fmt: skip
        for source in range(NUM_SOURCES):
            # The next head is on its way while this one is turned.
            later = tl.minimum(source + 1, NUM_SOURCES - 1)
            next_a, next_b = load_pairs(
                x_ptrs + tl.multiple_of(tl.load(source_offset_ptr + later), 16),
                mask & (source + 1 < NUM_SOURCES), chunk,
                HEAD_DIM, ROTARY_DIM, INTERLEAVED, PAIRS,
            )  # fmt: skip
            store_turned_back(
                to + source * HEAD_DIM, a, b, cos, sin, chunk,
                HEAD_DIM, ROTARY_DIM, INTERLEAVED, PAIRS,
            )  # fmt: skip
            a, b = next_a, next_b
