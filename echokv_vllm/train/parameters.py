"""Maps while they are trained: float32 leaves, in coordinates in which descent is well-conditioned.

Key features are far from isotropic: a few directions carry most of their square. A step of equal
size on every weight then moves the output a hundred times more in one direction than in another.
With whitening the leaves are `P` of `W = T P`, where `T = (C / mean(diag C) + floor)^(-1/2)` and
`C` is the second moment of the features, so that the features `x T` of `x W = (x T) P` have equal
second moments in all directions.
"""

from __future__ import annotations

import torch

from echokv_vllm.checkpoint import LayerMaps
from echokv_vllm.plan import EchoPlan
from echokv_vllm.train.normal_equations import NormalEquations
from echokv_vllm.train.stage1 import Fit, shard_discarded

# Directions with less than this share of the mean second moment are not scaled up any further:
# there is little to gain and only noise to follow.
_FLOOR = 1e-3


class Whitening:
    """`T` of every layer, shard, and of K and V, with its inverse; float32.

    Args:
        factors: Name (see `name`) -> T, [feature_size, feature_size], symmetric.
    """

    def __init__(self, factors: dict[str, torch.Tensor]) -> None:
        self.factors = factors
        self._inverse = {
            key: torch.linalg.inv(factor.double()).float() for key, factor in factors.items()
        }

    @staticmethod
    def name(layer: int, shard: int, part: str) -> str:
        """Name of a factor; `part` is `key` or `value`."""
        return f"{layer}.{shard}.{part}"

    @classmethod
    def of(cls, fit: Fit, plan: EchoPlan) -> Whitening:
        """The whitening of the features that a fit has seen."""
        factors = {}
        for layer in fit.layers:
            for index, part in enumerate(("key", "value")):
                for shard in range(plan.shards):
                    factor = _inverse_root(fit.systems(layer, index)[shard])
                    factors[cls.name(layer, shard, part)] = factor
        return cls(factors)

    def apply(self, name: str, leaves: torch.Tensor) -> torch.Tensor:
        """`T P` for P [n, feature_size, head_dim]."""
        return self.factors[name] @ leaves

    def undo(self, name: str, maps: torch.Tensor) -> torch.Tensor:
        """`P` of maps [n, feature_size, head_dim]."""
        return self._inverse[name] @ maps


class MapParameters:
    """Trainable maps of all layers.

    Attributes:
        leaves: `layers.<i>.key`, `.value`, `.key_bias`, `.value_bias` -> float32 leaf.
        whitening: Coordinates of the leaves, None = the maps themselves.

    Args:
        plan: The echo plan.
        maps: Where to start from.
        device: Where the leaves live.
        whitening: On the same device.
    """

    def __init__(
        self,
        plan: EchoPlan,
        maps: dict[int, LayerMaps],
        device: torch.device,
        whitening: Whitening | None = None,
    ) -> None:
        self._plan = plan
        self.whitening = whitening
        self.leaves: dict[str, torch.Tensor] = {}
        for layer, layer_maps in maps.items():
            for part, tensor in layer_maps.named().items():
                start = tensor.to(device, torch.float32, copy=True)
                if whitening is not None and part in ("key", "value"):
                    start = torch.cat(
                        [
                            whitening.undo(whitening.name(layer, shard, part), start[rows])
                            for shard, rows in enumerate(shard_rows(plan, layer))
                        ]
                    )
                self.leaves[f"layers.{layer}.{part}"] = start.requires_grad_()

    @property
    def layers(self) -> list[int]:
        """Layers that have maps."""
        return sorted({int(name.split(".")[1]) for name in self.leaves})

    def names(self, layer: int) -> tuple[str, ...]:
        """Names of a layer's leaves."""
        return tuple(name for name in self.leaves if name.startswith(f"layers.{layer}."))

    def layer(self, layer: int) -> LayerMaps:
        """The layer's maps, differentiable in the leaves."""
        return self._layer(layer, self.leaves)

    def maps(self, leaves: dict[str, torch.Tensor]) -> dict[int, LayerMaps]:
        """Maps that belong to a copy of the leaves; float32, contiguous, on the CPU."""
        result = {}
        with torch.no_grad():
            for layer in self.layers:
                named = self._layer(layer, leaves).named().items()
                result[layer] = LayerMaps(
                    **{part: tensor.detach().cpu().contiguous() for part, tensor in named}
                )
        return result

    def snapshot(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Copies of some leaves."""
        return {name: self.leaves[name].detach().clone() for name in names}

    def load(self, leaves: dict[str, torch.Tensor]) -> None:
        """Overwrite all leaves."""
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(leaves[name])

    def _layer(self, layer: int, leaves: dict[str, torch.Tensor]) -> LayerMaps:
        parts = {name.split(".")[2]: leaves[name] for name in self.names(layer)}
        if self.whitening is not None:
            for part in ("key", "value"):
                shards = [
                    self.whitening.apply(self.whitening.name(layer, shard, part), parts[part][rows])
                    for shard, rows in enumerate(shard_rows(self._plan, layer))
                ]
                parts[part] = shards[0] if len(shards) == 1 else torch.cat(shards)
        return LayerMaps(**parts)


def shard_rows(plan: EchoPlan, layer: int) -> list[slice]:
    """Rows of a layer's maps that belong to each shard."""
    rows, first = [], 0
    for shard in range(plan.shards):
        last = first + len(shard_discarded(plan, layer, shard))
        rows.append(slice(first, last))
        first = last
    return rows


def _inverse_root(system: NormalEquations) -> torch.Tensor:
    """`T` of the system's features (see above), float32 [feature_size, feature_size]."""
    moment = system.xx
    if system.bias:
        moment = moment[:-1, :-1]
    # Features that are all zero, as of pruned heads, have no size to be relative to.
    mean = moment.diagonal().mean()
    values, vectors = torch.linalg.eigh(moment / torch.where(mean > 0, mean, 1.0))
    scale = (values.clamp(min=0) + _FLOOR).rsqrt()
    return ((vectors * scale) @ vectors.T).float()
