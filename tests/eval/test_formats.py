"""Simulated cache formats on numbers worked out by hand, and their bytes."""

import pytest
import torch

from echokv_vllm.quantization import (
    CACHE_FORMATS,
    as_cached,
    bytes_per_number,
    fp8,
    int_per_token_head,
)


def test_fp8_keeps_three_bits_of_mantissa():
    """e4m3: steps of 1/8 of the power of two below, subnormal below 2^-6, at most 448."""
    given = torch.tensor([1.0, 1.06, 1.07, 17.0, 19.0, -300.0, 2.0**-9, 2.0**-11, 500.0, -1e6])
    meant = torch.tensor([1.0, 1.0, 1.125, 16.0, 20.0, -288.0, 2.0**-9, 0.0, 448.0, -448.0])
    assert torch.equal(fp8(given), meant)
    assert torch.equal(fp8(given / 64, scale=1 / 64), meant / 64)
    assert fp8(given.bfloat16()).dtype == torch.bfloat16


def test_int4_rounds_to_sixteen_levels_of_each_row():
    given = torch.tensor([[0.0, 15.0, 7.4, 7.6], [-1.0, 0.5, -0.2, 0.01]])
    meant = torch.tensor([[0.0, 15.0, 7.0, 8.0], [-1.0, 0.5, -0.2, 0.0]])
    torch.testing.assert_close(int_per_token_head(given, 4), meant, rtol=0, atol=1e-3)


def test_two_bits_have_four_levels_and_one_bit_two():
    given = torch.tensor([0.0, 3.0, 1.4, 1.6])
    assert torch.equal(int_per_token_head(given, 2), torch.tensor([0.0, 3.0, 1.0, 2.0]))
    assert torch.equal(int_per_token_head(given, 1), torch.tensor([0.0, 3.0, 0.0, 3.0]))


def test_levels_are_stored_in_float16():
    """2049 is no float16: the least number becomes 2048, and the step (3079 - 2048) / 15 ->
    68.75 (float16 steps by 1/16 there; 68.7333 -> 68.75)."""
    given = torch.tensor([2049.0, 3079.0])
    assert torch.equal(int_per_token_head(given, 4), torch.tensor([2048.0, 2048.0 + 15 * 68.75]))


def test_equal_numbers_come_back_exactly():
    given = torch.full((3, 8), 0.375)
    for bits in (1, 2, 4, 8):
        assert torch.equal(int_per_token_head(given, bits), given)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4", "int2"])
def test_each_token_and_head_is_coded_by_itself(format):
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1))
    whole = as_cached(x, format)
    assert torch.equal(as_cached(x[1:, 2:, 3:4], format), whole[1:, 2:, 3:4])
    assert not torch.equal(whole, x) and torch.equal(as_cached(x, "auto"), x)


def test_error_is_at_most_half_a_step_and_falls_with_the_bits():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    spread = x.amax(-1) - x.amin(-1)
    worst = []
    for bits in (1, 2, 4, 8):
        error = (int_per_token_head(x, bits) - x).abs().amax(-1)
        assert (error <= spread / (2**bits - 1) * 0.5 + 4e-3).all()
        worst.append(error.max().item())
    assert worst == sorted(worst, reverse=True) and worst[0] > 20 * worst[-1]


def test_bytes_with_scales():
    assert [bytes_per_number(f, 128) * 128 for f in ("auto", "fp8", "int4", "int2")] == [
        256, 128, 64 + 4, 32 + 4,
    ]  # fmt: skip
    assert bytes_per_number("int4", 32) * 32 == 16 + 4
    assert bytes_per_number("int1", 12) * 12 == 2 + 4
    assert bytes_per_number("auto", 64, itemsize=4) == 4
    assert all(bytes_per_number(format, 64) <= 2 for format in CACHE_FORMATS)


def test_gradient_goes_straight_through_and_to_the_step():
    """Three equal levels between 0 and 3: 1.25 is 1/4 of a step too high, so the error follows."""
    given = torch.tensor([0.0, 3.0, 1.25, 2.0], requires_grad=True)
    coded = int_per_token_head(given, 2)
    torch.testing.assert_close(coded, torch.tensor([0.0, 3.0, 1.0, 2.0]))
    coded[2].backward()
    # d(step) = (d(greatest) - d(least)) / 3, times the error of -1/4 of a step
    expected = torch.tensor([0.25 / 3, -0.25 / 3, 1.0, 0.0])
    torch.testing.assert_close(given.grad, expected)
    # A residual's coding: prediction plus coded error moves with the range of the error alone.
    prediction = torch.zeros(4, requires_grad=True)
    (prediction + int_per_token_head(given.detach() - prediction, 2))[2].backward()
    torch.testing.assert_close(prediction.grad, torch.tensor([-0.25 / 3, 0.25 / 3, 0.0, 0.0]))
    # Also where float16 has no such small numbers.
    prediction.grad = None
    (1e-9 * (prediction + int_per_token_head(given.detach() - prediction, 2))[2]).backward()
    assert prediction.grad[1].item() == pytest.approx(1e-9 * 0.25 / 3, rel=1e-3)


def test_unknown_formats_are_refused():
    for call in (lambda: as_cached(torch.ones(1, 4), "fp4"), lambda: bytes_per_number("int9", 4)):
        with pytest.raises(ValueError, match=r"allowed are auto, fp8, int1 to int8"):
            call()
    with pytest.raises(ValueError, match="bits=0"):
        int_per_token_head(torch.ones(1, 4), 0)
