"""Streamed least squares against the direct solution."""

import pytest
import torch

from echokv_vllm.train.normal_equations import NormalEquations, relative


def _data(num_rows=200, num_inputs=6, num_outputs=4, noise=0.1):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, num_inputs, generator=generator, dtype=torch.float64)
    weights = torch.randn(num_inputs, num_outputs, generator=generator, dtype=torch.float64)
    y = x @ weights + noise * torch.randn(
        num_rows, num_outputs, generator=generator, dtype=torch.float64
    )
    return x, y, weights


def _system(x, y, chunk=37, bias=False):
    system = NormalEquations(x.shape[1], y.shape[1], bias=bias)
    for start in range(0, len(x), chunk):
        system.add(x[start : start + chunk], y[start : start + chunk])
    return system


def test_equals_lstsq_whatever_the_chunks():
    x, y, _ = _data()
    expected = torch.linalg.lstsq(x, y).solution
    for chunk in (1, 37, 200):
        system = _system(x, y, chunk)
        assert system.num_rows == 200
        torch.testing.assert_close(system.solve(), expected, rtol=1e-10, atol=1e-12)


def test_error_equals_the_direct_residual():
    x, y, weights = _data()
    system = _system(x, y)
    for candidate in (system.solve(), weights, torch.zeros_like(weights)):
        direct = ((y - x @ candidate).square().sum() / y.square().sum()).item()
        assert system.relative_error(candidate) == pytest.approx(direct, rel=1e-10)


def test_exact_relation_has_no_error():
    x, _, weights = _data(noise=0.0)
    system = _system(x.float(), (x.float() @ weights.float()))
    assert system.relative_error(system.solve(1e-12)) < 1e-12


def test_ridge_is_relative_to_the_scale_and_number_of_rows():
    x, y, _ = _data()
    base = _system(x, y).solve(0.1)
    assert base.norm() < _system(x, y).solve().norm()
    torch.testing.assert_close(_system(1000 * x, 1000 * y).solve(0.1), base)
    torch.testing.assert_close(_system(torch.cat([x, x]), torch.cat([y, y])).solve(0.1), base)
    direct = torch.linalg.solve(
        x.T @ x + 0.1 * (x.T @ x).diagonal().mean() * torch.eye(6, dtype=torch.float64), x.T @ y
    )
    torch.testing.assert_close(base, direct)


def test_bias_is_found_and_not_shrunk():
    x, y, weights = _data(noise=0.0)
    shifted = y + torch.tensor([10.0, -20.0, 30.0, 0.0], dtype=torch.float64)
    assert _system(x, shifted).relative_error(_system(x, shifted).solve()) > 0.5
    system = _system(x, shifted, bias=True)
    solution = system.solve()
    assert solution.shape == (7, 4)
    torch.testing.assert_close(solution[:-1], weights)
    assert solution[-1].tolist() == pytest.approx([10.0, -20.0, 30.0, 0.0], abs=1e-9)
    shrunk = system.solve(100.0)
    assert shrunk[:-1].abs().max() < 0.1
    assert shrunk[-1].tolist() == pytest.approx(shifted.mean(0).tolist(), rel=0.2, abs=0.5)


def test_dependent_features_need_a_ridge():
    x, y, _ = _data()
    doubled = torch.cat([x, x], dim=1)
    with pytest.raises(ValueError, match=r"12 features of 200 tokens .* raise the ridge"):
        _system(doubled, y).solve(0.0)
    torch.testing.assert_close(
        doubled @ _system(doubled, y).solve(1e-9), x @ _system(x, y).solve(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_inputs_that_are_always_zero_get_no_weight(ridge, bias):
    """As those of a pruned head do; the others are fitted as if they were not there."""
    x, y, _ = _data()
    dead = torch.zeros_like(x)
    found = _system(torch.cat([dead, x], dim=1), y, bias=bias).solve(ridge)
    # The ridge is relative to the mean diagonal, and half of it is zero here.
    alone = _system(x, y, bias=bias).solve(ridge / 2)
    assert not found[:6].any()
    torch.testing.assert_close(found[6:], alone)

    nothing = _system(dead, y, bias=bias).solve(ridge)
    assert not nothing[:6].any()
    if bias:
        torch.testing.assert_close(nothing[-1], y.mean(0))


def test_relative_of_nothing():
    assert relative(0.0, 0.0) == 0.0 and relative(1.0, 0.0) == float("inf")
    zeros = _system(_data()[0], torch.zeros(200, 4, dtype=torch.float64))
    assert zeros.relative_error(zeros.solve()) == 0.0
