"""What the baselines need to know about a model's heads, from one pass over calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.capture import captured_attention


@dataclass
class Moments:
    """Sums over all calibration tokens, per layer; all on the model's device.

    Attributes:
        key: [H * d, H * d] float64 products of un-rotated keys, all heads side by side.
        value: Likewise of values.
        query_square: [H, d] float64 sums of squares of queries after RoPE; the query heads of a KV
            head are added.
        key_square: Likewise of keys after RoPE.
        num_kv_heads: H.
        head_dim: d.
    """

    key: list[torch.Tensor]
    value: list[torch.Tensor]
    query_square: list[torch.Tensor]
    key_square: list[torch.Tensor]
    num_kv_heads: int
    head_dim: int

    @property
    def num_layers(self) -> int:
        return len(self.key)

    @property
    def full_size(self) -> int:
        """Numbers per token that a full cache holds in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def collect(model: Any, sequences: torch.Tensor, batch_size: int) -> Moments:
    """Run the model over `sequences` [num_sequences, length] and sum up."""
    rotary = rotary_from_config(model.config).to(model.device)
    shape = model.config.num_key_value_heads, rotary.head_dim
    moments = Moments([], [], [], [], *shape)
    cos, sin = rotary.cos_sin(torch.arange(sequences.shape[1], device=model.device))

    def add(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if layer == moments.num_layers:
            width = shape[0] * shape[1]
            for sums, size in (
                (moments.key, (width, width)),
                (moments.value, (width, width)),
                (moments.query_square, shape),
                (moments.key_square, shape),
            ):
                sums.append(torch.zeros(size, dtype=torch.float64, device=model.device))
        plain = rotary.turn(key.float(), cos, -sin)
        for sums, heads in ((moments.key, plain), (moments.value, value.float())):
            rows = heads.transpose(1, 2).flatten(0, 1).flatten(1)
            sums[layer] += (rows.T @ rows).double()
        moments.key_square[layer] += key.double().square().sum((0, 2))
        squares = query.double().square().sum((0, 2))
        moments.query_square[layer] += squares.view(shape[0], -1, shape[1]).sum(1)

    with torch.inference_mode(), captured_attention(model, add):
        for start in range(0, len(sequences), batch_size):
            ids = sequences[start : start + batch_size].to(model.device, torch.int64)
            model.get_decoder()(input_ids=ids, use_cache=False)
    return moments
