"""Losses that every layer has for itself, taken from one pass of the frozen model.

The layers pass by with their true queries, keys and values (teacher forcing). As soon as a layer
and its sources are at hand its loss is computed and sent back into its own maps, so that no more
than one layer's graph is ever alive. Of every sequence only some queries are looked at: a score
matrix has `num_queries` x len numbers per query head, never len x len.
"""

from __future__ import annotations

from typing import Any

import torch

from echokv_vllm.train.attention import (
    CacheSetup,
    KeyValue,
    Rebuilder,
    Visibility,
    echo_output,
    echo_scores,
    exact_output,
    pick,
)
from echokv_vllm.train.capture import captured_attention
from echokv_vllm.train.parameters import MapParameters
from echokv_vllm.train.stage1 import LayerSchedule, LayerStream, Samples, shard_discarded


def layer_groups(parameters: MapParameters) -> dict[str, tuple[str, ...]]:
    """One group per layer: each has a loss of its own."""
    return {f"layer {layer}": parameters.names(layer) for layer in parameters.layers}


class KeyValueError:
    """`kv-mse`: relative squared error of the rebuilt keys plus that of the rebuilt values.

    Args:
        model: Supported Hugging Face causal LM in eval mode.
        setup: The cache; windows and residuals play no part.
        parameters: The maps.
    """

    loss = "kv-mse"

    def __init__(self, model: Any, setup: CacheSetup, parameters: MapParameters) -> None:
        self.groups = layer_groups(parameters)
        self._model = model
        self._setup = setup
        self._parameters = parameters

    def losses(
        self, ids: torch.Tensor, offsets: torch.Tensor, generator: torch.Generator, learn: bool
    ) -> dict[str, torch.Tensor]:
        """See `Objective`."""
        found: dict[str, torch.Tensor] = {}
        plan, shards = self._setup.plan, self._setup.plan.shards

        def visit(layer: int, shard: int, samples: Samples) -> None:
            first = sum(len(shard_discarded(plan, layer, s)) for s in range(shard))
            rows = slice(first, first + len(shard_discarded(plan, layer, shard)))
            with torch.set_grad_enabled(learn):
                named = self._parameters.layer(layer).named()
                loss = torch.zeros((), device=self._model.device)
                for part, inputs, targets in (
                    ("key", samples.key_inputs, samples.key_targets),
                    ("value", samples.value_inputs, samples.value_targets),
                ):
                    rebuilt = inputs @ named[part][rows].transpose(0, 1).flatten(1)
                    if f"{part}_bias" in named:
                        rebuilt = rebuilt + named[f"{part}_bias"][rows].flatten()
                    loss = loss + _relative((rebuilt - targets).square().sum(), targets) / shards
            if learn:
                loss.backward()
            group = f"layer {layer}"
            found[group] = found.get(group, 0) + loss.detach()

        stream = LayerStream(
            plan, self._setup.rotary, self._setup.rotation_block, visit, self._setup.format
        )
        stream.start_batch(offsets, ids.shape[1])
        _pass(self._model, ids, stream)
        return found


