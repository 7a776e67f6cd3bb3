"""Compressed attention inside a Hugging Face forward pass.

An attention function of transformers' registry stands in for the model's own. Without an
`AttentionContext` (passed to the forward pass as `echokv_context=`) it is plain SDPA. With an
`EchoContext` the rebuilt heads of a compressed query at position q attend to

    tokens 0 .. sink_tokens - 1               exact
    tokens sink_tokens .. q - recent_tokens   rebuilt
    tokens up to q                            exact

in one softmax. A query's own token is always exact. On a quantised cache, exact means as that cache
returns it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from echokv_vllm.eval.rebuild import KeyValue, Rebuilder

NAME = "echokv_eval"
CONTEXT = "echokv_context"

# Queries whose scores are held at once: the score matrix of a long sequence must not fill memory.
_QUERY_TILE = 256


@dataclass(frozen=True)
class Window:
    """Tokens whose discarded heads stay exact.

    Attributes:
        sink_tokens: First tokens of a sequence.
        recent_tokens: Last tokens before and including the query.
    """

    sink_tokens: int
    recent_tokens: int


PlainAttention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Causal attention of a layer's queries over keys and values [batch, num_kv_heads, context_len,
head_dim]; gives [batch, num_queries, num_heads, head_dim]."""


class AttentionContext(Protocol):
    """What a forward pass may be given as `echokv_context=` to take over its attention."""

    def attention(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        plain: PlainAttention,
    ) -> torch.Tensor:
        """Output of one layer.

        Args:
            layer: Index of the layer.
            query: [batch, num_heads, num_queries, head_dim]; the queries are the last tokens.
            key: [batch, num_kv_heads, context_len, head_dim], after RoPE.
            value: Likewise.
            scaling: Factor of the scores.
            plain: Causal attention of `query`, over `key` and `value` or what stands in for them.

        Returns:
            [batch, num_queries, num_heads, head_dim] of the dtype of `query`.
        """


