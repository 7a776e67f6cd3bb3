"""Attention of decodes over exact residual pages, for steps in which nobody decodes in full mode.

Stock attention would split so few tokens over thread blocks that each fill a multiprocessor, and
merge them in a second kernel. Here a program takes all exact tokens of one request and KV head, or
where those are few, every PARTS-th tile of them: a request may hold many exact pages, and few
programs could not read them fast. `combine` merges the parts with what else it merges.

Launched behind echoed decode, whose programs fill the GPU but do not end at the same time: this
kernel's begin where others have ended, and read what little they need meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from echokv_kernels.gpu.overlap import let_next_begin, wait_for_previous
from echokv_kernels.gpu.softmax import add_weights
from echokv_kernels.gpu.tiles import load_pages


@triton.jit
def exact_decode_kernel(
    query_ptr,  # [n, query heads, HEAD_DIM]
    row_query_ptr,  # [heads * GROUP] int32, query head of each row
    cache_ptr,  # [blocks, heads, BLOCK_SIZE, 2 * HEAD_DIM]
    table_ptr,  # [n, pages] int32, exact pages in order
    lens_ptr,  # [n] int32, tokens in them
    out_ptr,  # [n, PARTS, heads * GROUP, HEAD_DIM], written where a part has tokens
    lse_ptr,  # [n, PARTS, heads * GROUP] float32, natural logarithm, where the request has; or -inf
    stride_query_token,
    stride_query_head,
    stride_block,
    stride_head,
    stride_table,
    stride_lens,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (n, heads, PARTS)."""
    LN_2: tl.constexpr = 0.6931471805599453
    let_next_begin(PDL)
    request, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_parts = tl.num_programs(2)
    num_tokens = tl.load(lens_ptr + request * stride_lens)
    if num_tokens == 0:
        wait_for_previous(PDL)
        return
    member = tl.arange(0, ROWS)
    element = tl.arange(0, DIM_PAD)
    slot = tl.arange(0, BLOCK_T)
    known = element < HEAD_DIM
    real = member < GROUP
    row = head * GROUP + member
    row_mask = real[:, None] & known[None, :]
    out_row = (request * num_parts + part) * (tl.num_programs(1) * GROUP) + row
    if part * BLOCK_T >= num_tokens:
        nothing = tl.full([ROWS], float("-inf"), tl.float32)
        tl.store(lse_ptr + out_row, nothing, mask=real)
        wait_for_previous(PDL)
        return
    query_head = tl.load(row_query_ptr + row, mask=real, other=0).to(tl.int64)
    q_ptrs = query_ptr + request * stride_query_token + query_head * stride_query_head
    query = tl.load(q_ptrs[:, None] + element[None, :], mask=row_mask, other=0.0)
    table_ptr += request * stride_table
    cache_ptr += head.to(tl.int64) * stride_head
    page = load_pages(table_ptr, part * BLOCK_T + slot, num_tokens, BLOCK_SIZE)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK_T], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for first in tl.range(part * BLOCK_T, num_tokens, num_parts * BLOCK_T, num_stages=STAGES):
        position = first + slot
        inside = position < num_tokens
        x_row = page.to(tl.int64) * stride_block + position % BLOCK_SIZE * (2 * HEAD_DIM)
        x_ptrs = cache_ptr + x_row[:, None] + element[None, :]
        x_mask = inside[:, None] & known[None, :]
        key = tl.load(x_ptrs, mask=x_mask, other=0.0)
        value = tl.load(x_ptrs + HEAD_DIM, mask=x_mask, other=0.0)
        page = load_pages(table_ptr, position + num_parts * BLOCK_T, num_tokens, BLOCK_SIZE)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        weights, keep, maximum, total = add_weights(scores, maximum, total)
        acc = tl.dot(weights.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")
    seen = tl.sum(total, 1)
    out_ptrs = out_ptr + (out_row * HEAD_DIM)[:, None] + element[None, :]
    out = acc / seen[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_mask)
    lse = (maximum + tl.log2(seen)) * LN_2
    tl.store(lse_ptr + out_row, lse, mask=real)
    # Nothing here needs echoed decode, but what follows does and waits for this kernel only.
    wait_for_previous(PDL)
