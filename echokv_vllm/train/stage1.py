"""Stage I in closed form: least-squares maps from source heads to discarded heads.

A batch's keys and values pass by layer by layer. Each layer's heads are put into map space (keys
block-rotated, values as they are) and held exactly as long as some layer still needs them, so that
memory is bounded by one batch whatever the amount of data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from echokv_vllm.checkpoint import LayerMaps
from echokv_vllm.plan import EchoPlan
from echokv_vllm.quantization import as_cached
from echokv_vllm.train.capture import captured_attention
from echokv_vllm.train.normal_equations import NormalEquations, relative

RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""What `choose_ridges` chooses from."""

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary


@dataclass(frozen=True)
class Samples:
    """One batch of one layer and shard, in map space; all float32 on the model's device.

    Attributes:
        key_inputs: [num_tokens, feature_size]
        key_targets: [num_tokens, num_discarded * head_dim]
        value_inputs: [num_tokens, feature_size]
        value_targets: [num_tokens, num_discarded * head_dim]
    """

    key_inputs: torch.Tensor
    key_targets: torch.Tensor
    value_inputs: torch.Tensor
    value_targets: torch.Tensor


Visitor = Callable[[int, int, Samples], None]
"""Called with the layer, the shard and the samples of one batch."""


def block_shift(
    positions: torch.Tensor, offsets: torch.Tensor, rotation_block: int
) -> torch.Tensor:
    """By how much cached keys are rotated on to reach block-rotated space.

    A key cached at `position` is treated as if it were at `position + offset`, where block rotation
    would leave it rotated by that modulo `rotation_block`.

    Args:
        positions: [len] or [batch, len] int64, where the keys were cached.
        offsets: [batch] int64.
        rotation_block: B; 0 means absolute rotation.

    Returns:
        [batch, len] int64, possibly negative.
    """
    assumed = positions + offsets[:, None]
    if rotation_block > 0:
        assumed = assumed % rotation_block
    return assumed - positions


class LayerSchedule:
    """When the layers of a plan can be visited and how long a layer's heads are needed.

    Attributes:
        visit_after: `visit_after[l]` lists the layers whose heads and sources are all at hand once
            layer `l` has passed.
        drop_after: `drop_after[l]` lists the layers that nobody needs any more after that.
        needed: Layers that must be held at all.
    """

    def __init__(self, plan: EchoPlan) -> None:
        self.visit_after: list[list[int]] = [[] for _ in range(plan.num_layers)]
        self.drop_after: list[list[int]] = [[] for _ in range(plan.num_layers)]
        last_use: dict[int, int] = {}
        for layer in range(plan.num_layers):
            if not plan.discarded(layer):
                continue
            parts = {layer, *(source.layer for source in plan.layers[layer].sources)}
            ready = max(parts)
            self.visit_after[ready].append(layer)
            for part in parts:
                last_use[part] = max(last_use.get(part, 0), ready)
        for part, when in sorted(last_use.items()):
            self.drop_after[when].append(part)
        self.needed = frozenset(last_use)


