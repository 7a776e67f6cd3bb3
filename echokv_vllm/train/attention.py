"""Attention over a partly rebuilt context, differentiable in the rebuilt heads.

For a query at position `q`, the tokens `sink_tokens <= t <= q - recent_tokens` are rebuilt and all
others exact, in one softmax; this is what a server computes and what `echokv eval` measures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from echokv_vllm.checkpoint import LayerMaps
from echokv_vllm.eval.attention import Window
from echokv_vllm.plan import EchoPlan
from echokv_vllm.quantization import as_cached, int_per_token_head
from echokv_vllm.train.parameters import MapParameters, shard_rows
from echokv_vllm.train.stage1 import block_shift

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys (after RoPE) and values, [batch, heads, len, head_dim]."""


@dataclass(frozen=True)
class CacheSetup:
    """How a compressed cache treats the heads of a model.

    Attributes:
        plan: The echo plan.
        rotary: Rotary embedding of the model, on its device.
        rotation_block: B of the key space.
        window: Tokens that stay exact.
        format: Cache format (see `echokv_vllm.quantization`).
        residual_bits: Bits of the coded residual of rebuilt heads, 0 = none.
    """

    plan: EchoPlan
    rotary: Rotary
    rotation_block: int
    window: Window
    format: str = "auto"
    residual_bits: int = 0

    def cached(self, heads: torch.Tensor) -> torch.Tensor:
        """What the cache returns for heads `[..., head_dim]`; the gradient passes unchanged."""
        if self.format == "auto":
            return heads
        with torch.no_grad():
            change = as_cached(heads, self.format) - heads
        return heads + change

    def first_query(self) -> int:
        """First position that sees a rebuilt token."""
        return self.window.sink_tokens + max(self.window.recent_tokens, 1)

    def query_rows(self, layer: int, group_size: int) -> tuple[int, ...]:
        """Query heads of the layer's discarded KV heads."""
        return tuple(
            head * group_size + member
            for head in self.plan.discarded(layer)
            for member in range(group_size)
        )


