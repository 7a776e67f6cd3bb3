"""Softmax over keys that come in pieces.

    one piece after the other   OnlineSoftmax: running maximum m, sum s = sum exp(x - m) and
                                accumulator a = sum exp(x - m) v
    pieces done on their own    merge_attention: each gives out = a / s and lse = m + log s

A query that sees no key has out = 0 and lse = -inf, never NaN, and vanishes when merged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_NOTHING = float("-inf")


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """The maximum to subtract: 0 where nothing was seen, because -inf - -inf is NaN."""
    return torch.where(maximum == _NOTHING, 0.0, maximum)


class OnlineSoftmax:
    """Softmax-weighted sum of values, one tile of keys after another.

    Args:
        shape: shape of the queries, [rows, ...].
        value_size: elements of one value.
        device: where to keep the state.
    """

    def __init__(
        self, shape: Sequence[int], value_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self._maximum = torch.full(tuple(shape), _NOTHING, dtype=torch.float32, device=device)
        self._sum = torch.zeros_like(self._maximum)
        self._accumulator = self._sum.new_zeros((*shape, value_size))

    def update(
        self, scores: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | None = None
    ) -> None:
        """Adds one tile of keys.

        Args:
            scores: [..., C] float32, -inf where masked, never NaN. Overwritten.
            values: [..., C, value_size] float32, finite even where masked; its leading axes are
                those of `scores` without the last two.
            rows: int64 indices of the rows (first axis) the tile is for; None means all.
        """
        at = slice(None) if rows is None else rows
        old = self._maximum[at]
        new = torch.maximum(old, scores.amax(-1))
        base = _finite(new)
        weights = scores.sub_(base[..., None]).exp_()
        shrink = torch.exp(old - base)
        added = weights @ values
        if rows is None:
            self._sum.mul_(shrink).add_(weights.sum(-1))
            self._accumulator.mul_(shrink[..., None]).add_(added)
        else:
            self._sum[rows] = self._sum[rows] * shrink + weights.sum(-1)
            self._accumulator[rows] = self._accumulator[rows] * shrink[..., None] + added
        self._maximum[at] = new

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out [..., value_size] and lse [...], both float32."""
        seen = self._sum > 0
        total = torch.where(seen, self._sum, 1.0)
        lse = torch.where(seen, self._maximum + total.log(), _NOTHING)
        return self._accumulator / total[..., None], lse


def merge_attention(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint sets of keys, from the attention over each.

    Args:
        parts: (out [..., d], lse [...]) of each set; lse is -inf where a query saw no key of it.

    Returns:
        out, lse: float32; out = 0 and lse = -inf where a query saw no key at all.
    """
    lses = torch.stack([lse.to(torch.float32) for _, lse in parts])
    base = _finite(lses.amax(0))
    weights = torch.exp(lses - base)
    total = weights.sum(0)
    lse = base + total.log()
    weights = weights / torch.where(total > 0, total, 1.0)
    out = sum(
        (
            weight[..., None] * part.to(torch.float32)
            for weight, (part, _) in zip(weights[1:], parts[1:], strict=True)
        ),
        start=weights[0][..., None] * parts[0][0].to(torch.float32),
    )
    return out, lse