class LayerStream:
    """Capture callback that turns passing layers into `Samples` for a visitor.

    Call `start_batch` before every forward pass.

    Args:
        plan: The echo plan.
        rotary: Rotary embedding of the model, on the model's device.
        rotation_block: B of the key space.
        visitor: Gets the samples; must not keep them.
        cache_format: Inputs are as a cache of this format returns them; targets are exact.
    """

    def __init__(
        self,
        plan: EchoPlan,
        rotary: Rotary,
        rotation_block: int,
        visitor: Visitor,
        cache_format: str = "auto",
    ) -> None:
        self._plan = plan
        self._rotary = rotary
        self._rotation_block = rotation_block
        self._visitor = visitor
        self._cache_format = cache_format
        self._schedule = LayerSchedule(plan)
        # layer -> keys and values, each [num_tokens, num_kv_heads, head_dim] float32: as the model
        # computed them, and as the cache returns them
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._cached: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def num_held(self) -> int:
        """Layers whose heads are held right now."""
        return len(self._held)

    def start_batch(self, offsets: torch.Tensor, sequence_len: int) -> None:
        """Set the position offset of every sample of the next forward pass ([batch] int64)."""
        assert not self._held, f"layers {sorted(self._held)} were never used up"
        positions = torch.arange(sequence_len, device=offsets.device)
        cos, sin = self._rotary.cos_sin(block_shift(positions, offsets, self._rotation_block))
        self._rotation = cos[:, None], sin[:, None]

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        assert self._rotation is not None, "start_batch was not called"
        if layer in self._schedule.needed:
            self._held[layer] = self._cached[layer] = self._in_map_space(key, value)
            if self._cache_format != "auto":
                self._cached[layer] = self._in_map_space(
                    as_cached(key, self._cache_format), as_cached(value, self._cache_format)
                )
        for ready in self._schedule.visit_after[layer]:
            for shard in range(self._plan.shards):
                self._visitor(ready, shard, self._samples(ready, shard))
        for done in self._schedule.drop_after[layer]:
            del self._held[done], self._cached[done]

    def _in_map_space(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._rotation is not None
        turned = self._rotary.turn(key.float(), *self._rotation)
        return _per_token(turned), _per_token(value.float())

    def _samples(self, layer: int, shard: int) -> Samples:
        sources = self._plan.source_heads(layer, shard)
        targets = [(layer, head) for head in shard_discarded(self._plan, layer, shard)]
        return Samples(
            key_inputs=_gather(self._cached, sources, 0),
            key_targets=_gather(self._held, targets, 0),
            value_inputs=_gather(self._cached, sources, 1),
            value_targets=_gather(self._held, targets, 1),
        )


def shard_discarded(plan: EchoPlan, layer: int, shard: int) -> list[int]:
    """Discarded heads of one shard, ascending."""
    return [head for head in plan.discarded(layer) if plan.shard_of(head) == shard]


def stream(
    model: Any,
    sequences: torch.Tensor,
    offsets: torch.Tensor,
    batch_size: int,
    layers: LayerStream,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    """Run the model over all sequences and feed every batch to `layers`.

    Args:
        model: Hugging Face causal LM in eval mode.
        sequences: [num_sequences, sequence_len] int32 token ids on the CPU.
        offsets: [num_sequences] int64 on the CPU.
        batch_size: Sequences per forward pass.
        layers: Receives the attention tensors.
        progress: Wraps the iteration over batch starts.
    """
    with torch.no_grad(), captured_attention(model, layers):
        for start in progress(range(0, len(sequences), batch_size)):
            ids = sequences[start : start + batch_size].to(model.device, torch.int64)
            layers.start_batch(
                offsets[start : start + batch_size].to(model.device), sequences.shape[1]
            )
            # The decoder alone: logits are not needed.
            model.get_decoder()(input_ids=ids, use_cache=False)


class Fit:
    """Visitor that accumulates the systems of every layer and shard, then solves them."""

    def __init__(
        self, plan: EchoPlan, head_dim: int, device: torch.device, bias: bool = False
    ) -> None:
        self._plan = plan
        self._head_dim = head_dim
        self._systems: dict[tuple[int, int], tuple[NormalEquations, NormalEquations]] = {}
        for layer in range(plan.num_layers):
            for shard in range(plan.shards) if plan.discarded(layer) else ():
                num_inputs = len(plan.source_heads(layer, shard)) * head_dim
                num_outputs = len(shard_discarded(plan, layer, shard)) * head_dim
                self._systems[layer, shard] = (
                    NormalEquations(num_inputs, num_outputs, device, bias),
                    NormalEquations(num_inputs, num_outputs, device, bias),
                )

    def __call__(self, layer: int, shard: int, samples: Samples) -> None:
        keys, values = self._systems[layer, shard]
        keys.add(samples.key_inputs, samples.key_targets)
        values.add(samples.value_inputs, samples.value_targets)

    @property
    def layers(self) -> list[int]:
        """Layers that discard heads."""
        return sorted({layer for layer, _ in self._systems})

    def systems(self, layer: int, key_or_value: int) -> list[NormalEquations]:
        """Systems of the layer's shards, for K (0) or V (1)."""
        return [self._systems[layer, shard][key_or_value] for shard in range(self._plan.shards)]

    def solve(
        self, ridge: float | dict[int, tuple[float, float]]
    ) -> tuple[dict[int, LayerMaps], dict[int, tuple[float, float]]]:
        """Maps (float32, on the CPU) and the fit's own K and V errors of every discarding layer.

        Args:
            ridge: One for all, or for K and V of every layer.

        Raises:
            ValueError: If a system is singular; the message names the layer.
        """
        maps: dict[int, LayerMaps] = {}
        for layer in self.layers:
            ridges = ridge[layer] if isinstance(ridge, dict) else (ridge, ridge)
            try:
                key, key_bias = _solve_shards(self.systems(layer, 0), ridges[0], self._head_dim)
                value, value_bias = _solve_shards(self.systems(layer, 1), ridges[1], self._head_dim)
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from error
            maps[layer] = LayerMaps(key, value, key_bias, value_bias)
        return maps, self.errors(maps)

    def errors(self, maps: dict[int, LayerMaps]) -> dict[int, tuple[float, float]]:
        """Relative K and V error of any maps on the tokens seen."""
        return {
            layer: (
                _shards_error(self.systems(layer, 0), maps[layer].key, maps[layer].key_bias),
                _shards_error(self.systems(layer, 1), maps[layer].value, maps[layer].value_bias),
            )
            for layer in self.layers
        }


def choose_ridges(fit: Fit, heldout: Fit) -> dict[int, tuple[float, float]]:
    """The ridges of `RIDGES` with the least held-out error, for K and V of every layer.

    Raises:
        ValueError: If a system is singular whatever the ridge; the message names the layer.
    """
    chosen = {}
    for layer in fit.layers:
        best = []
        for part in (0, 1):
            systems, judges = fit.systems(layer, part), heldout.systems(layer, part)
            found: list[tuple[float, float]] = []
            for ridge in RIDGES:
                try:
                    weights = [system.solve(ridge) for system in systems]
                except ValueError as error:
                    if ridge == RIDGES[-1] and not found:
                        raise ValueError(f"layer {layer}: {error}") from error
                    continue
                pairs = zip(judges, weights, strict=True)
                found.append((sum(judge.squared_error(w) for judge, w in pairs), ridge))
            best.append(min(found)[1])
        chosen[layer] = (best[0], best[1])
    return chosen


def _solve_shards(
    systems: list[NormalEquations], ridge: float, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Maps and bias of all shards of a layer; discarded heads of all shards in ascending order."""
    maps, biases = [], []
    for system in systems:
        weights = system.solve(ridge)
        if system.bias:
            biases.append(weights[-1].view(-1, head_dim))
            weights = weights[:-1]
        maps.append(weights.view(len(weights), -1, head_dim).transpose(0, 1))
    bias = torch.cat(biases).float().cpu().contiguous() if biases else None
    return torch.cat(maps).float().cpu().contiguous(), bias


def _shards_error(
    systems: list[NormalEquations], maps: torch.Tensor, bias: torch.Tensor | None
) -> float:
    residual = total = 0.0
    first = 0
    for system in systems:
        rows = slice(first, first + len(system.yy) // maps.shape[2])
        first = rows.stop
        weights = maps[rows].to(system.xx).transpose(0, 1).flatten(1)
        if bias is not None:
            weights = torch.cat((weights, bias[rows].to(weights).flatten()[None]))
        residual += system.squared_error(weights)
        total += system.yy.sum().item()
    return relative(residual, total)


def _gather(
    held: dict[int, tuple[torch.Tensor, torch.Tensor]],
    heads: list[tuple[int, int]],
    key_or_value: int,
) -> torch.Tensor:
    return torch.cat([held[layer][key_or_value][:, head] for layer, head in heads], dim=1)


def _per_token(heads: torch.Tensor) -> torch.Tensor:
    """[batch, num_kv_heads, len, head_dim] -> [batch * len, num_kv_heads, head_dim]."""
    return heads.transpose(1, 2).flatten(0, 1)
