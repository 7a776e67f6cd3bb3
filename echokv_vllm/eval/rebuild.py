"""Rebuilds the discarded heads of a layer from source heads of a Hugging Face model's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from echokv_vllm.checkpoint import EchoCheckpoint, LayerMaps
from echokv_vllm.train.stage1 import block_shift, shard_discarded

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary

LayerHeads = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Keys (as cached, after RoPE) and values of a layer, [batch, num_kv_heads, len, head_dim]."""


class HeadRebuilder:
    """Applies a checkpoint's maps, in float32.

    Args:
        checkpoint: The maps and the plan.
        rotary: Rotary embedding of the model.
        device: Where the model runs.

    Raises:
        ValueError: If a layer has sources in a later layer, whose keys do not exist yet when a
            sequence passes through the model layer by layer.
    """

    def __init__(
        self, checkpoint: EchoCheckpoint, rotary: Rotary, device: torch.device | str
    ) -> None:
        self.plan = checkpoint.plan
        for layer in checkpoint.maps:
            late = [source.layer for source in self.plan.layers[layer].sources]
            if max(late) > layer:
                raise ValueError(
                    f"plan {self.plan.name!r} rebuilds layer {layer} from layer {max(late)}; the "
                    "evaluation runs layer by layer and needs sources in the same or an earlier "
                    "layer; use such a plan"
                )
        self._block = checkpoint.rotation_block
        self._rotary = rotary.to(device)
        self._maps = {
            layer: LayerMaps(**{n: t.to(device, torch.float32) for n, t in maps.named().items()})
            for layer, maps in checkpoint.maps.items()
        }

    def rebuild(
        self, layer: int, heads: LayerHeads, start: int, stop: int, offsets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Discarded heads, ascending, of the tokens [start, stop).

        Args:
            layer: A layer that discards heads.
            heads: Cached heads of the source layers, token 0 first.
            start: First token.
            stop: Token after the last.
            offsets: [batch] int64, assumed to be added to the tokens' positions (method.md §3: the
                attention does not see it, the block-rotated key space does).

        Returns:
            Keys (rotated like the cached ones) and values, [batch, num_discarded, stop - start,
            head_dim] float32.
        """
        positions = torch.arange(start, stop, device=offsets.device)
        # From the rotation in the cache to that of the maps' key space; minus `sin` is the way back
        cos, sin = self._rotary.cos_sin(block_shift(positions, offsets, self._block))
        cos, sin = cos[:, None], sin[:, None]
        maps, first = self._maps[layer], 0
        keys, values = [], []
        for shard in range(self.plan.shards):
            rows = slice(first, first + len(shard_discarded(self.plan, layer, shard)))
            first = rows.stop
            features: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
            for source_layer, head in self.plan.source_heads(layer, shard):
                key, value = heads(source_layer)
                turned = self._rotary.turn(key[:, head : head + 1, start:stop].float(), cos, sin)
                features[0].append(turned[:, 0])
                features[1].append(value[:, head, start:stop].float())
            keys.append(_apply(features[0], maps.key[rows], _part(maps.key_bias, rows)))
            values.append(_apply(features[1], maps.value[rows], _part(maps.value_bias, rows)))
        return self._rotary.turn(torch.cat(keys, 1), cos, -sin), torch.cat(values, 1)


def _part(bias: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if bias is None else bias[rows]


def _apply(
    features: list[torch.Tensor], weights: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[batch, n, head_dim] per source, [j, feature_size, head_dim] -> [batch, j, n, head_dim]."""
    rebuilt = torch.einsum("bnf,jfd->bjnd", torch.cat(features, -1), weights)
    return rebuilt if bias is None else rebuilt + bias[:, None]
