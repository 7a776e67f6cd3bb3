"""Keys or values alone echoed, the others exact: which of the two is harder to rebuild?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from echokv_vllm.eval.rebuild import KeyValue, LayerHeads, Rebuilder

KEYS, VALUES = "keys", "values"


class OneSided:
    """A `Rebuilder` that takes one part from a checkpoint's maps and the other from the model.

    Args:
        rebuilder: Rebuilds both.
        part: `keys` or `values`: what is echoed.
    """

    def __init__(self, rebuilder: Rebuilder, part: str) -> None:
        assert part in (KEYS, VALUES), part
        self._rebuilder = rebuilder
        self._part = part

    @property
    def source_layers(self) -> frozenset[int]:
        """See `Rebuilder`."""
        return self._rebuilder.source_layers

    def rebuilt_heads(self, layer: int) -> Sequence[int]:
        """See `Rebuilder`."""
        return self._rebuilder.rebuilt_heads(layer)

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """See `Rebuilder`."""
        return self._rebuilder.cached(x)

    def rebuild(
        self,
        layer: int,
        heads: LayerHeads,
        positions: torch.Tensor,
        offsets: torch.Tensor,
        written: KeyValue,
    ) -> KeyValue:
        """See `Rebuilder`."""
        key, value = self._rebuilder.rebuild(layer, heads, positions, offsets, written)
        lost = list(self.rebuilt_heads(layer))
        if self._part == KEYS:
            return key, self.cached(written[1][:, lost]).float()
        return self.cached(written[0][:, lost]).float(), value
