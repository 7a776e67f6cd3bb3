"""Stamping the pages that one step writes. Reference: `echokv_kernels.store.stamp_owners`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKEN_BLOCK = 256  # tokens per program


@triton.jit(do_not_specialize=["num_tokens"])
def _stamp_kernel(
    owner_ptr,  # [num_blocks] int64
    retained_slots_ptr,  # [T] int64 or int32
    residual_slots_ptr,  # [T] int64 or int32
    num_tokens,
    RETAINED_BLOCK: tl.constexpr,
    RESIDUAL_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    known = token < num_tokens
    retained = tl.load(retained_slots_ptr + token, mask=known, other=-1).to(tl.int64)
    residual = tl.load(residual_slots_ptr + token, mask=known, other=-1).to(tl.int64)
    real = retained >= RETAINED_BLOCK
    # Many tokens share a page; they all write the same number.
    page = tl.where(real, retained // RETAINED_BLOCK, 0)
    tl.store(owner_ptr + page, tl.full([TOKEN_BLOCK], -1, tl.int64), mask=real)
    claims = real & (residual >= RESIDUAL_BLOCK) & (residual % RESIDUAL_BLOCK == 0)
    page = tl.where(claims, residual // RESIDUAL_BLOCK, 0)
    tl.store(owner_ptr + page, retained, mask=claims)


def stamp_owners(
    owner: torch.Tensor,
    retained_slots: torch.Tensor,
    residual_slots: torch.Tensor,
    retained_block_size: int,
    residual_block_size: int,
) -> None:
    """Stamps the pages that one step writes; once per step, before anything reads.

    A page with a retained token becomes -1. A residual page whose first token is written now
    gets that token's retained slot. Null page 0 is never written. One launch, no allocation, no
    synchronisation.

    No page may take both retained and residual tokens in one step: the order of the two stamps
    is open. The scheduler never hands out a page twice in a step.

    Args:
        owner: [num_blocks] int64, contiguous, changed in place.
        retained_slots: [T] int64 or int32, slots of the step's tokens in R pages, padding -1.
        residual_slots: [T] int64 or int32, slots in D pages; padding, and slots of page 0, do
            not count.
        retained_block_size: tokens per R page.
        residual_block_size: tokens per D page.

    Raises:
        ValueError: the slot mappings describe different numbers of tokens, or a tensor's dtype
            or strides do not fit.
    """
    if retained_slots.shape != residual_slots.shape or retained_slots.dim() != 1:
        raise ValueError(
            f"retained and residual slots have shapes {tuple(retained_slots.shape)} and "
            f"{tuple(residual_slots.shape)}; pass one slot of each kind per token"
        )
    for name, slots in (("retained_slots", retained_slots), ("residual_slots", residual_slots)):
        if slots.dtype not in (torch.int64, torch.int32) or not slots.is_contiguous():
            raise ValueError(
                f"{name} has dtype {slots.dtype} and strides {slots.stride()}; pass contiguous "
                "int64 or int32"
            )
    if owner.dtype != torch.int64 or owner.dim() != 1 or not owner.is_contiguous():
        raise ValueError(
            f"owner has dtype {owner.dtype}, shape {tuple(owner.shape)} and strides "
            f"{owner.stride()}; pass contiguous int64, one per block"
        )
    num_tokens = retained_slots.shape[0]
    if num_tokens == 0:
        return
    _stamp_kernel[(triton.cdiv(num_tokens, TOKEN_BLOCK),)](
        owner,
        retained_slots,
        residual_slots,
        num_tokens,
        RETAINED_BLOCK=retained_block_size,
        RESIDUAL_BLOCK=residual_block_size,
        TOKEN_BLOCK=TOKEN_BLOCK,
        num_warps=4,
    )
