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
