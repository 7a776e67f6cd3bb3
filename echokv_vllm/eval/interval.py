"""Values with 95 % intervals, by bootstrap over samples, and by exact bounds where that fails."""

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
    return _estimate(statistic(samples.mean(0)[None]), statistic(samples[chosen].mean(1)))


def grouped_bootstrap(
    groups: Sequence[torch.Tensor],
    statistic: Callable[[torch.Tensor], torch.Tensor],
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap of a function of the means of group means.

    Every group (a task, say) is resampled by itself and weighs alike, however many samples it has.

    Args:
        groups: Each [num_samples, num_columns] float64; a row is one independent sample.
        statistic: As for `bootstrap`.
        seed: Seed of the resampling.
    """
    resampled, means = _resampled_means(groups, seed)
    return _estimate(statistic(means[None]), statistic(resampled))


def grouped_mean(
    groups: Sequence[torch.Tensor], seed: int = 0, least: float = 0.0, most: float = 1.0
) -> Estimate:
    """Mean of group means, with room for what a group of equal values cannot show.

    Resampling sees no spread in a group whose values are all alike, such as a task with every
    answer right. A value other than that one has, at 97.5 % confidence, at most the probability of
    a proportion that was never seen in as many samples (Clopper and Pearson 1934; near `3 / n`, the
    rule of three), and lies at most at an end of the scale; the interval reaches at least so far.

    Args:
        groups: Each [num_samples] floats from `least` to `most`, one per independent sample.
        seed: Seed of the resampling.
        least: Lower end of the scale; -1 for differences of scores.
        most: Upper end of the scale.
    """
    columns = [group.double()[:, None] for group in groups]
    found = grouped_bootstrap(columns, lambda means: means[:, 0], seed)
    steady = [group for group in groups if bool((group == group[0]).all())]

    def room(end: float) -> float:
        distances = [(abs(float(group[0]) - end), len(group)) for group in steady]
        distances = [(distance, size) for distance, size in distances if distance > 0]
        if not distances:
            return 0.0
        # Unseen values may all be in the smallest group: each counts as if it were of its size.
        num_samples = len(distances) * min(size for _, size in distances)
        unseen = 1 - _TAIL ** (1 / num_samples)
        return unseen * max(distance for distance, _ in distances) * len(distances) / len(groups)

    low, high = found.value - room(least), found.value + room(most)
    return Estimate(found.value, max(least, min(found.low, low)), min(most, max(found.high, high)))


def share_estimate(groups: Sequence[torch.Tensor], seed: int = 0) -> Estimate | None:
    """Mean of group means of scores as a share of that of the full cache's.

    Args:
        groups: Each [num_samples, 2] float64 in 0..1: score and full cache's score.
        seed: Seed of the resampling.

    Returns:
        The share, or None where the full cache scores 0, in a resample at least: there is no share
        of nothing, and its interval has no end.
    """
    resampled, means = _resampled_means(groups, seed)
    if not bool((resampled[:, 1] > 0).all()):
        return None
    found = _estimate(means[None, 0] / means[None, 1], resampled[:, 0] / resampled[:, 1])
    # A task with the same share of its full score in every sample leaves room as in a mean.
    unlike = [group[:, 0] - found.value * group[:, 1] for group in groups]
    rest = grouped_mean(unlike, seed, least=-found.value)
    low, high = (found.value + end / float(means[1]) for end in (rest.low, rest.high))
    return Estimate(found.value, max(0.0, min(found.low, low)), max(found.high, high))


def mean_estimate(samples: torch.Tensor, seed: int = 0) -> Estimate:
    """Mean of `samples` [num_samples]."""
    return bootstrap(samples.double()[:, None], lambda means: means[:, 0], seed)


def _resampled_means(
    groups: Sequence[torch.Tensor], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of group means: [NUM_RESAMPLES, num_columns] of resamples, and [num_columns]."""
    generator = torch.Generator().manual_seed(seed)
    resampled = torch.zeros(NUM_RESAMPLES, groups[0].shape[1], dtype=torch.float64)
    means = torch.zeros(groups[0].shape[1], dtype=torch.float64)
    for samples in groups:
        # One fewer than there are: means of as many spread too little, by a factor of
        # (n - 1) / n in variance, which shows in groups of a few samples (Rao and Wu 1988).
        num_drawn = max(len(samples) - 1, 1)
        chosen = torch.randint(len(samples), (NUM_RESAMPLES, num_drawn), generator=generator)
        resampled += samples[chosen].mean(1)
        means += samples.mean(0)
    return resampled / len(groups), means / len(groups)


def _estimate(value: torch.Tensor, resampled: torch.Tensor) -> Estimate:
    """`value` [1] with the middle 95 % of `resampled` [num_resamples]."""
    tails = torch.tensor([_TAIL, 1 - _TAIL], dtype=resampled.dtype)
    low, high = resampled.quantile(tails).tolist()
    return Estimate(value.item(), low, high)
