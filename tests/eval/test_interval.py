"""Bootstrap intervals."""

import math

import pytest
import torch

from echokv_vllm.eval.interval import (
    bootstrap,
    grouped_bootstrap,
    grouped_mean,
    mean_estimate,
    share_estimate,
)


def test_interval_of_a_mean_is_about_two_standard_errors():
    samples = torch.randn(400, generator=torch.Generator().manual_seed(1)).double() + 5
    found = mean_estimate(samples)
    error = 1.96 * samples.std().item() / math.sqrt(400)
    assert found.value == pytest.approx(samples.mean().item())
    assert found.low == pytest.approx(found.value - error, abs=0.15 * error)
    assert found.high == pytest.approx(found.value + error, abs=0.15 * error)


def test_statistic_sees_the_columns_of_one_resample_together():
    base = torch.randn(50, generator=torch.Generator().manual_seed(2)).double()
    pairs = torch.stack((base, base + 0.5), 1)
    found = bootstrap(pairs, lambda means: means[:, 1] - means[:, 0])
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_groups_of_few_samples_spread_as_their_mean_does():
    """Resamples of as many samples as a group of two has would have half of the variance."""
    groups = [torch.tensor([[0.0], [1.0]]).double() for _ in range(200)]
    found = grouped_bootstrap(groups, lambda means: means[:, 0])
    error = 1.96 * math.sqrt(0.5 / 2 / 200)
    assert found.high - found.low == pytest.approx(2 * error, rel=0.1)


@pytest.mark.parametrize("num", [3, 36])
def test_equal_scores_at_an_end_of_the_scale_leave_room(num):
    """Of 36 right answers one only knows that the true rate is above 90 %."""
    right, wrong = grouped_mean([torch.ones(num)]), grouped_mean([torch.zeros(num)])
    assert (right.value, right.high, wrong.value, wrong.low) == (1, 1, 0, 0)
    assert right.low**num == pytest.approx(0.025) and wrong.high == pytest.approx(1 - right.low)


def test_mixed_scores_use_the_bootstrap():
    found = grouped_mean([torch.tensor([1.0, 0.0, 1.0, 0.5])])
    assert found.value == 0.625 and 0 <= found.low < found.value < found.high <= 1
    assert found == grouped_mean([torch.tensor([1.0, 0.0, 1.0, 0.5])])


def test_equal_groups_of_a_mean_leave_room_too():
    """Ten samples of each of four tasks, all right: as sure as of forty of one task."""
    found = grouped_mean([torch.ones(10)] * 4)
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.025 ** (1 / 40))
    mixed = grouped_mean([torch.ones(10), torch.tensor([0.0, 1.0] * 50)])
    alone = grouped_bootstrap(
        [torch.ones(10, 1).double(), torch.tensor([[0.0], [1.0]] * 50).double()],
        lambda means: means[:, 0],
    )
    assert mixed.low < alone.low and mixed.high == alone.high


def test_equal_answers_may_differ_in_the_next_sample():
    found = grouped_mean([torch.zeros(99)], least=-1.0)
    assert found.value == 0 and found.high == -found.low
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 99))


def test_share_of_the_full_score():
    scores = torch.rand(300, generator=torch.Generator().manual_seed(3)).double()
    half = share_estimate([torch.stack((scores / 2, scores), 1)])
    assert half is not None and half.value == pytest.approx(0.5)
    assert 0.45 < half.low < 0.5 < half.high < 0.55
    ones = torch.ones(50, 2).double()
    whole = share_estimate([ones])
    assert whole is not None and whole.low == pytest.approx(0.025 ** (1 / 50))
    # Of one task that leaves room, and one that does not, the first shows beside the second.
    both = share_estimate([ones, torch.stack((scores / 2, scores), 1)])
    assert both is not None and both.low < both.value - 0.01


def test_there_is_no_share_of_nothing():
    assert share_estimate([torch.zeros(4, 2).double()]) is None
    rare = torch.zeros(4, 2).double()
    rare[0] = 1
    assert share_estimate([rare]) is None
