"""ThinK's channel pruning of keys, and the EchoKV paper's Hybrid: pruned keys, echoed values.

ThinK scores channel `i` of a head by the norm of its part of the scores, `|q_i| |k_i|`, after RoPE,
and keeps the best channels of every head. It reads the queries of a prompt's last 32 tokens
(`PromptPrunedKeys`); `PrunedKeys` chooses once for all, on calibration text. Values stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from moments import Moments

from echokv_vllm.eval.attention import AttentionContext, EchoContext, PlainAttention, Window
from echokv_vllm.eval.rebuild import HeadRebuilder, KeyValue, LayerHeads

_OBSERVED_QUERIES = 32


class PrunedKeys:
    """A `Rebuilder` whose keys outside the window lack channels.

    Args:
        num_layers: Layers of the model.
        num_kv_heads: KV heads of each.
        masks: Layer to [batch or 1, H, d] bool, True for a kept channel; may be filled later.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, masks: dict[int, torch.Tensor]) -> None:
        self.source_layers = frozenset(range(num_layers))
        self._num_kv_heads = num_kv_heads
        self.masks = masks

    @classmethod
    def calibrated(cls, moments: Moments, num_channels: int) -> PrunedKeys:
        """The best channels on calibration text."""
        masks = {}
        for layer in range(moments.num_layers):
            score = moments.query_square[layer] * moments.key_square[layer]
            masks[layer] = _best(score[None], num_channels)
        return cls(moments.num_layers, moments.num_kv_heads, masks)

    def rebuilt_heads(self, layer: int) -> Sequence[int]:
        """All heads."""
        return range(self._num_kv_heads)

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
        return key.float() * self.masks[layer][:, :, None], value.float()


class HybridCache(PrunedKeys):
    """Pruned keys of all heads; values of the discarded heads as a checkpoint rebuilds them.

    Args:
        keys: The pruned keys.
        values: The maps, of which those of values are used.
    """

    def __init__(self, keys: PrunedKeys, values: HeadRebuilder) -> None:
        super().__init__(len(keys.source_layers), keys._num_kv_heads, keys.masks)
        self._echo = values

    def rebuild(
        self,
        layer: int,
        heads: LayerHeads,
        positions: torch.Tensor,
        offsets: torch.Tensor,
        written: KeyValue,
    ) -> KeyValue:
        """See `Rebuilder`."""
        key, value = super().rebuild(layer, heads, positions, offsets, written)
        lost = list(self._echo.rebuilt_heads(layer))
        if lost:
            value = value.clone()
            value[:, lost] = self._echo.rebuild(layer, heads, positions, offsets, written)[1]
        return key, value


class PromptPrunedKeys:
    """Makes contexts whose channels are chosen for every sequence, as ThinK does for a prompt.

    Args:
        num_layers: Layers of the model.
        num_kv_heads: KV heads of each.
        num_channels: Channels kept of every head.
        prompt_len: Tokens that are taken for the prompt; the queries of its last 32 choose.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, num_channels: int, prompt_len: int
    ) -> None:
        self._shape = num_layers, num_kv_heads
        self._num_channels = num_channels
        self._prompt_len = prompt_len

    def __call__(self, window: Window, offsets: torch.Tensor, first_query: int) -> AttentionContext:
        """See `ContextMaker`."""
        return _Chooser(self, window, offsets, first_query)

    def choose(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """[batch, H, d] bool from all queries and keys of a sequence after RoPE."""
        observed = slice(max(0, self._prompt_len - _OBSERVED_QUERIES), self._prompt_len)
        squares = query[:, :, observed].float().square().sum(2)
        squares = squares.unflatten(1, (key.shape[1], -1)).sum(2)
        score = squares * key[:, :, : self._prompt_len].float().square().sum(2)
        return _best(score, self._num_channels)


class _Chooser:
    def __init__(
        self, maker: PromptPrunedKeys, window: Window, offsets: torch.Tensor, first_query: int
    ) -> None:
        self._maker = maker
        self._keys = PrunedKeys(*maker._shape, {})
        self._inner = EchoContext(self._keys, window, offsets, first_query)

    def attention(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        plain: PlainAttention,
    ) -> torch.Tensor:
        """See `AttentionContext`; of one pass over whole sequences."""
        assert query.shape[2] == key.shape[2], "whole sequences only"
        self._keys.masks[layer] = self._maker.choose(query, key)
        return self._inner.attention(layer, query, key, value, scaling, plain)


def _best(score: torch.Tensor, num_channels: int) -> torch.Tensor:
    """[batch, H, d] scores -> bool, True for the best channels of every head."""
    kept = score.topk(num_channels, -1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, kept, True)
