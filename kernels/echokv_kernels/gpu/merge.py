"""Attention over several sets of keys, merged round by round in float32.

    first round     accumulator = part
    later rounds    accumulator = accumulator and part, weighted by exp(lse)
    at the end      output[token, rows[head]] = accumulator[token, head]

Reference: `softmax.merge_attention`. A query that saw nothing has out = 0 and lse = -inf. Tokens
of requests that are not compressed, and padding, are left alone throughout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from echokv_kernels.gpu.launch import MERGE


@triton.jit
def _wanted_tokens(
    token_request_ptr,  # [T] int32, -1: padding
    compressed_ptr,  # [n] int32
    token,  # [TOKENS] int
    end,  # tokens from it on are not wanted
):
    request = tl.load(token_request_ptr + token, mask=token < end, other=-1)
    return tl.load(compressed_ptr + request, mask=request >= 0, other=0) != 0


@triton.jit
def _known_lse(
    lse_ptr,  # [TOKENS] pointers to float32
    wanted,  # [TOKENS] bool
):
    """Some attention kernels give +inf, not -inf, where a query saw nothing."""
    lse = tl.load(lse_ptr, mask=wanted, other=float("-inf"))
    return tl.where(lse == float("inf"), float("-inf"), lse)


# Numbers of tokens and places in shared buffers differ from step to step: one variant for all.
@triton.jit(
    do_not_specialize=["first_token", "num_tokens", "stride_lse_head", "stride_part_lse_head"],
    do_not_specialize_on_alignment=["lse_ptr", "part_lse_ptr", "token_request_ptr"],
)
def merge_partial_kernel(
    out_ptr,  # [T, h, HEAD_DIM] float32, changed
    lse_ptr,  # [h, T] float32, changed
    part_out_ptr,  # [T2, h, HEAD_DIM] model dtype or float32
    part_lse_ptr,  # [h, T2] float32
    token_request_ptr,  # [T] int32
    compressed_ptr,  # [n] int32
    first_token,
    num_tokens,
    stride_out_token,
    stride_out_head,
    stride_lse_head,
    stride_part_out_token,
    stride_part_out_head,
    stride_part_lse_head,
    IS_FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program = (TOKENS tokens of the part, head)."""
    part = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    token = first_token + part
    wanted = _wanted_tokens(token_request_ptr, compressed_ptr, token, first_token + num_tokens)
    if tl.max(wanted.to(tl.int32), 0) == 0:
        return
    element = tl.arange(0, COLUMNS)
    known = (element < HEAD_DIM)[None, :]
    out_row = out_ptr + token.to(tl.int64) * stride_out_token + head * stride_out_head
    part_row = part_out_ptr + part.to(tl.int64) * stride_part_out_token
    part_row += head * stride_part_out_head
    lse_at = lse_ptr + head * stride_lse_head + token
    part_lse = _known_lse(part_lse_ptr + head * stride_part_lse_head + part, wanted)
    # What lies where nothing was seen may be NaN, which a weight of 0 would not silence.
    seen = (wanted & (part_lse != float("-inf")))[:, None]
    out = tl.load(part_row[:, None] + element[None, :], mask=seen & known, other=0.0).to(tl.float32)
    lse = part_lse
    if not IS_FIRST:
        old_lse = tl.load(lse_at, mask=wanted, other=float("-inf"))
        maximum = tl.maximum(old_lse, part_lse)
        base = tl.where(maximum == float("-inf"), 0.0, maximum)
        old_weight, weight = tl.exp(old_lse - base), tl.exp(part_lse - base)
        total = old_weight + weight
        divisor = tl.where(total > 0, total, 1.0)
        lse = tl.where(total > 0, base + tl.log(divisor), float("-inf"))
        old = tl.load(out_row[:, None] + element[None, :], mask=wanted[:, None] & known, other=0.0)
        out = old * (old_weight / divisor)[:, None] + out * (weight / divisor)[:, None]
    tl.store(out_row[:, None] + element[None, :], out, mask=wanted[:, None] & known)
    tl.store(lse_at, lse, mask=wanted)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["token_request_ptr"])
