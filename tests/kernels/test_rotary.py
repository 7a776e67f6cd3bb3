"""Rotations against complex numbers in float64, and the identities the method rests on."""

import pytest
import torch

from echokv_kernels.rotary import Rotary


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (64, 64), (96, 24), (128, 128)])
def test_rotate_matches_complex_product(kit, head_dim, rotary_dim, interleaved):
    torch.manual_seed(0)
    rotary = kit.make_rotary(head_dim, rotary_dim, interleaved)
    x = torch.randn(5, 3, head_dim)
    positions = torch.tensor([0, 1, 1000, 131071, -77])
    want = kit.complex_rotate(rotary, x, positions)
    torch.testing.assert_close(rotary.rotate(x, positions).double(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations_add_up_at_long_positions(kit, interleaved):
    torch.manual_seed(1)
    rotary = kit.make_rotary(64, 48, interleaved)
    x = torch.randn(4, 2, 64)
    t0, delta = torch.tensor([0, 65536, 131008, 1048512]), torch.tensor([0, 13, 63, 40])
    both = rotary.rotate(rotary.rotate(x, delta), t0)
    torch.testing.assert_close(both, rotary.rotate(x, t0 + delta), atol=2e-6, rtol=0)
    torch.testing.assert_close(rotary.rotate(both, -t0 - delta), x, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotate_keeps_dtype_and_rounds_once(kit, dtype):
    torch.manual_seed(2)
    rotary = kit.make_rotary(32, 32)
    x = torch.randn(6, 2, 32, dtype=dtype)
    positions = torch.arange(6) * 997
    got = rotary.rotate(x, positions)
    assert got.dtype == dtype
    assert torch.equal(got, rotary.rotate(x.float(), positions).to(dtype))


def test_positions_broadcast_over_leading_axes(kit):
    torch.manual_seed(3)
    rotary = kit.make_rotary(32, 16)
    x = torch.randn(2, 5, 3, 32)
    positions = torch.arange(5)
    got = rotary.rotate(x, positions)
    assert torch.equal(got[1], rotary.rotate(x[1], positions))
    one_token = rotary.rotate(x[:, :1], positions)
    assert torch.equal(one_token[0, 4], rotary.rotate(x[0, :1], positions[4:])[0])


def test_bad_shapes_are_named(kit):
    with pytest.raises(ValueError, match="float32 vector"):
        Rotary(torch.ones(4, dtype=torch.float64), 8)
    with pytest.raises(ValueError, match="rotate 16 elements"):
        Rotary(torch.ones(8), 8)
    with pytest.raises(ValueError, match="one head of 32 elements"):
        kit.make_rotary(32, 32).rotate(torch.zeros(2, 1, 16), torch.arange(2))
