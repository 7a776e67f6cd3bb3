"""Low-rank keys and values, in the manner of Palu: a layer caches `z = x A`, `z B` stands in.

Palu factors the projections `W_k` and `W_v`. Weighted by the activations, the best factors of a
rank make `x A B` the projection of `x W` on the leading eigenvectors of the second moment of `x W`
itself, so these are taken. Keys are projected before RoPE. Heads share a projection in groups: all
heads of a layer (the least error), or half of them, Palu's choice for eight heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from moments import Moments

from echokv_vllm.eval.rebuild import KeyValue, LayerHeads

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary

ALLOCATIONS = ("uniform", "energy")


class LowRankCache:
    """A `Rebuilder` that projects all heads outside the window.

    Args:
        moments: Of the model.
        rotary: Its rotary embedding, on its device.
        ratio: Cached numbers over those of the full cache.
        group_heads: Heads that share a projection; divides their number.
        allocation: `uniform`: the same rank for every group of K and V. `energy`: the ranks that
            leave the least sum of relative errors over all layers, K and V.
    """

    def __init__(
        self,
        moments: Moments,
        rotary: Rotary,
        ratio: float,
        group_heads: int,
        allocation: str = "energy",
    ) -> None:
        assert allocation in ALLOCATIONS, f"allocation {allocation} is none of {ALLOCATIONS}"
        self._rotary = rotary
        self._shape = moments.num_kv_heads, moments.head_dim
        self.source_layers = frozenset(range(moments.num_layers))
        width = group_heads * moments.head_dim
        num_groups = moments.num_kv_heads // group_heads
        systems = [
            torch.linalg.eigh(moment[at : at + width, at : at + width])
            for moment in (*moments.key, *moments.value)
            for at in range(0, num_groups * width, width)
        ]
        energies = torch.stack([values.clamp(min=0) / values.sum() for values, _ in systems])
        if allocation == "uniform":
            ranks = [round(ratio * width)] * len(systems)
        else:
            kept = energies.flatten().argsort(descending=True)[: round(ratio * energies.numel())]
            ranks = (kept // width).bincount(minlength=len(systems)).tolist()
        # eigh sorts ascending.
        groups = [
            vectors[:, width - rank :].float()
            for (_, vectors), rank in zip(systems, ranks, strict=True)
        ]
        # [H * d, cached numbers] per layer, K then V
        bases = [
            torch.block_diag(*groups[first : first + num_groups])
            for first in range(0, len(groups), num_groups)
        ]
        self.num_cached = sum(ranks)
        self._keys, self._values = bases[: moments.num_layers], bases[moments.num_layers :]

    def rebuilt_heads(self, layer: int) -> Sequence[int]:
        """All heads: the cache holds none as it is."""
        return range(self._shape[0])

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """Exact; only the window is read from here."""
        return x

    def rebuild(
        self,
        layer: int,
        heads: LayerHeads,
        positions: torch.Tensor,
        offsets: torch.Tensor,
        written: KeyValue,
    ) -> KeyValue:
        """See `Rebuilder`."""
        key, value = written
        cos, sin = self._rotary.cos_sin(positions)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]
        plain = self._project(self._rotary.turn(key.float(), cos, -sin), self._keys[layer])
        return self._rotary.turn(plain, cos, sin), self._project(value, self._values[layer])

    def _project(self, x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        """[batch, H, len, d] through the basis [H * d, rank] and back."""
        rows = x.float().transpose(1, 2).flatten(2)
        return ((rows @ basis) @ basis.T).unflatten(2, self._shape).transpose(1, 2)
