"""Bootstrap intervals."""

import math

import pytest
import torch

from echokv_vllm.eval.interval import bootstrap, mean_estimate, score_estimate


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


@pytest.mark.parametrize("num", [3, 36])
def test_equal_scores_at_an_end_of_the_scale_leave_room(num):
    """Of 36 right answers one only knows that the true rate is above 90 %."""
    right, wrong = score_estimate(torch.ones(num)), score_estimate(torch.zeros(num))
    assert (right.value, right.high, wrong.value, wrong.low) == (1, 1, 0, 0)
    assert right.low**num == pytest.approx(0.025) and wrong.high == pytest.approx(1 - right.low)


def test_mixed_scores_use_the_bootstrap():
    found = score_estimate(torch.tensor([1.0, 0.0, 1.0, 0.5]))
    assert found.value == 0.625 and 0 <= found.low < found.value < found.high <= 1
    assert found == score_estimate(torch.tensor([1.0, 0.0, 1.0, 0.5]))
