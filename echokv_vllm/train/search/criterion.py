"""A cheap cost of a set of retained heads: residual second moments in the metric of the output.

With rebuilt `k_t + e_t` and `v_t + f_t`, the output `o = sum_t p_t v_t` of a query `q` changes, to
first order and seen through the query's sensitivity `g`, by

    sum_t p_t (g . f_t)  +  sum_t p_t (g . (v_t - o)) (q . e_t) / sqrt(head_dim).

If the errors of different tokens are independent, the expected square of this is
`trace(A E[f f'])` and `trace(B E[e e'])` with, summed over sampled queries and tokens,

    A = p_t^2 g g'            B = p_t^2 (g . (v_t - o))^2 q q' / head_dim,

`q` turned into the key space of the maps. `E[f f']` and `E[e e']` of least-squares maps are Schur
complements of the heads' second moments, so that the cost of a set needs no map and no attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echokv_vllm.train.search.covariance import HeadMoments
from echokv_vllm.train.search.probe import Probe
from echokv_vllm.train.search.score import exact_scores
from echokv_vllm.train.stage1 import block_shift

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary

# Copies of a head must not make the moments singular, whatever the ridge.
_LEAST_RIDGE = 1e-7
# Directions that no query looks at keep a little weight, or the moments would lose rank there.
_FLOOR = 1e-6


def output_moments(
    probe: Probe,
    moments: HeadMoments,
    layer: int,
    rotary: Rotary,
    rotation_block: int,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's second moments, scaled so that the trace of a residual is its cost.

    Returns:
        Keys and values, [num_kv_heads * head_dim] squared, float64.
    """
    metrics = output_metrics(probe, layer, rotary, rotation_block)
    scaled = []
    for moment, metric in zip(moments.layer(layer), metrics, strict=True):
        shrink = max(ridge, _LEAST_RIDGE) * moment.diagonal().mean()
        # Where a whole layer's keys or values are zero, the ridge still is not.
        shrink = shrink.clamp_min(torch.finfo(torch.float64).tiny ** 0.25)
        moment = moment + shrink * torch.eye(len(moment)).to(moment)
        root = torch.block_diag(*_factors(metric))
        scaled.append(root.T @ moment @ root)
    return scaled[0], scaled[1]


def output_metrics(
    probe: Probe, layer: int, rotary: Rotary, rotation_block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """B for keys and A for values (see above), `[num_kv_heads, head_dim, head_dim]` float64.

    Both are means over the sampled queries.
    """
    of_layer = probe.layers[layer]
    num_heads, group, _, head_dim = of_layer.query.shape[1:]
    positions = torch.arange(probe.seen.shape[2], device=probe.offsets.device)
    shifts = block_shift(positions, probe.offsets, rotation_block)
    weights = exact_scores(probe, layer, head_dim**-0.5).softmax(-1)
    zero = torch.zeros(num_heads, head_dim, head_dim, dtype=torch.float64, device=weights.device)
    for_keys, for_values = zero, zero.clone()
    for index, shift in enumerate(shifts):
        cos, sin, block = _blocks(rotary, shift)
        rebuilt = probe.rebuilt[index].repeat(group, 1)
        value = of_layer.value[index].float()
        for head in range(num_heads):
            query = of_layer.query[index, head].flatten(0, 1).float()
            slope = of_layer.gradient[index, head].flatten(0, 1).float()
            attended = weights[index, head]
            squared = (attended * rebuilt).square()
            for_values[head] += _gram(slope, squared.sum(1))
            effect = slope @ value[head].T
            effect = effect - (effect * attended).sum(1, keepdim=True)
            per_token = squared * effect.square() / head_dim
            per_block = per_token.new_zeros(len(per_token), len(cos))
            per_block.index_add_(1, block, per_token)
            turned = rotary.turn(query[:, None], cos, sin)
            for_keys[head] += _gram(turned.flatten(0, 1), per_block.flatten())
    count = probe.rebuilt.shape[0] * probe.rebuilt.shape[1]
    return for_keys / count, for_values / count


def _blocks(rotary: Rotary, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotation of every distinct shift, and which of them each token has."""
    distinct, block = shift.unique(return_inverse=True)
    cos, sin = rotary.cos_sin(distinct)
    return cos, sin, block


def _gram(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_i weights[i] rows[i] rows[i]'` in float64."""
    return (rows.T @ (rows * weights[:, None])).double()


def _factors(metric: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factors of the heads' metrics, made positive definite."""
    floor = _FLOOR * metric.diagonal(dim1=1, dim2=2).mean()
    floor = floor.clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    eye = torch.eye(metric.shape[1]).to(metric)
    return torch.linalg.cholesky(metric + floor * eye)


class Elimination:
    """Residual moments of a layer's heads after some of them are retained.

    Args:
        matrices: Scaled moments of keys and values; see `output_moments`.
        head_dim: Size of a head's block.
    """

    def __init__(self, matrices: tuple[torch.Tensor, ...], head_dim: int) -> None:
        self._matrices = matrices
        self._head_dim = head_dim

    def cost(self) -> float:
        """Cost of rebuilding all heads that are not retained yet."""
        return sum(float(matrix.trace()) for matrix in self._matrices)

    def retain(self, head: int) -> Elimination:
        """The residual once `head` is retained as well."""
        return Elimination(
            tuple(self._without(matrix, head) for matrix in self._matrices), self._head_dim
        )

    def gain(self, head: int) -> float:
        """How much of the cost goes away once `head` is retained as well."""
        return sum(float(self._half(matrix, head).square().sum()) for matrix in self._matrices)

    def _half(self, matrix: torch.Tensor, head: int) -> torch.Tensor:
        rows = slice(head * self._head_dim, (head + 1) * self._head_dim)
        factor, info = torch.linalg.cholesky_ex(matrix[rows, rows])
        if int(info):
            raise ValueError(
                f"the features of KV head {head} are linearly dependent to working precision and "
                "the ridge does not repair it; leave ridge out, or raise it"
            )
        return torch.linalg.solve_triangular(factor, matrix[rows], upper=False)

    def _without(self, matrix: torch.Tensor, head: int) -> torch.Tensor:
        half = self._half(matrix, head)
        rest = matrix - half.T @ half
        rows = slice(head * self._head_dim, (head + 1) * self._head_dim)
        rest[rows] = 0
        rest[:, rows] = 0
        return rest
