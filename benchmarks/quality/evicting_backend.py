"""Answers after eviction: SnapKV as it is meant, decided once at the end of an exact prefill.

Tokens that leave the window while the answer is written stay, as SnapKV keeps them: a small gift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from eviction import OBSERVED_QUERIES, EvictingCache, attention_weights, smoothed

from echokv_vllm.eval import offline
from echokv_vllm.eval.attention import CONTEXT, PlainAttention, Window
from echokv_vllm.eval.ragged import RaggedCache, RaggedDecode, RaggedPrefill

# Prompt tokens, padding included, of one forward pass.
_PREFILL_TOKENS = 1 << 15


class EvictingBackend(offline.OfflineBackend):
    """`OfflineBackend` whose compressed modes forget tokens; prefill is exact.

    Args:
        model: As there.
        tokenizer: As there.
        caches: The caches by mode name.
        window: Tokens that are not forgotten.
        options: As there.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        caches: Mapping[str, EvictingCache],
        window: Window,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, {}, window, **options)
        assert not self._every_query, "eviction is decided at the end of an exact prefill"
        self._caches = caches
        self._rebuilders.update({mode: None for mode in caches})

    def _answer(self, chunk: Any, modes: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        num_layers, num_kv_heads, head_dim = self._cache_shape()
        device, dtype = self._model.device, self._model.dtype
        shape = (len(chunk.ids), num_kv_heads, chunk.capacity, head_dim)
        cache = RaggedCache(num_layers, shape, dtype, device)
        votes = [torch.zeros(shape[:3], device=device) for _ in range(num_layers)]
        lengths = torch.tensor([len(ids) - 1 for ids in chunk.ids], device=device)
        self._prefill_and_vote(chunk, cache, lengths, votes)
        for mode in modes:
            if mode == offline.FULL:
                steps = RaggedDecode(cache, lengths, None, self._window, chunk.offsets)
            else:
                evicting = self._caches[mode]
                steps = _EvictedDecode(cache, lengths, evicting, votes, self._window, chunk.offsets)
            yield mode, self._decode(chunk, steps)

    def _prefill_and_vote(
        self, chunk: Any, cache: RaggedCache, lengths: torch.Tensor, votes: list[torch.Tensor]
    ) -> None:
        num_rows = max(1, _PREFILL_TOKENS // int(lengths.max()))
        for first in range(0, len(chunk.ids), num_rows):
            rows = [ids[:-1] for ids in chunk.ids[first : first + num_rows]]
            width = max(map(len, rows))
            padded = [ids + [0] * (width - len(ids)) for ids in rows]
            ends = lengths[first : first + num_rows]
            parts = [layer[first : first + num_rows, :, :width] for layer in votes]
            self._model.get_decoder()(
                input_ids=torch.tensor(padded, device=self._model.device),
                use_cache=False,
                **{CONTEXT: _VotingPrefill(cache, first, ends, parts)},
            )


class _VotingPrefill(RaggedPrefill):
    """Takes note of the votes of each row's last queries.

    Args:
        cache: See `RaggedPrefill`.
        first_row: Likewise.
        lengths: [rows] int64 tokens of the rows.
        votes: Per layer [rows, H, len], to be filled.
    """

    def __init__(
        self,
        cache: RaggedCache,
        first_row: int,
        lengths: torch.Tensor,
        votes: list[torch.Tensor],
    ) -> None:
        super().__init__(cache, first_row)
        self._lengths = lengths
        self._votes = votes

    def attention(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        plain: PlainAttention,
    ) -> torch.Tensor:
        """See `AttentionContext`."""
        back = torch.arange(OBSERVED_QUERIES, 0, -1, device=query.device)
        observed = (self._lengths[:, None] - back).clamp(min=0)  # [rows, n]
        index = observed[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        token = torch.arange(key.shape[2], device=key.device)
        hidden = (token > observed[:, :, None])[:, None]
        self._votes[layer].copy_(attention_weights(query.gather(2, index), key, hidden, scaling))
        return super().attention(layer, query, key, value, scaling, plain)


class _EvictedDecode(RaggedDecode):
    """Decode steps that do not see what was forgotten when they began."""

    def __init__(
        self,
        cache: RaggedCache,
        lengths: torch.Tensor,
        evicting: EvictingCache,
        votes: list[torch.Tensor],
        window: Window,
        offsets: torch.Tensor,
    ) -> None:
        super().__init__(cache, lengths, None, window, offsets)
        # The first query stands at `lengths`; see `attention.EchoContext` for the window.
        ends = (lengths + 1 - max(window.recent_tokens, 1)).clamp(min=window.sink_tokens)
        token = torch.arange(votes[0].shape[2], device=lengths.device)
        outside = (token >= window.sink_tokens) & (token < ends[:, None])
        budget = evicting.budget(ends - window.sink_tokens)
        # layer -> [rows, H, slots] bool
        self._forgotten = []
        for layer_votes in votes:
            candidates = outside[:, None].expand_as(layer_votes)
            kept = evicting.keep(smoothed(layer_votes), candidates, budget)
            self._forgotten.append(candidates & ~kept)

    def keep(self, rows: torch.Tensor) -> None:
        """See `RaggedDecode`."""
        super().keep(rows)
        self._forgotten = [forgotten[rows] for forgotten in self._forgotten]

    def _hidden(self, layer: int, num_slots: int) -> torch.Tensor:
        return super()._hidden(layer, num_slots) | self._forgotten[layer][:, :, :num_slots]
