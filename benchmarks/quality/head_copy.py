"""Nearest-head sharing: a discarded head is a retained head of its layer, times a number."""

from __future__ import annotations

from itertools import combinations

import torch
from moments import Moments

from echokv_vllm.checkpoint import EchoCheckpoint, LayerMaps
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.plan import EchoPlan, LayerPlan, Source


def copy_checkpoint(
    moments: Moments, fingerprint: ModelFingerprint, num_retained: int, scaled: bool = True
) -> EchoCheckpoint:
    """The copies of least error as maps of a plan; keys and values choose their heads apart.

    Every layer retains the `num_retained` heads from which the others are copied with the least sum
    of relative errors. Copying a key does not depend on its rotation.

    Args:
        moments: Of the model.
        fingerprint: Of the model.
        num_retained: Heads per layer.
        scaled: Multiply by the best factor; else copy as it is.
    """
    layers, maps = [], {}
    all_heads = set(range(moments.num_kv_heads))
    for layer in range(moments.num_layers):
        tables = [
            _pairs(moment[layer], moments.num_kv_heads, scaled)
            for moment in (moments.key, moments.value)
        ]
        retained = min(
            combinations(range(moments.num_kv_heads), num_retained),
            key=lambda kept: sum(
                errors[sorted(all_heads - set(kept))][:, list(kept)].amin(1).sum().item()
                for errors, _ in tables
            ),
        )
        lost = sorted(all_heads - set(retained))
        layers.append(LayerPlan(retained, (Source(layer, retained),) if lost else ()))
        if lost:
            parts = [_maps(table, lost, retained, moments.head_dim) for table in tables]
            maps[layer] = LayerMaps(*parts)
    plan = EchoPlan(f"copy-{num_retained}", moments.num_kv_heads, tuple(layers))
    return EchoCheckpoint(plan, 0, maps, fingerprint)


def _pairs(moment: torch.Tensor, num_heads: int, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative error and factor, [head, copied head], of one head as a copy of another."""
    blocks = moment.unflatten(0, (num_heads, -1)).unflatten(2, (num_heads, -1))
    products = blocks.diagonal(dim1=1, dim2=3).sum(-1).cpu()
    squares = products.diagonal()
    factor = products / squares if scaled else torch.ones_like(products)
    error = squares[:, None] - 2 * factor * products + factor**2 * squares
    return error / squares[:, None], factor


def _maps(
    table: tuple[torch.Tensor, torch.Tensor],
    lost: list[int],
    retained: tuple[int, ...],
    head_dim: int,
) -> torch.Tensor:
    """[num_discarded, num_retained * head_dim, head_dim]"""
    errors, factors = table
    weights = torch.zeros(len(lost), len(retained), head_dim, head_dim)
    for row, head in enumerate(lost):
        place = int(errors[head, list(retained)].argmin())
        factor = factors[head, retained[place]].item()
        weights[row, place] = factor * torch.eye(head_dim)
    return weights.flatten(1, 2)
