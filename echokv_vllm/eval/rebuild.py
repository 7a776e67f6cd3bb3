"""What a compressed cache makes of a Hugging Face model's heads: quantised, rebuilt, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from echokv_vllm.checkpoint import EchoCheckpoint, LayerMaps
from echokv_vllm.quantization import as_cached, int_per_token_head
from echokv_vllm.train.stage1 import block_shift, shard_discarded

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys (after RoPE) and values, [batch, num_kv_heads, len, head_dim]."""

LayerHeads = Callable[[int], KeyValue]
"""Heads of a layer, as the cache returns them, of the tokens that are to be rebuilt."""


class Rebuilder(Protocol):
    """A compressed cache whose heads do not depend on the queries.

    Tokens outside the window come from `rebuild` in some heads; everything else is `cached`.
    """

    @property
    def source_layers(self) -> frozenset[int]:
        """Layers whose heads `rebuild` asks for."""

    def rebuilt_heads(self, layer: int) -> Sequence[int]:
        """KV heads of a layer that are rebuilt, ascending."""

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """What the cache returns for keys (after RoPE) or values [..., head_dim]."""

    def rebuild(
        self,
        layer: int,
        heads: LayerHeads,
        positions: torch.Tensor,
        offsets: torch.Tensor,
        written: KeyValue,
    ) -> KeyValue:
        """The rebuilt heads of some tokens, in the order of `rebuilt_heads`.

        Args:
            layer: A layer that rebuilds heads.
            heads: Cached heads of the source layers, of these tokens only.
            positions: [len] int64 positions of the tokens, or [batch, len] where rows differ.
            offsets: [batch] int64, assumed to be added to the tokens' positions (method.md §3: the
                attention does not see it, the block-rotated key space does).
            written: All heads of this layer and these tokens, as the model computed them.

        Returns:
            Keys (rotated like the cached ones) and values, [batch, num_rebuilt, len, head_dim]
            float32.
        """


class QuantizedCache:
    """A cache of a format of `quantization`, and nothing rebuilt."""

    source_layers: frozenset[int] = frozenset()

    def __init__(self, cache_format: str) -> None:
        self._format = cache_format

    def rebuilt_heads(self, layer: int) -> Sequence[int]:
        """None."""
        return ()

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """See `Rebuilder`."""
        return as_cached(x, self._format)

    def rebuild(
        self,
        layer: int,
        heads: LayerHeads,
        positions: torch.Tensor,
        offsets: torch.Tensor,
        written: KeyValue,
    ) -> KeyValue:
        """Not to be called."""
        raise AssertionError("a quantised cache rebuilds no head")


class HeadRebuilder:
    """Applies a checkpoint's maps, in float32; a `Rebuilder`.

    Args:
        checkpoint: The maps and the plan.
        rotary: Rotary embedding of the model.
        device: Where the model runs.
        cache_format: Of the cache that holds the heads (see `quantization`).
        residual_bits: Bits per number of a coded copy of what the reconstruction gets wrong, kept
            for every discarded head (method.md §6); 0 keeps none.

    Raises:
        ValueError: If a layer has sources in a later layer, whose keys do not exist yet when a
            sequence passes through the model layer by layer.
    """

    def __init__(
        self,
        checkpoint: EchoCheckpoint,
        rotary: Rotary,
        device: torch.device | str,
        cache_format: str = "auto",
        residual_bits: int = 0,
    ) -> None:
        self.plan = checkpoint.plan
        self._format = cache_format
        self._residual_bits = residual_bits
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

    @property
    def source_layers(self) -> frozenset[int]:
        """See `Rebuilder`."""
        return frozenset(source.layer for layer in self.plan.layers for source in layer.sources)

    def rebuilt_heads(self, layer: int) -> Sequence[int]:
        """The plan's discarded heads."""
        return self.plan.discarded(layer)

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """See `Rebuilder`."""
        return as_cached(x, self._format)

    def rebuild(
        self,
        layer: int,
        heads: LayerHeads,
        positions: torch.Tensor,
        offsets: torch.Tensor,
        written: KeyValue,
    ) -> KeyValue:
        """See `Rebuilder`; with a coded residual that is added."""
        key, value = self._mapped(layer, heads, positions, offsets)
        if not self._residual_bits:
            return key, value
        lost = list(self.plan.discarded(layer))
        return self._corrected(key, written[0][:, lost]), self._corrected(
            value, written[1][:, lost]
        )

    def _corrected(self, rebuilt: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        return rebuilt + int_per_token_head(exact.float() - rebuilt, self._residual_bits)

    def _mapped(
        self, layer: int, heads: LayerHeads, positions: torch.Tensor, offsets: torch.Tensor
    ) -> KeyValue:
        """What the maps alone give."""
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
                turned = self._rotary.turn(key[:, head : head + 1].float(), cos, sin)
                features[0].append(turned[:, 0])
                features[1].append(value[:, head].float())
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