class Rebuilder:
    """Rebuilds the discarded heads of one batch with maps under training.

    Args:
        setup: The cache.
        parameters: The maps.
        offsets: [batch] int64 position offsets (see `block_shift`).
        sequence_len: Tokens per sequence.
    """

    def __init__(
        self,
        setup: CacheSetup,
        parameters: MapParameters,
        offsets: torch.Tensor,
        sequence_len: int,
    ) -> None:
        self._setup = setup
        self._parameters = parameters
        positions = torch.arange(sequence_len, device=offsets.device)
        shift = block_shift(positions, offsets, setup.rotation_block)
        cos, sin = setup.rotary.cos_sin(shift)
        self._cos, self._sin = cos[:, None], sin[:, None]

    def rebuild(self, layer: int, cached: Callable[[int], KeyValue], written: KeyValue) -> KeyValue:
        """Discarded heads, ascending, in the rotation of the cache.

        Args:
            layer: A layer that discards heads.
            cached: Heads of a source layer as the cache returns them.
            written: The layer's heads as the model computed them, for the residual.

        Returns:
            Two tensors [batch, num_discarded, len, head_dim].
        """
        plan, rotary = self._setup.plan, self._setup.rotary
        maps = self._parameters.layer(layer)
        keys, values = [], []
        for shard, rows in enumerate(shard_rows(plan, layer)):
            features: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
            for source in plan.layers[layer].sources:
                heads = tuple(head for head in source.heads if plan.shard_of(head) == shard)
                if not heads:
                    continue
                key, value = cached(source.layer)
                features[0].append(rotary.turn(pick(key, heads), self._cos, self._sin))
                features[1].append(pick(value, heads))
            keys.append(_apply(features[0], maps, "key", rows))
            values.append(_apply(features[1], maps, "value", rows))
        key_hat = rotary.turn(torch.cat(keys, 1), self._cos, -self._sin)
        value_hat = torch.cat(values, 1)
        if self._setup.residual_bits:
            heads = plan.discarded(layer)
            key_hat = self._with_residual(key_hat, pick(written[0], heads))
            value_hat = self._with_residual(value_hat, pick(written[1], heads))
        return key_hat, value_hat

    def _with_residual(self, rebuilt: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        rebuilt = rebuilt.to(true.dtype)
        return rebuilt + int_per_token_head(true - rebuilt, self._setup.residual_bits)


@dataclass(frozen=True)
class Visibility:
    """What queries at some positions see of each token.

    Attributes:
        rebuilt: [num_queries, len] bool, tokens that are rebuilt for the query.
        future: Likewise, tokens that come after the query.
    """

    rebuilt: torch.Tensor
    future: torch.Tensor

    @classmethod
    def of(cls, positions: torch.Tensor, length: int, window: Window) -> Visibility:
        """For queries at `positions` [num_queries] among `length` tokens."""
        token = torch.arange(length, device=positions.device)
        at = positions[:, None]
        old = token <= at - max(window.recent_tokens, 1)
        return cls((token >= window.sink_tokens) & old, token > at)


def echo_scores(
    query: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    key_hat: torch.Tensor,
    visibility: Visibility,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of some queries of the discarded heads, before the softmax.

    Args:
        query: [batch, num_discarded, group_size, num_queries, head_dim].
        keys: True keys and keys as cached, [batch, num_discarded, len, head_dim]; the same tensor
            where the cache is exact.
        key_hat: Rebuilt keys, same shape.
        visibility: Of these queries and tokens.
        scaling: Factor of the scores.

    Returns:
        Scores of the true keys, the future included, and of what the compressed cache holds for
        every token, the future at -inf; [batch, num_discarded, group_size, num_queries, len]
        float32.
    """
    true, cached = keys
    group_size = query.shape[2]
    # The group's queries go side by side: broadcasting would copy the keys for each.
    side = query.flatten(2, 3) * scaling

    def scores(key: torch.Tensor) -> torch.Tensor:
        product = side @ key.to(side.dtype).transpose(2, 3)
        return product.float().unflatten(2, (group_size, -1))

    exact = scores(true)
    kept = exact if cached is true else scores(cached)
    echo = torch.where(visibility.rebuilt, scores(key_hat), kept)
    return exact, echo.masked_fill(visibility.future, -torch.inf)


def echo_output(
    probabilities: torch.Tensor,
    rebuilt: torch.Tensor,
    value: torch.Tensor,
    value_hat: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum over exact and rebuilt values.

    Args:
        probabilities: [batch, num_discarded, group_size, num_queries, len].
        rebuilt: [num_queries, len] bool.
        value: As cached, [batch, num_discarded, len, head_dim].
        value_hat: Rebuilt, same shape.

    Returns:
        [batch, num_discarded, group_size, num_queries, head_dim] of the dtype of `value`.
    """
    difference = value_hat.to(value.dtype) - value
    weights = probabilities.to(value.dtype)
    return _mix(weights, value) + _mix(weights * rebuilt, difference)


def exact_output(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Weighted sum over exact values; shapes as in `echo_output`."""
    return _mix(probabilities.to(value.dtype), value)


def _mix(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (weights.flatten(2, 3) @ value).unflatten(2, (weights.shape[2], -1))


def pick(x: torch.Tensor, which: tuple[int, ...], dim: int = 1) -> torch.Tensor:
    """Entries of one axis: a view where they lie side by side, else a copy."""
    first, count = which[0], len(which)
    if which == tuple(range(first, first + count)):
        return x.narrow(dim, first, count)
    return x.index_select(dim, _index(which, x.device))


@functools.lru_cache(maxsize=4096)
def _index(which: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # Kept, because every copy to a GPU stops the queue of kernels.
    return torch.tensor(which, device=device)


def _apply(features: list[torch.Tensor], maps: LayerMaps, part: str, rows: slice) -> torch.Tensor:
    """[batch, heads, len, head_dim] per source -> [batch, rows, len, head_dim]."""
    named = maps.named()
    inputs = torch.cat(features, 1).transpose(1, 2).flatten(2)
    weights = named[part][rows].to(inputs.dtype)
    # One product for all heads: [batch, len, feature_size] @ [feature_size, rows * head_dim]
    rebuilt = (inputs @ weights.transpose(0, 1).flatten(1)).unflatten(2, (len(weights), -1))
    if f"{part}_bias" in named:
        rebuilt = rebuilt + named[f"{part}_bias"][rows].to(inputs.dtype)
    return rebuilt.transpose(1, 2)
