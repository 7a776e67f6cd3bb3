"""What loops over tiles of cached tokens load besides the tokens."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def source_offsets(
    source_offset_ptr,  # [NUM_SOURCES] int64
    step,
    HEADS_PER_STEP: tl.constexpr,
):
    """Offsets of one step's source heads, a tuple of HEADS_PER_STEP scalars, int64."""
    offsets = ()
    for head in tl.static_range(HEADS_PER_STEP):
        # Heads begin at multiples of 16 elements.
        offset = tl.load(source_offset_ptr + step * HEADS_PER_STEP + head)
        offsets += (tl.multiple_of(offset, 16),)  # type: ignore[assignment]
    return offsets


@triton.jit
def load_pages(table_ptr, position, stop, BLOCK_SIZE: tl.constexpr):
    """Blocks of the positions below `stop`, int32.

    Loops load them one tile ahead and carry them: a load whose address another load of the same
    iteration gives would halve the depth of the pipeline.
    """
    return tl.load(table_ptr + position // BLOCK_SIZE, mask=position < stop, other=0)


@triton.jit
def load_absorbed(
    absorbed_ptr,
    own_ptrs,  # [ROW_PAD] pointers to the rows' queries
    row_source,  # [ROW_PAD] int32
    block,
    source,
    ECHO_ROWS: tl.constexpr,
    F: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """Rows' queries of one source head, [ROW_PAD, DIM_PAD]: absorbed, or own where it is theirs.

    In a pipelined loop these are asynchronous copies like those of the features, so every tile
    reads them from the L2 cache again (launch.py says what holding them costs).
    """
    row = tl.arange(0, ROW_PAD)
    element = tl.arange(0, DIM_PAD)
    wanted = row < ECHO_ROWS
    a_row = tl.multiple_of((block * ECHO_ROWS + row) * F + source * HEAD_DIM, 16)
    a_ptrs = absorbed_ptr + a_row
    if HAS_OWN:
        a_ptrs = tl.where(wanted, a_ptrs, own_ptrs)
        wanted = wanted | (row_source == source)
    mask = wanted[:, None] & (element < HEAD_DIM)[None, :]
    return tl.load(a_ptrs[:, None] + element[None, :], mask=mask, other=0.0)
