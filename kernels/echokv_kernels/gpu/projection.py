"""Features times maps on tensor cores, keys rotated on the way.

Keys are rotated back by t0 before the product and forward after it (reconstruct.py says why), so
both operands and results are needed as pairs:

    half-split     elements i and i + head_dim / 2 of a source head are loaded as two operands;
                   the columns of a head are its first elements, then its second ones
    interleaved    elements 2 i and 2 i + 1 are neighbours in the operand and in the columns

A head has COLUMNS columns, head_dim rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.rotation import pair_elements


@triton.jit
def _in_runs(
    element,  # [N] int32
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
):
    """Tells the compiler that elements come in runs of eight, which it may not see by itself."""
    if HEAD_DIM % 16 == 0 and ROTARY_DIM % 16 == 0:
        return tl.max_contiguous(tl.multiple_of(element, 8), 8)
    return element


@triton.jit
def column_elements(
    column,  # [HEADS * COLUMNS] int32
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Which element of its head each column of a key holds, and whether there is one."""
    if INTERLEAVED or (ROTARY_DIM == HEAD_DIM and COLUMNS == HEAD_DIM):
        element = column % COLUMNS
        known = element < HEAD_DIM
    else:
        HALF: tl.constexpr = COLUMNS // 2
        pair = column % HALF
        first, second = pair_elements(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
        element = tl.where(column % COLUMNS < HALF, first, second)
        element = _in_runs(element, HEAD_DIM, ROTARY_DIM)
        known = pair < HEAD_DIM // 2
    # Without this the maps would be loaded one by one, and not ahead of time.
    return element, tl.max_constancy(known, 8)


@triton.jit
def block_cos_sin(
    coarse_ptr,  # [C, 2, HEAD_DIM / 2] float32
    fine_ptr,  # [256, 2, HEAD_DIM / 2] float32
    position,  # [ROWS] int32, below the tables' end
    start,  # int32, first position of the rows
    last,  # int32, a position whose rotation block the tables know
    pair,  # [P] int32, all of them pairs of the head
    HEAD_DIM: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Cosines and sines of each row's t0, [ROWS, P], or [1, P] if all rows share one.

    No masks and no choices here: rows read their block's cosines by a change of shape. What the
    compiler can trace back to loads it loads ahead of time, and straight to where a product's
    operand is computed; anything else would send the features through shared memory once more.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    if NUM_BLOCKS == 0:
        t0 = position // ROTATION_BLOCK * ROTATION_BLOCK
    else:
        t0 = start // ROTATION_BLOCK * ROTATION_BLOCK + tl.arange(0, NUM_BLOCKS) * ROTATION_BLOCK
        if NUM_BLOCKS > 1:
            t0 = tl.minimum(t0, last // ROTATION_BLOCK * ROTATION_BLOCK)
    coarse = coarse_ptr + (t0 // 256)[:, None] * HEAD_DIM + pair[None, :]
    fine = fine_ptr + (t0 % 256)[:, None] * HEAD_DIM + pair[None, :]
    cos_coarse, sin_coarse = tl.load(coarse), tl.load(coarse + HALF)
    cos_fine, sin_fine = tl.load(fine), tl.load(fine + HALF)
    cos = cos_coarse * cos_fine - sin_coarse * sin_fine
    sin = sin_coarse * cos_fine + cos_coarse * sin_fine
    if NUM_BLOCKS > 1:
        ROWS: tl.constexpr = position.shape[0]
        SHAPE: tl.constexpr = [NUM_BLOCKS, ROWS // NUM_BLOCKS, pair.shape[0]]
        cos = tl.reshape(tl.broadcast_to(cos[:, None, :], SHAPE), [ROWS, pair.shape[0]])
        sin = tl.reshape(tl.broadcast_to(sin[:, None, :], SHAPE), [ROWS, pair.shape[0]])
    return cos, sin


@triton.jit
def _source_offset(offsets_ptr, i):
    """Elements to source head i: eight of them fill 16 bytes, and heads begin at such multiples.

    Loops carry the offset of their next step: a load whose address another load of the same step
    gives would halve the depth of the pipeline.
    """
    return tl.multiple_of(tl.load(offsets_ptr + i), 8)


@triton.jit
def project(
    feature_ptr,  # [blocks * stride] cache dtype: the keys, or the values, of the source heads
    offsets_ptr,  # [num_sources] int64, elements to each source head
    row,  # [ROWS] int64, elements to each position's slot in its page
    wanted,  # [ROWS] bool; other rows give 0
    map_ptr,  # [maps, num_sources * HEAD_DIM, HEAD_DIM] cache dtype
    column,  # [N] int32, elements to each column of the maps
    column_known,  # [N] bool
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STEP: tl.constexpr,
):
    """Features times maps, as they are; [ROWS, N] float32."""
    CHUNKS: tl.constexpr = HEAD_DIM // STEP
    step = tl.arange(0, STEP)
    known = column_known[None, :]
    x_ptrs = feature_ptr + row[:, None] + step[None, :]
    map_ptrs = map_ptr + step[:, None] * HEAD_DIM + column[None, :]
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    NUM_STEPS: tl.constexpr = NUM_SOURCES * CHUNKS
    offset = _source_offset(offsets_ptr, 0)
    for i in range(NUM_STEPS):
        x = tl.load(x_ptrs + (offset + i % CHUNKS * STEP), mask=wanted[:, None], other=0.0)
        w = tl.load(map_ptrs + i * (STEP * HEAD_DIM), mask=known, other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
        offset = _source_offset(offsets_ptr, tl.minimum(i + 1, NUM_STEPS - 1) // CHUNKS)
    return total


@triton.jit
def project_rotated(
    feature_ptr,  # here and below as in project
    offsets_ptr,
    row,
    wanted,
    map_ptr,
    column,
    column_known,
    coarse_ptr,  # here and below as in block_cos_sin
    fine_ptr,
    position,
    start,
    last,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Keys rotated back by t0 times maps, [ROWS, N] float32."""
    ROWS: tl.constexpr = row.shape[0]
    CHUNKS: tl.constexpr = HEAD_DIM // (2 * PAIRS)
    known = column_known[None, :]
    total = tl.zeros([ROWS, column.shape[0]], dtype=tl.float32)
    # Rows that share cosines load them in the loop, a few bytes and ahead of time like the rest.
    # Others keep a chunk's in registers, so all source heads take that chunk first.
    PHASES: tl.constexpr = CHUNKS if NUM_BLOCKS == 0 else 1
    for phase in range(PHASES):
        if NUM_BLOCKS == 0:
            cos, sin = block_cos_sin(
                coarse_ptr, fine_ptr, position, start, last, phase * PAIRS + tl.arange(0, PAIRS),
                HEAD_DIM, ROTATION_BLOCK, NUM_BLOCKS,
            )  # fmt: skip
        offset = _source_offset(offsets_ptr, 0)
        for i in range(NUM_SOURCES * CHUNKS // PHASES):
            source = i % NUM_SOURCES
            chunk = phase + i // NUM_SOURCES
            pair = chunk * PAIRS + tl.arange(0, PAIRS)
            if NUM_BLOCKS != 0:
                cos, sin = block_cos_sin(
                    coarse_ptr, fine_ptr, position, start, last, pair,
                    HEAD_DIM, ROTATION_BLOCK, NUM_BLOCKS,
                )  # fmt: skip
            at = feature_ptr + offset + row[:, None]
            maps = map_ptr + source * (HEAD_DIM * HEAD_DIM) + column[None, :]
            if INTERLEAVED:
                element = chunk * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
                x = tl.load(at + element[None, :], mask=wanted[:, None], other=0.0)
                w = tl.load(maps + element[:, None] * HEAD_DIM, mask=known, other=0.0)
                a, b = tl.split(tl.reshape(x.to(tl.float32), [ROWS, PAIRS, 2]))
                back = tl.join(a * cos + b * sin, b * cos - a * sin)
                back = tl.reshape(back, [ROWS, 2 * PAIRS]).to(x.dtype)
                total = tl.dot(back, w, total, input_precision="ieee")
            else:
                first, second = pair_elements(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
                if ROTARY_DIM != HEAD_DIM:
                    first = _in_runs(first, HEAD_DIM, ROTARY_DIM)
                    second = _in_runs(second, HEAD_DIM, ROTARY_DIM)
                x_first = tl.load(at + first[None, :], mask=wanted[:, None], other=0.0)
                x_second = tl.load(at + second[None, :], mask=wanted[:, None], other=0.0)
                w_first = tl.load(maps + first[:, None] * HEAD_DIM, mask=known, other=0.0)
                w_second = tl.load(maps + second[:, None] * HEAD_DIM, mask=known, other=0.0)
                a, b = x_first.to(tl.float32), x_second.to(tl.float32)
                back_first = (a * cos + b * sin).to(x_first.dtype)
                back_second = (b * cos - a * sin).to(x_first.dtype)
                total = tl.dot(back_first, w_first, total, input_precision="ieee")
                total = tl.dot(back_second, w_second, total, input_precision="ieee")
            offset = _source_offset(offsets_ptr, (i + 1) % NUM_SOURCES)
    return total


@triton.jit
def split_pairs(
    total,  # [ROWS, HEADS * COLUMNS] float32, columns as in column_elements
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """First and second elements of the pairs of all heads, [ROWS, HEADS, COLUMNS / 2] each."""
    ROWS: tl.constexpr = total.shape[0]
    HALF: tl.constexpr = COLUMNS // 2
    if not INTERLEAVED:
        total = tl.permute(tl.reshape(total, [ROWS, HEADS, 2, HALF]), [0, 1, 3, 2])
    return tl.split(tl.reshape(total, [ROWS, HEADS, HALF, 2]))


@triton.jit
def join_pairs(
    first,  # [ROWS, PAIRS], first elements of the pairs of one head
    second,  # [ROWS, PAIRS], the second
    INTERLEAVED: tl.constexpr,
):
    """The head [ROWS, 2 * PAIRS], columns as in column_elements: the reverse of split_pairs."""
    pairs = tl.join(first, second)
    if not INTERLEAVED:
        pairs = tl.permute(pairs, [0, 2, 1])
    return tl.reshape(pairs, [first.shape[0], 2 * first.shape[1]])
