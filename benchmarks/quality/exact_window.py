"""A quantised cache with an exact window: sinks and recent tokens as the model wrote them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from echokv_vllm.eval.rebuild import KeyValue, LayerHeads, Rebuilder


class ExactWindow:
    """A `Rebuilder` that takes only the tokens outside the window from another one.

    An engine with a quantised cache quantises every token; this is the form in which `method.md`
    §5 was measured.

    Args:
        inner: The quantised cache.
        num_layers: Layers of the model.
        num_kv_heads: KV heads of each.
    """

    def __init__(self, inner: Rebuilder, num_layers: int, num_kv_heads: int) -> None:
        self._inner = inner
        self._num_kv_heads = num_kv_heads
        self.source_layers = frozenset(range(num_layers))

    def rebuilt_heads(self, layer: int) -> Sequence[int]:
        """All heads: what is not rebuilt by maps is quantised."""
        return range(self._num_kv_heads)

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """Exact; only the window and the features are read from here."""
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
        inner = self._inner
        key, value = (inner.cached(part).float() for part in written)
        lost = list(inner.rebuilt_heads(layer))
        if not lost:
            return key, value

        def stored(source: int) -> KeyValue:
            source_key, source_value = heads(source)
            return inner.cached(source_key), inner.cached(source_value)

        key, value = key.clone(), value.clone()
        key[:, lost], value[:, lost] = inner.rebuild(layer, stored, positions, offsets, written)
        return key, value
