"""Exact change of the attention output when a layer's heads are rebuilt by closed-form maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echokv_vllm.train.normal_equations import ridge_factor
from echokv_vllm.train.search.covariance import HeadAt, HeadMoments
from echokv_vllm.train.search.probe import Probe
from echokv_vllm.train.stage1 import block_shift

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary


_KEPT_LAYERS = 16
"""Layers whose turned keys stay in memory: more than a layer usually has neighbours."""


class Scorer:
    """Scores what some heads of a layer lose when they are rebuilt.

    Args:
        probe: Sampled queries.
        moments: Second moments the maps are solved from.
        rotary: Rotary embedding of the model, on the model's device.
        rotation_block: B of the key space.
        ridge: As in `TrainOptions`.
    """

    def __init__(
        self,
        probe: Probe,
        moments: HeadMoments,
        rotary: Rotary,
        rotation_block: int,
        ridge: float,
    ) -> None:
        self._probe = probe
        self._moments = moments
        self._rotary = rotary
        self._ridge = ridge
        self._scale = rotary.head_dim**-0.5
        positions = torch.arange(probe.seen.shape[2], device=probe.offsets.device)
        shift = block_shift(positions, probe.offsets, rotation_block)
        self._cos, self._sin = (part[:, None] for part in rotary.cos_sin(shift))
        self._turned: dict[int, torch.Tensor] = {}
        self._exact: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def cost(self, layer: int, heads: list[int], sources: list[HeadAt]) -> torch.Tensor:
        """Mean square of `change` over the sampled queries, a scalar."""
        return self.change(layer, heads, sources).double().square().mean()

    def change(self, layer: int, heads: list[int], sources: list[HeadAt]) -> torch.Tensor:
        """Change of the sequence's log-likelihood, to first order in the attention output.

        The square of this, added up over queries, estimates twice the KL divergence.

        Args:
            layer: The layer.
            heads: Heads that are rebuilt, for all sampled queries at once.
            sources: Heads they are rebuilt from, of this or earlier layers.

        Returns:
            [num_sequences, num_queries] float32, all rebuilt heads of a query added up.
        """
        gradient = self._probe.layers[layer].gradient[:, heads].float()
        return (self.output_error(layer, heads, sources) * gradient).sum((1, 2, 4))

    def output_error(self, layer: int, heads: list[int], sources: list[HeadAt]) -> torch.Tensor:
        """Attention output of some rebuilt heads minus their exact output.

        Returns:
            [num_sequences, len(heads), group, num_queries, head_dim] float32.
        """
        probe = self._probe.layers[layer]
        key_hat, value_hat = self._rebuild(layer, heads, sources)
        scores, output = self._exact_attention(layer)
        group, count = probe.query.shape[2:4]
        # The group's queries lie side by side: [num_sequences, heads, group * num_queries, ..]
        rebuilt = self._probe.rebuilt.repeat(1, group, 1)[:, None]
        query = probe.query[:, heads].flatten(2, 3).float()
        guessed = (query @ key_hat.transpose(2, 3)).mul_(self._scale)
        weights = torch.where(rebuilt, guessed, scores[:, heads]).softmax(-1)
        value = probe.value[:, heads].float()
        found = weights @ value + (weights * rebuilt) @ (value_hat - value)
        return (found - output[:, heads]).unflatten(2, (group, count))

    def _rebuild(
        self, layer: int, heads: list[int], sources: list[HeadAt]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (rotated as cached) and values, [num_sequences, heads, sequence_len, head_dim]."""
        targets = [(layer, head) for head in heads]
        grams = self._moments.between(sources, sources)
        products = self._moments.between(sources, targets)
        inputs = (
            torch.cat([self._block_keys(at)[:, head] for at, head in sources], -1),
            torch.cat([self._probe.layers[at].value[:, head] for at, head in sources], -1).float(),
        )
        rebuilt = []
        for gram, product, features in zip(grams, products, inputs, strict=True):
            maps = solve_maps(gram, product, self._ridge).float()
            flat = features @ maps
            rebuilt.append(flat.unflatten(-1, (len(heads), -1)).transpose(1, 2))
        return self._rotary.turn(rebuilt[0], self._cos, -self._sin), rebuilt[1]

    def _block_keys(self, layer: int) -> torch.Tensor:
        """Keys of a layer in map space; those of the last few layers are kept."""
        if layer not in self._turned:
            while len(self._turned) >= _KEPT_LAYERS:
                del self._turned[min(self._turned)]
            key = self._probe.layers[layer].key.float()
            self._turned[layer] = self._rotary.turn(key, self._cos, self._sin)
        return self._turned[layer]

    def _exact_attention(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked scores and outputs of all heads, group and queries flattened."""
        if self._exact is None or self._exact[0] != layer:
            probe = self._probe.layers[layer]
            scores = exact_scores(self._probe, layer, self._scale)
            self._exact = layer, scores, scores.softmax(-1) @ probe.value.float()
        return self._exact[1:]


def exact_scores(probe: Probe, layer: int, scale: float) -> torch.Tensor:
    """Scores of the full cache, minus infinity where a query does not look.

    Returns:
        [num_sequences, num_kv_heads, group * num_queries, sequence_len] float32.
    """
    query, key = probe.layers[layer].query.float(), probe.layers[layer].key.float()
    scores = (query.flatten(2, 3) @ key.transpose(2, 3)).mul_(scale)
    hidden = ~probe.seen.repeat(1, query.shape[2], 1)[:, None]
    return scores.masked_fill_(hidden, -torch.inf)


def solve_maps(gram: torch.Tensor, product: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge solution as in `NormalEquations.solve`, from mean products.

    Args:
        gram: [feature_size, feature_size] float64.
        product: [feature_size, num_outputs] float64.
        ridge: Relative to the mean of the diagonal.

    Returns:
        [feature_size, num_outputs] float64; zero rows for features that are always zero.

    Raises:
        ValueError: If the system is singular to working precision.
    """
    factor = ridge_factor(gram, ridge, len(gram))
    if factor is None:
        raise ValueError(
            f"{len(gram)} features are linearly dependent and ridge={ridge} does not repair it; "
            "raise the ridge or use more tokens"
        )
    return torch.cholesky_solve(product, factor)