class LayerwiseAttention:
    """`o-mse` and `qk-kl`: what the discarded heads' attention gets wrong.

    `o-mse` is the squared error of the attention's contribution to the residual stream, after the
    output projection, relative to what the discarded heads contribute. `qk-kl` is the mean
    divergence of the attention weights from the true ones; it trains keys only.

    Args:
        loss: `o-mse` or `qk-kl`.
        model: Supported Hugging Face causal LM in eval mode.
        setup: The cache.
        parameters: The maps.
        num_queries: Queries per sequence.
    """

    def __init__(
        self,
        loss: str,
        model: Any,
        setup: CacheSetup,
        parameters: MapParameters,
        num_queries: int,
    ) -> None:
        assert loss in ("o-mse", "qk-kl"), loss
        self.loss = loss
        self.groups = layer_groups(parameters)
        self._model = model
        self._setup = setup
        self._parameters = parameters
        self._num_queries = num_queries

    def losses(
        self, ids: torch.Tensor, offsets: torch.Tensor, generator: torch.Generator, learn: bool
    ) -> dict[str, torch.Tensor]:
        """See `Objective`."""
        run = _Run(self, ids.shape[1], offsets, self._draw(ids.shape[1], generator), learn)
        _pass(self._model, ids, run)
        return run.found

    def _draw(self, sequence_len: int, generator: torch.Generator) -> torch.Tensor:
        """Positions of some queries that see rebuilt tokens, ascending."""
        first = self._setup.first_query()
        order = torch.randperm(sequence_len - first, generator=generator)
        positions = order[: self._num_queries].sort().values + first
        return positions.to(self._model.device)

    def layer_loss(
        self,
        layer: int,
        query: torch.Tensor,
        written: KeyValue,
        rebuilder: Rebuilder,
        cached: dict[int, KeyValue],
        visibility: Visibility,
    ) -> torch.Tensor:
        """Scalar loss of one layer.

        Args:
            layer: A layer that discards heads.
            query: [batch, num_heads, num_queries, head_dim].
            written: Keys and values as the model computed them.
            rebuilder: Of this batch.
            cached: Heads of the layer and its sources as the cache returns them.
            visibility: Of these queries.
        """
        module = self._model.get_decoder().layers[layer].self_attn
        heads = self._setup.plan.discarded(layer)
        group_size = query.shape[1] // written[0].shape[1]
        rows = self._setup.query_rows(layer, group_size)
        grouped = pick(query, rows).unflatten(1, (len(heads), group_size))
        key, value = (pick(part, heads) for part in written)
        kept_key, kept_value = key, value
        if self._setup.format != "auto":
            kept_key, kept_value = (pick(part, heads) for part in cached[layer])
        key_hat, value_hat = rebuilder.rebuild(layer, cached.__getitem__, written)
        exact_scores, scores = echo_scores(
            grouped, (key, kept_key), key_hat, visibility, module.scaling
        )
        exact_scores = exact_scores.masked_fill(visibility.future, -torch.inf)
        if self.loss == "qk-kl":
            return _divergence(exact_scores, scores, visibility)
        true = exact_output(exact_scores.softmax(-1), value)
        echo = echo_output(scores.softmax(-1), visibility.rebuilt, kept_value, value_hat)
        # [hidden_size, n * head_dim]: the output projection's columns of these query heads
        columns = pick(module.o_proj.weight.unflatten(1, (query.shape[1], -1)), rows).flatten(1)

        def contribution(out: torch.Tensor) -> torch.Tensor:
            # [batch, n, group, queries, head_dim] -> [batch, queries, n * group * head_dim]
            return out.flatten(1, 2).transpose(1, 2).flatten(2) @ columns.T

        target = contribution(true).float()
        difference = contribution(echo - true).float()
        return _relative(difference.square().sum(), target)


class _Run:
    """Capture callback of one forward pass."""

    def __init__(
        self,
        owner: LayerwiseAttention,
        sequence_len: int,
        offsets: torch.Tensor,
        positions: torch.Tensor,
        learn: bool,
    ) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self._owner = owner
        self._setup = owner._setup
        self._schedule = LayerSchedule(self._setup.plan)
        self._rebuilder = Rebuilder(self._setup, owner._parameters, offsets, sequence_len)
        self._positions = positions
        self._visibility = Visibility.of(positions, sequence_len, self._setup.window)
        self._learn = learn
        self._queries: dict[int, torch.Tensor] = {}
        self._written: dict[int, KeyValue] = {}
        self._cached: dict[int, KeyValue] = {}

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        if layer in self._schedule.needed:
            self._written[layer] = (key, value)
            self._cached[layer] = (self._setup.cached(key), self._setup.cached(value))
        if self._setup.plan.discarded(layer):
            self._queries[layer] = query[:, :, self._positions]
        for ready in self._schedule.visit_after[layer]:
            with torch.set_grad_enabled(self._learn):
                loss = self._owner.layer_loss(
                    ready, self._queries.pop(ready), self._written[ready], self._rebuilder,
                    self._cached, self._visibility,
                )  # fmt: skip
            if self._learn:
                loss.backward()
            self.found[f"layer {ready}"] = loss.detach()
        for done in self._schedule.drop_after[layer]:
            del self._written[done], self._cached[done]


def _divergence(
    exact_scores: torch.Tensor, scores: torch.Tensor, visibility: Visibility
) -> torch.Tensor:
    """Mean over heads and queries of KL(true attention weights || those on rebuilt keys)."""
    true = exact_scores.log_softmax(-1)
    # -inf minus -inf in the future; those tokens have weight 0.
    difference = (true - scores.log_softmax(-1)).masked_fill(visibility.future, 0.0)
    return (true.exp() * difference).sum(-1).mean()


def _relative(residual: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Residual over the squares of the targets; discarded heads that are all zero do not divide."""
    return residual / targets.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def _pass(model: Any, ids: torch.Tensor, callback: Any) -> None:
    # Stage I has found all activations finite; a check would wait for the device in every layer.
    with torch.no_grad(), captured_attention(model, callback, check=False):
        # The decoder alone: logits are not needed.
        model.get_decoder()(input_ids=ids, use_cache=False)
