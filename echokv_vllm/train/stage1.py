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
from echokv_vllm.train.capture import captured_attention
from echokv_vllm.train.normal_equations import NormalEquations, relative

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
        positions: [len] int64, where the keys were cached.
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
    """

    def __init__(
        self, plan: EchoPlan, rotary: Rotary, rotation_block: int, visitor: Visitor
    ) -> None:
        self._plan = plan
        self._rotary = rotary
        self._rotation_block = rotation_block
        self._visitor = visitor
        self._schedule = LayerSchedule(plan)
        # layer -> keys and values, each [num_tokens, num_kv_heads, head_dim] float32
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
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
            turned = self._rotary.turn(key.float(), *self._rotation)
            self._held[layer] = (_per_token(turned), _per_token(value.float()))
        for ready in self._schedule.visit_after[layer]:
            for shard in range(self._plan.shards):
                self._visitor(ready, shard, self._samples(ready, shard))
        for done in self._schedule.drop_after[layer]:
            del self._held[done]

    def _samples(self, layer: int, shard: int) -> Samples:
        sources = self._plan.source_heads(layer, shard)
        targets = [(layer, head) for head in shard_discarded(self._plan, layer, shard)]
        return Samples(
            key_inputs=self._gather(sources, 0),
            key_targets=self._gather(targets, 0),
            value_inputs=self._gather(sources, 1),
            value_targets=self._gather(targets, 1),
        )

    def _gather(self, heads: list[tuple[int, int]], key_or_value: int) -> torch.Tensor:
        return torch.cat([self._held[layer][key_or_value][:, head] for layer, head in heads], dim=1)


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
    with torch.inference_mode(), captured_attention(model, layers):
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

    def solve(self, ridge: float) -> tuple[dict[int, LayerMaps], dict[int, tuple[float, float]]]:
        """Maps (float32, on the CPU) and the fit's own K and V errors of every discarding layer.

        Raises:
            ValueError: If a system is singular; the message names the layer.
        """
        maps: dict[int, LayerMaps] = {}
        errors: dict[int, tuple[float, float]] = {}
        for layer in sorted({layer for layer, _ in self._systems}):
            systems = [self._systems[layer, shard] for shard in range(self._plan.shards)]
            try:
                keys = _solve_shards([key for key, _ in systems], ridge, self._head_dim)
                values = _solve_shards([value for _, value in systems], ridge, self._head_dim)
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from error
            maps[layer] = LayerMaps(keys.maps, values.maps, keys.bias, values.bias)
            errors[layer] = (keys.error, values.error)
        return maps, errors


class HeldOutErrors:
    """Visitor that applies finished maps to samples and sums up what they get wrong."""

    def __init__(self, plan: EchoPlan, maps: dict[int, LayerMaps], device: torch.device) -> None:
        self._plan = plan
        self._maps = {
            layer: LayerMaps(**{name: part.to(device) for name, part in layer_maps.named().items()})
            for layer, layer_maps in maps.items()
        }
        # layer -> squared residual and squared target, for K then V
        self._sums = {
            layer: torch.zeros(2, 2, dtype=torch.float64, device=device) for layer in maps
        }

    def __call__(self, layer: int, shard: int, samples: Samples) -> None:
        maps = self._maps[layer]
        before = sum(len(shard_discarded(self._plan, layer, s)) for s in range(shard))
        rows = slice(before, before + len(shard_discarded(self._plan, layer, shard)))
        parts = (
            (samples.key_inputs, samples.key_targets, maps.key, maps.key_bias),
            (samples.value_inputs, samples.value_targets, maps.value, maps.value_bias),
        )
        for index, (inputs, targets, weights, bias) in enumerate(parts):
            rebuilt = torch.einsum("nf,jfd->njd", inputs, weights[rows])
            if bias is not None:
                rebuilt = rebuilt + bias[rows]
            residual = targets - rebuilt.flatten(1)
            self._sums[layer][index, 0] += residual.double().square().sum()
            self._sums[layer][index, 1] += targets.double().square().sum()

    def errors(self) -> dict[int, tuple[float, float]]:
        """Relative K and V error of every layer."""
        result = {}
        for layer, sums in self._sums.items():
            (key, key_total), (value, value_total) = sums.tolist()
            result[layer] = (relative(key, key_total), relative(value, value_total))
        return result


@dataclass(frozen=True)
class _Solution:
    maps: torch.Tensor
    bias: torch.Tensor | None
    error: float


def _solve_shards(systems: list[NormalEquations], ridge: float, head_dim: int) -> _Solution:
    """Solve all shards of a layer; discarded heads of all shards in ascending order."""
    maps, biases = [], []
    residual = total = 0.0
    for system in systems:
        weights = system.solve(ridge)
        scale = system.yy.sum().item()
        residual += system.relative_error(weights) * scale
        total += scale
        if system.bias:
            biases.append(weights[-1].view(-1, head_dim))
            weights = weights[:-1]
        maps.append(weights.view(len(weights), -1, head_dim).transpose(0, 1))
    return _Solution(
        maps=torch.cat(maps).float().cpu().contiguous(),
        bias=torch.cat(biases).float().cpu().contiguous() if biases else None,
        error=relative(residual, total),
    )


def _per_token(heads: torch.Tensor) -> torch.Tensor:
    """[batch, num_kv_heads, len, head_dim] -> [batch * len, num_kv_heads, head_dim]."""
    return heads.transpose(1, 2).flatten(0, 1)