class EchoContext:
    """Compressed state of one batch of sequences of equal length.

    Serves one forward pass over whole sequences, or a prefill and decode steps with one KV cache.

    Args:
        rebuilder: What the cache makes of the heads.
        window: Tokens that are not rebuilt.
        offsets: [batch] int64, see `Rebuilder.rebuild`.
        first_query: Queries at earlier positions see the exact context.
    """

    def __init__(
        self, rebuilder: Rebuilder, window: Window, offsets: torch.Tensor, first_query: int = 0
    ) -> None:
        self._rebuilder = rebuilder
        self._window = window
        self._offsets = offsets
        self._first_query = first_query
        # layer -> keys and values of the running forward pass, [batch, num_kv_heads, len, head_dim]
        self._heads: dict[int, KeyValue] = {}
        self._rebuilt: dict[int, KeyValue] = {}

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
        written = (key, value)
        key, value = self._rebuilder.cached(key), self._rebuilder.cached(value)
        out = plain(key, value)
        if layer in self._rebuilder.source_layers:
            self._heads[layer] = (key, value)
        if self.num_rebuilt(layer, key.shape[2]):
            echoed, rows = self._attend(layer, query, (key, value), written, scaling)
            out[:, :, rows] = echoed
        return out

    def num_rebuilt(self, layer: int, context_len: int) -> int:
        """Leading tokens among which the last query of `context_len` tokens sees rebuilt ones."""
        if not self._rebuilder.rebuilt_heads(layer) or context_len <= self._first_query:
            return 0
        count = context_len - max(self._window.recent_tokens, 1)
        return count if count > self._window.sink_tokens else 0

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        cached: KeyValue,
        written: KeyValue,
        scaling: float,
    ) -> tuple[torch.Tensor, list[int]]:
        """Attention of the rebuilt heads; call only where `num_rebuilt` is not 0.

        Args:
            layer: Index of the layer.
            query: [batch, num_heads, num_queries, head_dim]; the queries are the last tokens.
            cached: [batch, num_kv_heads, context_len, head_dim], as the cache returns them.
            written: The same as the model computed them.
            scaling: Factor of the scores.

        Returns:
            [batch, num_queries, n, head_dim] of the dtype of `query`, and the n query heads.
        """
        key, value = cached
        context_len, num_queries = key.shape[2], query.shape[2]
        heads = list(self._rebuilder.rebuilt_heads(layer))
        key_hat, value_hat = self._extend(layer, written, self.num_rebuilt(layer, context_len))
        group = query.shape[1] // key.shape[1]
        rows = [head * group + member for head in heads for member in range(group)]
        # [batch, num_discarded, group, num_queries, head_dim]
        grouped = query[:, rows].unflatten(1, (len(heads), group)).float()
        exact = (key[:, heads].float(), value[:, heads].float())
        outputs = []
        for first in range(0, num_queries, _QUERY_TILE):
            tile = grouped[..., first : first + _QUERY_TILE, :]
            at = context_len - num_queries + first
            seen = at + tile.shape[-2]
            hat = min(seen, key_hat.shape[2])
            keys, values = (
                torch.cat((there[:, :, :seen], made[:, :, :hat]), 2)
                for there, made in zip(exact, (key_hat, value_hat), strict=True)
            )
            # The group's queries go side by side: broadcasting would copy the keys for each.
            scores = (tile.flatten(2, 3) @ keys.transpose(2, 3)) * scaling
            scores = scores.unflatten(2, (group, -1))
            scores.masked_fill_(self._hidden(at, seen, hat, query.device), -torch.inf)
            out = scores.softmax(-1).flatten(2, 3) @ values
            outputs.append(out.unflatten(2, (group, -1)))
        whole = torch.cat(outputs, -2).flatten(1, 2).transpose(1, 2)
        return whole.to(query.dtype), rows

    def _extend(self, layer: int, written: KeyValue, num_tokens: int) -> KeyValue:
        """Rebuilt heads of the first tokens; earlier results are kept between decode steps."""
        done = self._rebuilt.get(layer)
        start = 0 if done is None else done[0].shape[2]
        assert start <= num_tokens, f"context shrank from {start} to {num_tokens} tokens"
        if done is None or start < num_tokens:
            positions = torch.arange(start, num_tokens, device=self._offsets.device)
            key, value = self._rebuilder.rebuild(
                layer,
                lambda source: _tokens(self._heads[source], start, num_tokens),
                positions,
                self._offsets,
                _tokens(written, start, num_tokens),
            )
            if done is not None:
                key, value = torch.cat((done[0], key), 2), torch.cat((done[1], value), 2)
            done = self._rebuilt[layer] = (key, value)
        return done

    def _hidden(
        self, first_query: int, context_len: int, num_hat: int, device: Any
    ) -> torch.Tensor:
        """What the queries [first_query, context_len) must not see.

        Returns:
            [num_queries, context_len + num_hat] bool: exact tokens, then the rebuilt first ones.
        """
        query = torch.arange(first_query, context_len, device=device)[:, None]
        token = torch.arange(context_len, device=device)
        rebuilt = (token >= self._window.sink_tokens) & (query >= self._first_query)
        rebuilt = rebuilt & (token <= query - max(self._window.recent_tokens, 1))
        return torch.cat(((token > query) | rebuilt, ~rebuilt[:, :num_hat]), 1)


def _tokens(heads: KeyValue, start: int, stop: int) -> KeyValue:
    return heads[0][:, :, start:stop], heads[1][:, :, start:stop]


ContextMaker = Callable[[Window, torch.Tensor, int], AttentionContext]
"""Makes the context of one batch from the window, the offsets and the first query of interest."""


def make_context(
    cache: Rebuilder | ContextMaker, window: Window, offsets: torch.Tensor, first_query: int = 0
) -> AttentionContext:
    """Context of one batch; arguments as `EchoContext` takes them."""
    if callable(cache):
        return cache(window, offsets, first_query)
    return EchoContext(cache, window, offsets, first_query)


def install(model: Any) -> None:
    """Make `model` use this module's attention function from now on.

    Args:
        model: Causal LM of a supported architecture (`train.capture.check_supported`).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(NAME)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of the registry; same arguments and result as transformers' SDPA."""
    from transformers import AttentionInterface

    context: AttentionContext | None = kwargs.pop(CONTEXT, None)

    def plain(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out, _ = AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
        return out

    if context is None:
        return plain(key, value), None
    assert attention_mask is None, "a context knows no masks"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return context.attention(layer, query, key, value, kwargs["scaling"], plain), None
