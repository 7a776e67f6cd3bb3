"""Values with 95 % intervals, by bootstrap over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

NUM_RESAMPLES = 4000
_TAIL = 0.025


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(
    samples: torch.Tensor, statistic: Callable[[torch.Tensor], torch.Tensor], seed: int = 0
) -> Estimate:
    """Percentile bootstrap of a function of column means.

    Args:
        samples: [num_samples, num_columns] float64; a row is one independent sample.
        statistic: Maps column means [n, num_columns] to [n] values.
        seed: Seed of the resampling.
    """
    num_samples = len(samples)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(num_samples, (NUM_RESAMPLES, num_samples), generator=generator)
    values = statistic(samples[chosen].mean(1))
    low, high = values.quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=values.dtype)).tolist()
    return Estimate(statistic(samples.mean(0)[None]).item(), low, high)


def grouped_bootstrap(
    groups: Sequence[torch.Tensor],
    statistic: Callable[[torch.Tensor], torch.Tensor],
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap of a function of the means of group means.

    Every group (a task, say) is resampled by itself and weighs alike, however many samples it has.

    Args:
        groups: Each [num_samples, num_columns] float64.
        statistic: As for `bootstrap`.
        seed: Seed of the resampling.
    """
    generator = torch.Generator().manual_seed(seed)
    resampled = torch.zeros(NUM_RESAMPLES, groups[0].shape[1], dtype=torch.float64)
    means = torch.zeros(groups[0].shape[1], dtype=torch.float64)
    for samples in groups:
        chosen = torch.randint(len(samples), (NUM_RESAMPLES, len(samples)), generator=generator)
        resampled += samples[chosen].mean(1) / len(groups)
        means += samples.mean(0) / len(groups)
    values = statistic(resampled)
    low, high = values.quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=values.dtype)).tolist()
    return Estimate(statistic(means[None]).item(), low, high)


def mean_estimate(samples: torch.Tensor, seed: int = 0) -> Estimate:
    """Mean of `samples` [num_samples]."""
    return bootstrap(samples.double()[:, None], lambda means: means[:, 0], seed)


def score_estimate(scores: torch.Tensor, seed: int = 0) -> Estimate:
    """Mean of scores in 0..1, [num_samples].

    When all samples score alike at an end of the scale, resampling sees no spread; the interval
    then is the exact one of a proportion (Clopper and Pearson).
    """
    estimate = mean_estimate(scores, seed)
    if bool((scores == 1).all()):
        return Estimate(1.0, _TAIL ** (1 / len(scores)), 1.0)
    if bool((scores == 0).all()):
        return Estimate(0.0, 0.0, 1 - _TAIL ** (1 / len(scores)))
    return estimate
