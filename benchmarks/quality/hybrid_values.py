"""Stage II of the Hybrid: value maps that make up for pruned keys, in closed form.

With the keys given, the attention weights are given, and a head's output is linear in its value
map. The least error of the attention output (O-MSE) is therefore a least-squares problem of its own
for every discarded head: inputs are the sources' values, summed with the weights of the tokens
outside the window, targets what the exact output has beyond the window's part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pruned_keys import PrunedKeys

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.eval.attention import Window
from echokv_vllm.train.capture import captured_attention
from echokv_vllm.train.normal_equations import NormalEquations


def tune_values(
    model: Any,
    checkpoint: EchoCheckpoint,
    keys: PrunedKeys,
    sequences: torch.Tensor,
    window: Window,
    ridge: float = 1e-4,
    num_queries: int = 256,
) -> EchoCheckpoint:
    """The checkpoint with new value maps, without bias.

    Args:
        model: Causal LM in eval mode.
        checkpoint: Its plan says which values are echoed and from what; one shard.
        keys: The pruned keys.
        sequences: [num_sequences, length] token ids.
        window: Exact tokens.
        ridge: Relative to the mean squared input.
        num_queries: Queries per sequence, drawn at random outside the window.
    """
    plan = checkpoint.plan
    assert plan.shards == 1, "baselines are not split into shards"
    head_dim = checkpoint.fingerprint.head_dim
    systems = {
        (layer, head): NormalEquations(
            len(plan.source_heads(layer)) * head_dim, head_dim, model.device
        )
        for layer in range(plan.num_layers)
        for head in plan.discarded(layer)
    }
    generator = torch.Generator().manual_seed(0)
    values: dict[int, torch.Tensor] = {}

    def add(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        values[layer] = value.float()
        if not plan.discarded(layer):
            return
        features = torch.cat([values[at][:, head] for at, head in plan.source_heads(layer)], -1)
        length, group = key.shape[2], query.shape[1] // key.shape[1]
        first = min(window.sink_tokens + window.recent_tokens, length - 1)
        at = torch.randperm(length - first, generator=generator)[:num_queries] + first
        at = at.to(query.device)
        for head in plan.discarded(layer):
            rows = slice(head * group, (head + 1) * group)
            inputs, targets = _samples(
                query[:, rows][:, :, at].float(),
                key[:, head].float(),
                key[:, head].float() * keys.masks[layer][:, head, None],
                value[:, head].float(),
                features,
                at,
                window,
            )
            systems[layer, head].add(inputs, targets)

    with torch.inference_mode(), captured_attention(model, add):
        for row in sequences:
            model.get_decoder()(input_ids=row[None].to(model.device, torch.int64), use_cache=False)
    maps = {
        layer: replace(
            old,
            value=torch.stack(
                [systems[layer, head].solve(ridge).float().cpu() for head in plan.discarded(layer)]
            ),
            value_bias=None,
        )
        for layer, old in checkpoint.maps.items()
    }
    return replace(checkpoint, maps=maps)


def _samples(
    query: torch.Tensor,
    key: torch.Tensor,
    pruned: torch.Tensor,
    value: torch.Tensor,
    features: torch.Tensor,
    at: torch.Tensor,
    window: Window,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [n, feature_size] and targets [n, head_dim] of one head.

    Args:
        query: [batch, group, num_queries, head_dim].
        key: [batch, len, head_dim].
        pruned: Likewise, as the cache holds it outside the window.
        value: Likewise.
        features: [batch, len, feature_size] values of the sources.
        at: [num_queries] positions of the queries.
        window: Exact tokens.
    """
    token = torch.arange(key.shape[1], device=key.device)
    future = token > at[:, None]
    outside = (token >= window.sink_tokens) & (token <= at[:, None] - max(window.recent_tokens, 1))
    scaled = query * query.shape[-1] ** -0.5
    exact = (scaled @ key.transpose(1, 2)[:, None]).masked_fill(future, -torch.inf)
    rough = torch.where(outside, scaled @ pruned.transpose(1, 2)[:, None], exact)
    weights = rough.softmax(-1)
    inputs = (weights * outside) @ features[:, None]
    targets = exact.softmax(-1) @ value[:, None] - (weights * ~outside) @ value[:, None]
    return inputs.flatten(0, 2), targets.flatten(0, 2)
