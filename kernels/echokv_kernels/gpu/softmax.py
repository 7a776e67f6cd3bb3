"""Online softmax over tiles of scores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_weights(
    scores,  # [R, T] float32, log2
    maximum,  # [R] float32
    total,  # [R, T] float32
):
    """One online softmax step: weights, the factor of older sums, maximum, total."""
    largest = tl.maximum(maximum, tl.max(scores, 1))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    keep = tl.exp2(maximum - base)
    weights = tl.exp2(scores - base[:, None])
    return weights, keep, largest, total * keep[:, None] + weights


@triton.jit
def chunk_weights(
    scores_ptr,  # [CHUNK, ROW_PAD] float32, log2
    weights_ptr,  # [CHUNK, ROW_PAD], written
    base,  # [ROW_PAD] float32, what to subtract from the scores
    num_tokens,
    ROW_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A chunk's scores to weights, in memory: products take them from there, rounded once.

    Returns their sums, [ROW_PAD] float32.
    """
    row = tl.arange(0, ROW_PAD)
    slot = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, ROW_PAD], tl.float32)
    for first in tl.range(0, num_tokens, BLOCK_T, num_stages=STAGES):
        at = (first + slot)[:, None] * ROW_PAD + row[None, :]
        inside = (first + slot < num_tokens)[:, None]
        scores = tl.load(scores_ptr + at, mask=inside, other=float("-inf"))
        weights = tl.exp2(scores - base[None, :])
        total += weights
        tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=inside)
    return tl.sum(total, 0)
