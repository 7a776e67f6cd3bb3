"""Absorbed queries: the key maps applied to the queries instead of to the keys.

One vector per rotation block and row (method.md §3). A line holds those of one rotation block of
one request, all rows. Lines are made ahead as far as there is room; the others are absorbed by the
program that needs them (absorbed.py), so their number bounds memory and not the context.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.overlap import let_next_begin, wait_for_previous
from echokv_kernels.gpu.projection import column_elements, join_pairs, split_pairs
from echokv_kernels.gpu.rotation import cos_sin, element_pairs, pair_elements


@triton.jit
def absorb_tile(
    query_ptr,  # [query heads, HEAD_DIM] of one token
    stride_query_head,
    key_map_ptr,  # [NUM_ECHOED, NUM_SOURCES * HEAD_DIM, HEAD_DIM]
    key_bias_ptr,  # [NUM_ECHOED, HEAD_DIM]
    row_query_ptr,  # [rows] int32
    coarse_ptr,  # RotationTable.coarse
    fine_ptr,  # RotationTable.fine
    absorbed_ptr,  # [NUM_BLOCKS, NUM_ECHOED * GROUP, F]
    offset_ptr,  # [NUM_BLOCKS, NUM_ECHOED * GROUP] float32
    start,
    stop,
    tile,
    ROTATION_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_ECHOED: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALF_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """One head's absorbed queries of some rotation blocks from position `start`, to memory."""
    ECHO_ROWS: tl.constexpr = NUM_ECHOED * GROUP
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    BLOCKS_PER_TILE: tl.constexpr = BLOCK_M // GROUP_PAD
    dtype = absorbed_ptr.dtype.element_ty
    pair = tl.arange(0, HALF_PAD)
    known = pair < HEAD_DIM // 2
    first, second = pair_elements(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    element = tl.arange(0, DIM_PAD)
    inside = element < HEAD_DIM
    own_pair, partner, is_second = element_pairs(element, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    m = tl.arange(0, BLOCK_M)
    member = m % GROUP_PAD
    head = tile % NUM_ECHOED
    block = tile // NUM_ECHOED * BLOCKS_PER_TILE + m // GROUP_PAD
    t0 = start + block * ROTATION_BLOCK
    if ROTATION_BLOCK != 0:
        t0 = (start // ROTATION_BLOCK + block) * ROTATION_BLOCK
    real = (member < GROUP) & (block < NUM_BLOCKS) & (t0 < stop)
    row = head * GROUP + member
    query_head = tl.load(row_query_ptr + row, mask=real, other=0)
    q_ptrs = query_ptr + query_head[:, None].to(tl.int64) * stride_query_head
    q_mask = real[:, None] & inside[None, :]
    q = tl.load(q_ptrs + element[None, :], mask=q_mask, other=0.0).to(tl.float32)
    if ROTATION_BLOCK != 0:
        t0 = tl.where(real, t0, 0)
        other = tl.load(q_ptrs + partner[None, :], mask=q_mask, other=0.0).to(tl.float32)
        cos, sin = cos_sin(coarse_ptr, fine_ptr, t0, own_pair, HEAD_DIM)
        q = q * cos + tl.where(is_second[None, :], -other, other) * sin
        cos, sin = cos_sin(coarse_ptr, fine_ptr, t0, pair, HEAD_DIM)
    if HAS_BIAS:
        bias = tl.load(key_bias_ptr + head * HEAD_DIM + element, mask=inside, other=0.0)
        dot = tl.sum(q * bias[None, :].to(tl.float32), 1)
        tl.store(offset_ptr + block * ECHO_ROWS + row, dot, mask=real)
    q = q.to(dtype)
    a_mask = real[:, None] & known[None, :]
    # Not pipelined: long heads' maps would not fit shared memory twice.
    for source in tl.range(0, NUM_SOURCES, num_stages=1):
        # Rows are features of one source head, columns what the map maps to.
        w_ptrs = key_map_ptr + (head * NUM_SOURCES + source) * (HEAD_DIM * HEAD_DIM)
        w_ptrs = w_ptrs + element[None, :]
        w_mask = known[:, None] & inside[None, :]
        w_first = tl.load(w_ptrs + first[:, None] * HEAD_DIM, mask=w_mask, other=0.0)
        w_second = tl.load(w_ptrs + second[:, None] * HEAD_DIM, mask=w_mask, other=0.0)
        a_first = tl.dot(q, tl.trans(w_first), input_precision="ieee")
        a_second = tl.dot(q, tl.trans(w_second), input_precision="ieee")
        if ROTATION_BLOCK != 0:
            forward = a_first * cos - a_second * sin
            a_second = a_second * cos + a_first * sin
            a_first = forward
        a_ptrs = absorbed_ptr + (block * ECHO_ROWS + row)[:, None] * F + source * HEAD_DIM
        tl.store(a_ptrs + first[None, :], a_first.to(dtype), mask=a_mask)
        tl.store(a_ptrs + second[None, :], a_second.to(dtype), mask=a_mask)


@triton.jit
def line_of(position, ROTATION_BLOCK: tl.constexpr):
    """Rotation block of a position within its request."""
    if ROTATION_BLOCK == 0:
        return position * 0
    else:
        return position // ROTATION_BLOCK


@triton.jit
def made_ahead(request_line, stop, max_lines, ROTATION_BLOCK: tl.constexpr):
    """Whether the lines of a request's positions below `stop` are made ahead."""
    return request_line + line_of(stop - 1, ROTATION_BLOCK) < max_lines


@triton.jit
def ready_line(
    query_ptr,  # [query heads, HEAD_DIM] of the request's token
    stride_query_head,
    key_map_ptr,
    key_bias_ptr,
    row_query_ptr,
    coarse_ptr,
    fine_ptr,
    absorbed_ptr,  # [max_lines + programs * NUM_BLOCKS, NUM_ECHOED * GROUP, F]
    offset_ptr,  # the same without F, float32
    request_line,
    own_line,
    max_lines,
    start,
    stop,
    ROTATION_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_ECHOED: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALF_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Line of the position `start`; lines of a chunk that are not made ahead are made now."""
    BLOCKS_PER_TILE: tl.constexpr = BLOCK_M // GROUP_PAD
    NUM_TILES: tl.constexpr = NUM_ECHOED * ((NUM_BLOCKS + BLOCKS_PER_TILE - 1) // BLOCKS_PER_TILE)
    ROWS: tl.constexpr = NUM_ECHOED * GROUP
    line = tl.cast(request_line + line_of(start, ROTATION_BLOCK), tl.int64)
    if not made_ahead(request_line, stop, max_lines, ROTATION_BLOCK):
        line = tl.cast(own_line, tl.int64)
        for tile in range(NUM_TILES):
            absorb_tile(
                query_ptr, stride_query_head, key_map_ptr, key_bias_ptr, row_query_ptr, coarse_ptr,
                fine_ptr, absorbed_ptr + line * (ROWS * NUM_SOURCES * HEAD_DIM),
                offset_ptr + line * ROWS, start, stop, tile,
                ROTATION_BLOCK, NUM_BLOCKS, NUM_ECHOED, GROUP, NUM_SOURCES, HEAD_DIM,
                ROTARY_DIM, INTERLEAVED, HAS_BIAS, GROUP_PAD, BLOCK_M, HALF_PAD, DIM_PAD,
            )  # fmt: skip
        # Written and read with different thread mappings.
        tl.debug_barrier()
    return line


@triton.jit
def line_blocks(
    query_start_loc_ptr,  # [n + 1] int32
    line_end_ptr,  # [n] int32
    line,  # [LINES] int32
    num_lines,
    num_requests,
    ROTATION_BLOCK: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """First position and query token of the lines' rotation blocks, and which exist, [LINES]."""
    request = line * 0
    for first in range(0, num_requests, REQUESTS):
        index = first + tl.arange(0, REQUESTS)
        end = tl.load(line_end_ptr + index, mask=index < num_requests, other=2147483647)
        request += tl.sum((end[None, :] <= line[:, None]).to(tl.int32), 1)
    real = line < num_lines
    before = tl.load(line_end_ptr + request - 1, mask=real & (request > 0), other=0)
    token = tl.load(query_start_loc_ptr + request, mask=real, other=0).to(tl.int64)
    return tl.where(real, line - before, 0) * ROTATION_BLOCK, token, real


@triton.jit
def turned_back(
    q_1,  # [LINES, PAIRS], first elements of pairs
    q_2,  # [LINES, PAIRS], the second
    cos,  # [LINES, PAIRS] float32, of each line's t0; any where ROTATION_BLOCK is 0
    sin,
    ROTATION_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Queries rotated back by t0, [LINES, 2 * PAIRS], columns as in column_elements."""
    if ROTATION_BLOCK != 0:
        back = q_2.to(tl.float32) * cos - q_1.to(tl.float32) * sin
        q_1 = (q_1.to(tl.float32) * cos + q_2.to(tl.float32) * sin).to(q_1.dtype)
        q_2 = back.to(q_1.dtype)
    return join_pairs(q_1, q_2, INTERLEAVED)


@triton.jit
def turned_queries(
    query_ptr,  # [T, query heads, HEAD_DIM]
    stride_query_token,
    stride_query_head,
    row_query_ptr,  # [MEMBERS] int32
    token,  # [LINES] int64
    cos,  # here and below as in turned_back
    sin,
    mask,  # [LINES, PAIRS] bool
    MEMBERS: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Some query heads of the lines' tokens as turned_back gives them, one after the other."""
    pair = tl.arange(0, cos.shape[1])
    first, second = pair_elements(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    loaded = ()
    for member in tl.static_range(MEMBERS):
        query_head = tl.load(row_query_ptr + member).to(tl.int64)
        q_ptrs = query_ptr + (token * stride_query_token + query_head * stride_query_head)[:, None]
        q_1 = tl.load(q_ptrs + first[None, :], mask=mask, other=0.0)
        q_2 = tl.load(q_ptrs + second[None, :], mask=mask, other=0.0)
        loaded += (q_1, q_2)  # type: ignore[assignment]
    # All are on their way before the first is waited for.
    turned = ()
    for member in tl.static_range(MEMBERS):
        q_1, q_2 = loaded[2 * member], loaded[2 * member + 1]
        turned += (turned_back(q_1, q_2, cos, sin, ROTATION_BLOCK, INTERLEAVED),)  # type: ignore[assignment]
    return turned


@triton.jit
def turned_forward(
    a,  # [LINES, 2 * PAIRS] float32, columns as in column_elements
    cos,  # [LINES, PAIRS] float32
    sin,
    INTERLEAVED: tl.constexpr,
):
    """Absorbed queries rotated forward by t0, of the shape and columns of `a`."""
    LINES: tl.constexpr = cos.shape[0]
    PAIRS: tl.constexpr = cos.shape[1]
    a_1, a_2 = split_pairs(a, 1, 2 * PAIRS, INTERLEAVED)
    a_1, a_2 = tl.reshape(a_1, [LINES, PAIRS]), tl.reshape(a_2, [LINES, PAIRS])
    return join_pairs(a_1 * cos - a_2 * sin, a_2 * cos + a_1 * sin, INTERLEAVED)


@triton.jit
def sources_at_once(work, NUM_SOURCES: tl.constexpr, TASK_COST: tl.constexpr):
    """Source heads per task that end a launch soonest: few begin sooner, many begin less often.

    There are `work` tasks if each takes all source heads. To begin a task costs as much as
    TASK_COST source heads.
    """
    best = NUM_SOURCES
    least = 2147483647
    sources = tl.full([], NUM_SOURCES, tl.int32)
    while sources > 0:
        rounds = tl.cdiv(work * tl.cdiv(NUM_SOURCES, sources), tl.num_programs(0))
        cost = rounds * (TASK_COST + sources)
        best = tl.where(cost < least, sources, best)
        least = tl.minimum(least, cost)
        sources = tl.where(sources > 1, (sources + 1) // 2, 0)
    return best


@triton.jit(do_not_specialize=["num_requests", "max_lines"])
def absorb_kernel(
    query_ptr,  # [T, query heads, HEAD_DIM]
    key_map_ptr,  # [NUM_ECHOED, F, HEAD_DIM]
    key_bias_ptr,  # [NUM_ECHOED, HEAD_DIM]
    row_query_ptr,  # [NUM_ROWS] int32
    query_start_loc_ptr,  # [n + 1] int32
    line_end_ptr,  # [n] int32
    coarse_ptr,
    fine_ptr,
    absorbed_ptr,  # [max_lines, NUM_ECHOED * GROUP, F]
    offset_ptr,  # [max_lines, NUM_ECHOED * GROUP] float32
    num_requests,
    max_lines,
    stride_query_token,
    stride_query_head,
    ROTATION_BLOCK: tl.constexpr,
    NUM_ECHOED: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF_PAD: tl.constexpr,
    LINES: tl.constexpr,
    REQUESTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    TASK_COST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Fills the lines; persistent programs.

    A task is LINES lines, of whichever requests, MEMBERS query heads of one KV head and some source
    heads. It turns the queries back, keeps them in shared memory, and takes the source heads' maps
    in turn.
    """
    ECHO_ROWS: tl.constexpr = NUM_ECHOED * GROUP
    F: tl.constexpr = NUM_SOURCES * HEAD_DIM
    ROW_PARTS: tl.constexpr = ECHO_ROWS // MEMBERS
    num_lines = tl.minimum(tl.load(line_end_ptr + num_requests - 1), max_lines)
    let_next_begin(PDL)
    work = tl.cdiv(num_lines, LINES) * ROW_PARTS
    num_sources = sources_at_once(work, NUM_SOURCES, TASK_COST)
    source_parts = tl.cdiv(NUM_SOURCES, num_sources)
    dtype = absorbed_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = 2 * HALF_PAD
    column = tl.arange(0, COLUMNS)
    element, known = column_elements(column, HEAD_DIM, ROTARY_DIM, INTERLEAVED, COLUMNS)
    pair = tl.arange(0, HALF_PAD)
    map_at = (element * HEAD_DIM)[:, None] + element[None, :]
    map_mask = known[:, None] & known[None, :]
    for task in range(tl.program_id(0), work * source_parts, tl.num_programs(0)):
        first_source = task % source_parts * num_sources
        last_source = tl.minimum(first_source + num_sources, NUM_SOURCES)
        first_row = task // source_parts % ROW_PARTS * MEMBERS
        head = first_row // GROUP
        map_ptr = key_map_ptr + head * NUM_SOURCES * (HEAD_DIM * HEAD_DIM)
        line = task // source_parts // ROW_PARTS * LINES + tl.arange(0, LINES)
        t0, token, real = line_blocks(
            query_start_loc_ptr, line_end_ptr, line, num_lines, num_requests, ROTATION_BLOCK,
            REQUESTS,
        )  # fmt: skip
        cos, sin = cos_sin(coarse_ptr, fine_ptr, t0, pair, HEAD_DIM)
        wait_for_previous(PDL)
        turned = turned_queries(
            query_ptr, stride_query_token, stride_query_head, row_query_ptr + first_row, token,
            cos, sin, real[:, None] & (pair < HEAD_DIM // 2)[None, :],
            MEMBERS, ROTATION_BLOCK, HEAD_DIM, ROTARY_DIM, INTERLEAVED,
        )  # fmt: skip
        if HAS_BIAS and first_source == 0:
            bias_ptrs = key_bias_ptr + head * HEAD_DIM + element
            bias = tl.load(bias_ptrs, mask=known, other=0.0).to(tl.float32)
            for member in tl.static_range(MEMBERS):
                at = line.to(tl.int64) * ECHO_ROWS + first_row + member
                tl.store(offset_ptr + at, tl.sum(turned[member] * bias[None, :], 1), mask=real)
        for source in tl.range(first_source, last_source, num_stages=1):
            # Rows are features of one source head, columns what the map maps to.
            keys = tl.load(
                map_ptr + source * (HEAD_DIM * HEAD_DIM) + map_at, mask=map_mask, other=0.0
            )
            for member in tl.static_range(MEMBERS):
                a = tl.dot(turned[member], tl.trans(keys), input_precision="ieee")
                if ROTATION_BLOCK != 0:
                    a = turned_forward(a, cos, sin, INTERLEAVED)
                at = line.to(tl.int64) * ECHO_ROWS + first_row + member
                a_ptrs = absorbed_ptr + (at * F + source * HEAD_DIM)[:, None] + element[None, :]
                # Decode reads them for every tile; the features it reads once would displace them.
                tl.store(
                    a_ptrs, a.to(dtype), mask=real[:, None] & known[None, :],
                    eviction_policy="evict_last",
                )  # fmt: skip
    # At the latest: decode needs what is older than this kernel, and waits for this kernel only.
    wait_for_previous(PDL)
