"""Bytes against real tensors and the documented example; block sizes against the design's table."""

import math

import pytest
import torch

from echokv_kernels.layout import PageLayout, PlanLayout, solve_block_sizes


def test_page_bytes_are_those_of_the_tensor(kit):
    for dtype in (torch.float32, torch.bfloat16):
        layout = PageLayout(3, 96, 48, dtype.itemsize)
        (view,) = kit.packed_views([layout], 5, dtype)
        assert view.shape == layout.view_shape(5) and not view.is_contiguous()
        assert view[0].numel() * view.element_size() == layout.page_bytes
        assert view[0, :, 0].numel() * view.element_size() == layout.token_bytes
        assert view[0, 0, 0].numel() * view.element_size() == layout.bytes_per_slot


def test_documented_example():
    plan = PlanLayout((3,) * 32, num_kv_heads=8, head_dim=128, itemsize=2)
    assert (plan.retained_slots, plan.residual_slots) == (96, 160)
    sizes = solve_block_sizes(plan.retained_slots, plan.residual_slots)
    assert (sizes.retained, sizes.residual, sizes.hit_granularity) == (80, 48, 240)
    retained = PageLayout(3, 128, sizes.retained, 2)
    residual = PageLayout(5, 128, sizes.residual, 2)
    assert retained.bytes_per_slot == 512
    assert retained.page_bytes == residual.page_bytes == 122_880
    view = torch.empty(retained.view_shape(1), dtype=torch.bfloat16)
    assert view[0, 1, 5].storage_offset() * 2 == 43_520
    assert 32 * retained.page_bytes == 3_932_160


def test_plan_bytes_add_up():
    anchored = PlanLayout((8, 1, 1, 1) * 2, num_kv_heads=8, head_dim=64, itemsize=2)
    assert anchored.bytes_per_slot == 256
    assert anchored.retained_bytes_per_token == 22 * 256
    assert anchored.residual_bytes_per_token == 42 * 256
    assert anchored.full_bytes_per_token == 64 * 256
    assert anchored.ratio == pytest.approx(0.34375)


# S, m, bsR, bsD, padR, padD in percent, lcm; 32 layers of 8 heads.
TABLE = [
    (2, 0, 16, 16, 0, 0, 16),
    (2, 2, 48, 80, 0, 0, 240),
    (2, 4, 16, 48, 0, 0, 48),
    (4, 0, 48, 16, 0, 0, 48),
    (4, 1, 32, 16, 0, 4.5, 32),
    (4, 2, 64, 48, 0, 3.6, 192),
    (4, 3, 16, 16, 0, 11.8, 16),
    (4, 4, 48, 80, 0, 0, 240),
    (8, 1, 112, 32, 0, 6.7, 224),
    (8, 2, 32, 16, 0, 4.5, 32),
]


@pytest.mark.parametrize("row", TABLE)
def test_block_size_table(row):
    group, retained_heads, retained, residual, pad_retained, pad_residual, lcm = row
    per_layer = ((8,) + (retained_heads,) * (group - 1)) * (32 // group)
    plan = PlanLayout(per_layer, num_kv_heads=8, head_dim=128, itemsize=2)
    sizes = solve_block_sizes(plan.retained_slots, plan.residual_slots)
    assert (sizes.retained, sizes.residual, sizes.hit_granularity) == (retained, residual, lcm)
    assert round(100 * sizes.retained_padding, 1) == pad_retained
    assert round(100 * sizes.residual_padding, 1) == pad_residual


def test_local_half_needs_no_padding():
    sizes = solve_block_sizes(128, 128)
    assert (sizes.retained, sizes.residual) == (16, 16)
    assert sizes.retained_padding == sizes.residual_padding == 0


@pytest.mark.parametrize(("retained", "residual"), [(1, 7), (96, 160), (1, 255), (57, 199)])
def test_sizes_respect_the_caps(retained, residual):
    sizes = solve_block_sizes(retained, residual, granularity=32, max_block=128, lcm_cap=192)
    assert sizes.retained % 32 == sizes.residual % 32 == 0
    assert max(sizes.retained, sizes.residual) <= 128
    assert math.lcm(sizes.retained, sizes.residual) <= 192
    assert min(sizes.retained_padding, sizes.residual_padding) == 0


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="residual_bits is 2"):
        PageLayout(1, 64, 16, 2, residual_bits=2)
    with pytest.raises(ValueError, match="residual_bits is 2"):
        PlanLayout((1,), 8, 64, 2, residual_bits=2)
    with pytest.raises(ValueError, match="block_size is 0"):
        PageLayout(1, 64, 0, 2)
    with pytest.raises(ValueError, match="layer 1 retains 9"):
        PlanLayout((8, 9), 8, 64, 2)
    with pytest.raises(ValueError, match="residual_slots is 0"):
        solve_block_sizes(8, 0)
    with pytest.raises(ValueError, match="no multiple of 16"):
        solve_block_sizes(8, 8, lcm_cap=8)
