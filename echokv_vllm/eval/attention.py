"""Compressed attention inside a Hugging Face forward pass.

An attention function of transformers' registry stands in for the model's own. Without an
`EchoContext` it is plain SDPA; with one (passed to the forward pass as `echokv_context=`), the
discarded heads of a compressed query attend to

    tokens 0 .. sink_tokens - 1               exact      (t: position of a token,
    tokens sink_tokens .. q - recent_tokens   rebuilt     q: position of the query)
    tokens up to q                            exact

in one softmax. A query's own token is always exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from echokv_vllm.eval.rebuild import HeadRebuilder

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


class EchoContext:
    """Compressed state of one batch of sequences of equal length.

    Serves one forward pass over whole sequences, or a prefill and decode steps with one KV cache.

    Args:
        rebuilder: The maps.
        window: Tokens that stay exact.
        offsets: [batch] int64, see `HeadRebuilder.rebuild`.
        first_query: Queries at earlier positions see the exact context.
    """

    def __init__(
        self, rebuilder: HeadRebuilder, window: Window, offsets: torch.Tensor, first_query: int = 0
    ) -> None:
        self._rebuilder = rebuilder
        self._window = window
        self._offsets = offsets
        self._first_query = first_query
        # layer -> keys and values of the running forward pass, [batch, num_kv_heads, len, head_dim]
        self._heads: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rebuilt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sources = {
            source.layer for layer in rebuilder.plan.layers for source in layer.sources
        }

    def see(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take note of a layer's cached heads, `[batch, num_kv_heads, len, head_dim]`."""
        if layer in self._sources:
            self._heads[layer] = (key, value)

    def num_rebuilt(self, layer: int, context_len: int) -> int:
        """Leading tokens among which the last query of `context_len` tokens sees rebuilt ones."""
        if not self._rebuilder.plan.discarded(layer) or context_len <= self._first_query:
            return 0
        count = context_len - max(self._window.recent_tokens, 1)
        return count if count > self._window.sink_tokens else 0

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> tuple[torch.Tensor, list[int]]:
        """Attention of the discarded heads; call only where `num_rebuilt` is not 0.

        Args:
            layer: Index of the layer.
            query: [batch, num_heads, num_queries, head_dim]; the queries are the last tokens.
            key: [batch, num_kv_heads, context_len, head_dim], after RoPE.
            value: Likewise.
            scaling: Factor of the scores.

        Returns:
            [batch, num_queries, n, head_dim] of the dtype of `query`, and the n query heads.
        """
        context_len, num_queries = key.shape[2], query.shape[2]
        heads = list(self._rebuilder.plan.discarded(layer))
        key_hat, value_hat = self._extend(layer, self.num_rebuilt(layer, context_len))
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

    def _extend(self, layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rebuilt heads of the first tokens; earlier results are kept between decode steps."""
        done = self._rebuilt.get(layer)
        start = 0 if done is None else done[0].shape[2]
        assert start <= num_tokens, f"context shrank from {start} to {num_tokens} tokens"
        if done is None or start < num_tokens:
            key, value = self._rebuilder.rebuild(
                layer, self._heads.__getitem__, start, num_tokens, self._offsets
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

    context: EchoContext | None = kwargs.pop(CONTEXT, None)
    out, _ = AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
    if context is None:
        return out, None
    assert attention_mask is None, "padded or packed batches cannot be compressed"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    context.see(layer, key, value)
    if context.num_rebuilt(layer, key.shape[2]):
        echoed, rows = context.attend(layer, query, key, value, kwargs["scaling"])
        out[:, :, rows] = echoed
    return out, None
