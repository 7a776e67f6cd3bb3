"""Keys and values of many sequences of different lengths, and decoding over them.

Rows are padded on the right, so token t of every row lies in slot t:

    row 0   t0 t1 t2 t3 t4 t5  g  g       t: prompt, but for its last token
    row 1   t0 t1 t2 t3  g  g  .  .       g: last prompt token, then the answer
    slot     0  1  2  3  4  5  6  7       .: padding, later written or never read

A causal pass over padded rows needs no mask, because padding comes after every token that is
read, and positions are slots in every row. Decoding masks what lies behind a row's own query.
"""

from __future__ import annotations

import torch

from echokv_vllm.eval.attention import AttentionContext, PlainAttention, Window
from echokv_vllm.eval.rebuild import KeyValue, LayerHeads, Rebuilder

# Tokens whose heads are rebuilt at once when decoding begins.
_REBUILD_TOKENS = 1 << 16


class RaggedCache:
    """Exact keys and values of a batch of rows.

    Args:
        num_layers: Layers of the model.
        shape: Rows, KV heads, slots and head_dim.
        dtype: Of the numbers.
        device: Where they are.

    Attributes:
        layers: Keys (after RoPE) and values of every layer, of the shape given.
    """

    def __init__(
        self,
        num_layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeros and no leftovers: a masked slot has weight 0, which NaN would survive.
        self.layers = [
            (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(num_layers)
        ]


class RaggedPrefill:
    """Attention context of a pass over padded prompts that stores their keys and values.

    Args:
        cache: Where to.
        first_row: Row of the cache that the first row of the pass goes to.
        inner: Takes over the attention itself; None is causal attention.
    """

    def __init__(
        self, cache: RaggedCache, first_row: int = 0, inner: AttentionContext | None = None
    ) -> None:
        self._cache = cache
        self._first_row = first_row
        self._inner = inner

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
        rows = slice(self._first_row, self._first_row + len(key))
        for stored, new in zip(self._cache.layers[layer], (key, value), strict=True):
            stored[rows, :, : new.shape[2]] = new
        if self._inner is not None:
            return self._inner.attention(layer, query, key, value, scaling, plain)
        # Heads are repeated by hand: with grouped heads float32 has no fused kernel on CUDA and
        # would hold a score matrix of every query.
        group = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            is_causal=True,
            scale=scaling,
        )
        return out.transpose(1, 2)


class RaggedDecode:
    """Attention context of decode steps, one new token per row and step.

    Attention reads a view of the exact cache. With a rebuilder the view is a copy as that cache
    returns it, in which the rebuilt heads of all tokens outside the windows are overwritten: those
    of the prompt before the first step, then one token per row and step, as it leaves the window.
    The tokens inside the recent window are rebuilt together, ahead of the steps they leave in:
    many small passes would cost more than all the attention.

    Args:
        cache: Prefilled; slots behind `lengths` are written, others stay as they are.
        lengths: [rows] int64 tokens of each row that are cached, on the device of the cache.
        rebuilder: The compressed cache; None decodes with the full one.
        window: Tokens that are not rebuilt.
        offsets: [rows] int64 on the device of the cache, see `Rebuilder.rebuild`.
    """

    def __init__(
        self,
        cache: RaggedCache,
        lengths: torch.Tensor,
        rebuilder: Rebuilder | None,
        window: Window,
        offsets: torch.Tensor,
    ) -> None:
        self._cache = cache
        self._rebuilder = rebuilder
        self._sink_tokens = window.sink_tokens
        self._recent_tokens = max(window.recent_tokens, 1)
        self._lengths = lengths.clone()
        self._offsets = offsets
        # Row of the cache that each row of the view was copied from.
        self._rows = torch.arange(len(lengths), device=lengths.device)
        self._num_slots = int(lengths.max())
        # layer -> its rebuilt heads, [n] int64 on the device
        self._heads: dict[int, torch.Tensor] = {}
        # layer -> rebuilt keys and values [rows, n, recent_tokens, head_dim] of the tokens at
        # `_ahead_positions` [rows, recent_tokens], one column per step
        self._ahead: dict[int, KeyValue] = {}
        self._ahead_positions = lengths[:, None]
        self._step = 0
        self._view = list(cache.layers)
        if rebuilder is not None:
            self._view = [(key.clone(), value.clone()) for key, value in cache.layers]
            for layer in range(len(self._view)):
                if heads := list(rebuilder.rebuilt_heads(layer)):
                    self._heads[layer] = torch.tensor(heads, device=lengths.device)
            self._compress_context(rebuilder)

    @property
    def positions(self) -> torch.Tensor:
        """[rows, 1] int64 positions of the tokens of the next step."""
        return self._lengths[:, None]

    def advance(self, active: torch.Tensor) -> None:
        """Count the token of the last step as cached in the rows that go on.

        Args:
            active: [rows] bool; the others' next token overwrites their last one.
        """
        self._lengths += active
        self._num_slots += 1  # an upper bound that needs no look at the device
        self._step = (self._step + 1) % self._recent_tokens

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these, [n] int64 indices of the present rows."""
        self._lengths, self._offsets = self._lengths[rows], self._offsets[rows]
        self._rows = self._rows[rows]
        self._num_slots = int(self._lengths.max())
        for layer, (key, value) in enumerate(self._view):
            self._view[layer] = (key[rows], value[rows])
        self._ahead_positions = self._ahead_positions[rows]
        for layer, (key, value) in self._ahead.items():
            self._ahead[layer] = (key[rows], value[rows])

    def attention(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        plain: PlainAttention,
    ) -> torch.Tensor:
        """See `AttentionContext`; `key` and `value` hold the new token alone."""
        here = torch.arange(len(query), device=query.device)
        if self._rebuilder is not None:
            for stored, new in zip(self._cache.layers[layer], (key, value), strict=True):
                stored[self._rows, :, self._lengths] = new[:, :, 0]
            key, value = self._rebuilder.cached(key), self._rebuilder.cached(value)
        for stored, new in zip(self._view[layer], (key, value), strict=True):
            stored[here, :, self._lengths] = new[:, :, 0].to(stored.dtype)
        if self._rebuilder is not None and layer in self._heads:
            self._rebuild_leaving(self._rebuilder, layer, here)
        keys, values = (part[:, :, : self._num_slots + 1] for part in self._view[layer])
        num_rows, num_kv_heads, num_slots, head_dim = keys.shape
        grouped = (query * scaling).reshape(num_rows * num_kv_heads, -1, head_dim)
        scores = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).float()
        hidden = self._hidden(layer, num_slots)[:, :, None]
        scores.view(num_rows, num_kv_heads, -1, num_slots).masked_fill_(hidden, -torch.inf)
        out = torch.bmm(scores.softmax(-1).to(values.dtype), values.flatten(0, 1))
        return out.view(num_rows, 1, -1, head_dim)

    def _hidden(self, layer: int, num_slots: int) -> torch.Tensor:
        """[rows, 1 or num_kv_heads, num_slots] bool, slots that the new tokens do not see."""
        slots = torch.arange(num_slots, device=self._lengths.device)
        return (slots > self._lengths[:, None])[:, None]

    def _compress_context(self, rebuilder: Rebuilder) -> None:
        """Fill the view as the first step's queries see it, but for one token.

        The last token outside a row's window is rebuilt with the first step.
        """
        longest = self._num_slots
        num_rows = max(1, _REBUILD_TOKENS // max(longest, 1))
        for layer, (key, value) in enumerate(self._view):
            for first in range(0, len(self._lengths), num_rows):
                rows = slice(first, first + num_rows)
                for part in (key[rows, :, :longest], value[rows, :, :longest]):
                    part.copy_(rebuilder.cached(part))
                if layer in self._heads:
                    self._rebuild_rows(rebuilder, layer, rows)

    def _rebuild_rows(self, rebuilder: Rebuilder, layer: int, rows: slice) -> None:
        ends = (self._lengths[rows] - self._recent_tokens)[:, None]
        tokens = slice(self._sink_tokens, self._num_slots - self._recent_tokens)
        if tokens.start >= tokens.stop:
            return
        positions = torch.arange(tokens.start, tokens.stop, device=ends.device)

        def written(source: int) -> KeyValue:
            key, value = self._cache.layers[source]
            return key[rows, :, tokens], value[rows, :, tokens]

        made = rebuilder.rebuild(
            layer, _as_cached(rebuilder, written), positions, self._offsets[rows], written(layer)
        )
        outside = (positions < ends)[:, None, :, None]
        heads = self._heads[layer]
        for stored, new in zip(self._view[layer], made, strict=True):
            part = stored[rows, :, tokens]
            part[:, heads] = torch.where(outside, new.to(part.dtype), part[:, heads])

    def _rebuild_leaving(self, rebuilder: Rebuilder, layer: int, here: torch.Tensor) -> None:
        """Overwrite the token of each row that leaves its window with this step, if any."""
        if self._step == 0:
            self._rebuild_ahead(rebuilder, layer)
        token = self._ahead_positions[:, self._step]
        is_outside = (token >= self._sink_tokens)[:, None, None]
        at = (here[:, None], self._heads[layer], token.clamp(min=0)[:, None])
        for stored, new in zip(self._view[layer], self._ahead[layer], strict=True):
            leaving = new[:, :, self._step].to(stored.dtype)
            stored[at] = torch.where(is_outside, leaving, stored[at])

    def _rebuild_ahead(self, rebuilder: Rebuilder, layer: int) -> None:
        """Rebuild the tokens inside the windows, which leave one by one from this step on."""
        first = self._lengths - self._recent_tokens
        self._ahead_positions = first[:, None] + torch.arange(
            self._recent_tokens, device=first.device
        )
        positions = self._ahead_positions.clamp(min=0)
        num_rows = max(1, _REBUILD_TOKENS // self._recent_tokens)
        parts = []
        for start in range(0, len(positions), num_rows):
            part = slice(start, start + num_rows)
            written = self._written(self._rows[part, None], positions[part])
            parts.append(
                rebuilder.rebuild(
                    layer, _as_cached(rebuilder, written), positions[part], self._offsets[part],
                    written(layer),
                )
            )  # fmt: skip
        keys, values = zip(*parts, strict=True)
        self._ahead[layer] = (torch.cat(keys), torch.cat(values))

    def _written(self, rows: torch.Tensor, tokens: torch.Tensor) -> LayerHeads:
        """Exact heads of the tokens [rows, len] of the cache's `rows` [rows, 1]."""

        def heads(layer: int) -> KeyValue:
            key, value = self._cache.layers[layer]
            # Indexing puts rows and tokens in front of the heads.
            return key[rows, :, tokens].transpose(1, 2), value[rows, :, tokens].transpose(1, 2)

        return heads


def _as_cached(rebuilder: Rebuilder, written: LayerHeads) -> LayerHeads:
    def heads(layer: int) -> KeyValue:
        key, value = written(layer)
        return rebuilder.cached(key), rebuilder.cached(value)

    return heads