def write_merged_kernel(
    output_ptr,  # [T, HQ, HEAD_DIM] model dtype, written
    out_ptr,  # [T, h, HEAD_DIM] float32
    rows_ptr,  # [h] int32
    token_request_ptr,  # [T] int32
    compressed_ptr,  # [n] int32
    num_tokens,
    stride_output_token,
    stride_output_head,
    stride_out_token,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program = (TOKENS tokens, head)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    wanted = _wanted_tokens(token_request_ptr, compressed_ptr, token, num_tokens)
    if tl.max(wanted.to(tl.int32), 0) == 0:
        return
    element = tl.arange(0, COLUMNS)
    mask = wanted[:, None] & (element < HEAD_DIM)[None, :]
    row = tl.load(rows_ptr + head).to(tl.int64)
    source = out_ptr + token.to(tl.int64) * stride_out_token + head * stride_out_head
    target = output_ptr + token.to(tl.int64) * stride_output_token + row * stride_output_head
    out = tl.load(source[:, None] + element[None, :], mask=mask)
    tl.store(target[:, None] + element[None, :], out.to(output_ptr.dtype.element_ty), mask=mask)


def merge_partial(
    out: torch.Tensor,
    lse: torch.Tensor,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    token_request: torch.Tensor,
    compressed: torch.Tensor,
    *,
    first_token: int = 0,
    is_first: bool = False,
) -> None:
    """Merges attention over one more set of keys into an accumulator; one launch, no sync.

    Args:
        out: [T, h, head_dim] float32, changed in place; last axis contiguous.
        lse: [h, T] float32, natural logarithm, changed in place; last axis contiguous.
        part_out: [T2, h, head_dim] any float dtype, last axis contiguous; row 0 belongs to token
            `first_token`. Never read where `part_lse` is infinite.
        part_lse: [h, T2] float32, last axis contiguous; -inf, or +inf, where nothing was seen.
        token_request: [>= T] int32, request of each token, -1 for padding.
        compressed: [n] int32, 0 for requests to leave alone.
        first_token: token of the part's first row.
        is_first: the accumulator holds nothing yet: overwrite it, whatever it contains.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    num_tokens, num_heads, head_dim = part_out.shape
    if out.shape[1:] != part_out.shape[1:] or lse.shape != (num_heads, out.shape[0]):
        raise ValueError(
            f"a part of shape {tuple(part_out.shape)} cannot be merged into out "
            f"{tuple(out.shape)} with lse {tuple(lse.shape)}; pass [T, h, d] and lse [h, T]"
        )
    if part_lse.shape != (num_heads, num_tokens):
        raise ValueError(
            f"part_lse has shape {tuple(part_lse.shape)}; it must be {(num_heads, num_tokens)}"
        )
    if first_token < 0 or first_token + num_tokens > out.shape[0]:
        raise ValueError(
            f"tokens {first_token} to {first_token + num_tokens} are beyond the accumulator's "
            f"{out.shape[0]}"
        )
    _check_dtypes(out, lse, part_lse)
    if not part_out.numel():
        return
    grid = (triton.cdiv(num_tokens, MERGE.tokens), num_heads)
    merge_partial_kernel[grid](
        out, lse, part_out, part_lse, token_request, compressed, first_token, num_tokens,
        out.stride(0), out.stride(1), lse.stride(0),
        part_out.stride(0), part_out.stride(1), part_lse.stride(0),
        IS_FIRST=is_first, HEAD_DIM=head_dim, COLUMNS=triton.next_power_of_2(head_dim),
        TOKENS=MERGE.tokens, num_warps=MERGE.num_warps,
    )  # fmt: skip


def write_merged(
    output: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    token_request: torch.Tensor,
    compressed: torch.Tensor,
) -> None:
    """Writes an accumulator to its query heads, for compressed requests only; one launch, no sync.

    Args:
        output: [>= T, HQ, head_dim] any float dtype, changed in place; last axis contiguous.
        out: [T, h, head_dim] float32, as `merge_partial` left it.
        rows: [h] int32, query head of each of its heads.
        token_request: [>= T] int32, request of each token, -1 for padding.
        compressed: [n] int32, 0 for requests to leave alone.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    num_tokens, num_heads, head_dim = out.shape
    if output.shape[0] < num_tokens or output.shape[2] != head_dim or len(rows) != num_heads:
        raise ValueError(
            f"out of shape {tuple(out.shape)} does not fit an output of {tuple(output.shape)} at "
            f"{len(rows)} rows; pass one row per head"
        )
    _check_dtypes(out)
    if not out.numel():
        return
    grid = (triton.cdiv(num_tokens, MERGE.tokens), num_heads)
    write_merged_kernel[grid](
        output, out, rows, token_request, compressed, num_tokens,
        output.stride(0), output.stride(1), out.stride(0), out.stride(1),
        HEAD_DIM=head_dim, COLUMNS=triton.next_power_of_2(head_dim),
        TOKENS=MERGE.tokens, num_warps=MERGE.num_warps,
    )  # fmt: skip


def _check_dtypes(*accumulators: torch.Tensor) -> None:
    for tensor in accumulators:
        if tensor.dtype != torch.float32 or tensor.stride(-1) != 1:
            raise ValueError(
                f"an accumulator or lse is {tensor.dtype} with strides {tensor.stride()}; it must "
                "be float32 with a contiguous last axis"
            )
