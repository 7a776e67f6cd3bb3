"""Token eviction in the manner of SnapKV: heads forget what recent queries did not look at.

Votes for a token are the attention weights that the last 32 queries give it in a head, smoothed
over five neighbouring tokens; the query heads of a KV head vote together. Outside the window a head
keeps the best share of the tokens; what it has forgotten does not come back.

SnapKV decides once, at the end of a prompt. A text that is scored token by token has no such end,
so `EvictingCache` decides again every 64 tokens, always before the queries that feel it.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from echokv_vllm.eval.attention import AttentionContext, PlainAttention, Window

_CHUNK = 64
OBSERVED_QUERIES = 32
_POOL = 5
# Share of its even budget that each head keeps when the heads of a layer share one.
_FLOOR = 0.2


class EvictingCache:
    """Makes contexts of passes over whole sequences.

    Args:
        ratio: Share of the tokens outside the window that a head keeps.
        shared_budget: The heads of a layer share their budgets by their votes, as in Ada-KV.
    """

    def __init__(self, ratio: float, shared_budget: bool = False) -> None:
        self.ratio = ratio
        self.shared_budget = shared_budget

    def __call__(self, window: Window, offsets: torch.Tensor, first_query: int) -> AttentionContext:
        """See `ContextMaker`."""
        return _EvictingContext(self, window, first_query)

    def keep(
        self, votes: torch.Tensor, candidates: torch.Tensor, budget: torch.Tensor
    ) -> torch.Tensor:
        """Tokens that stay.

        Args:
            votes: [batch, H, len], at least 0.
            candidates: [batch, H, len] bool; the others do not stay.
            budget: [batch] or [1] int64 tokens per head, on average.

        Returns:
            [batch, H, len] bool.
        """
        votes = votes.masked_fill(~candidates, -1.0)
        if self.shared_budget:
            floor = (_FLOOR * budget).long()
            # No vote is larger: a query gives a token at most 1.
            votes = votes + 1e6 * (_ranks(votes) < floor[:, None, None])
            places = _ranks(votes.flatten(1)).view_as(votes)
            budget = votes.shape[1] * budget
        else:
            places = _ranks(votes)
        return (places < budget[:, None, None]) & candidates

    def budget(self, num_tokens: torch.Tensor) -> torch.Tensor:
        """Tokens per head that stay of so many outside the window."""
        return (self.ratio * num_tokens).round().long()


def _ranks(votes: torch.Tensor) -> torch.Tensor:
    """0 for the largest of the last axis, 1 for the next; of equal ones the first comes first."""
    return votes.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, scaling: float
) -> torch.Tensor:
    """[batch, H, len] sums, over queries and the query heads of a KV head, of attention weights.

    Args:
        query: [batch, num_heads, n, d].
        key: [batch, H, len, d].
        hidden: Broadcastable to [batch, H, n, len] bool: what a query does not see.
        scaling: Factor of the scores.
    """
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = grouped @ key.float().transpose(2, 3)[:, :, None] * scaling
    return scores.masked_fill(hidden.unsqueeze(-3), -torch.inf).softmax(-1).sum((2, 3))


def smoothed(votes: torch.Tensor) -> torch.Tensor:
    """[batch, H, len] means over neighbouring tokens."""
    return functional.avg_pool1d(votes, _POOL, 1, _POOL // 2)


class _EvictingContext:
    def __init__(self, cache: EvictingCache, window: Window, first_query: int) -> None:
        self._cache = cache
        self._sink = window.sink_tokens
        self._recent = max(window.recent_tokens, 1)
        self._first_query = first_query

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
        length = key.shape[2]
        assert query.shape[2] == length, "whole sequences only"
        out = plain(key, value)
        kept = torch.zeros(key.shape[:3], dtype=torch.bool, device=key.device)
        decided = self._sink
        for start in range(0, length, _CHUNK):
            stop = min(start + _CHUNK, length)
            outside = stop - self._recent
            if outside <= self._sink:
                continue
            observed = slice(max(0, start - OBSERVED_QUERIES), max(start, 1))
            votes = attention_weights(
                query[:, :, observed], key, self._hidden(observed, kept), scaling
            )
            candidates = kept.clone()
            candidates[:, :, decided:outside] = True
            budget = self._cache.budget(torch.tensor([outside - self._sink], device=key.device))
            kept = self._cache.keep(smoothed(votes), candidates, budget)
            decided = outside
            first = max(start, self._first_query)
            if first < stop:
                queries = slice(first, stop)
                out[:, queries] = self._attend(query, key, value, queries, kept, scaling)
        return out

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        queries: slice,
        kept: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        group = query.shape[1] // key.shape[1]
        tokens = slice(queries.stop)
        hidden = self._hidden(queries, kept)[..., tokens]
        out = functional.scaled_dot_product_attention(
            query[:, :, queries],
            key[:, :, tokens].repeat_interleave(group, 1),
            value[:, :, tokens].repeat_interleave(group, 1),
            attn_mask=~hidden.repeat_interleave(group, 1),
            scale=scaling,
        )
        return out.transpose(1, 2)

    def _hidden(self, queries: slice, kept: torch.Tensor) -> torch.Tensor:
        """[batch, H, num_queries, len] bool: later tokens, forgotten ones outside the window."""
        token = torch.arange(kept.shape[2], device=kept.device)
        query = torch.arange(queries.start, queries.stop, device=kept.device)[:, None]
        windowed = (token < self._sink) | (token > query - self._recent)
        return ~(windowed | kept[:, :, None]) | (token > query)
