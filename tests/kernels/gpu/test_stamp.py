"""Stamps in one launch, against the reference."""

import pytest
import torch

from echokv_kernels.store import exact_pages
from echokv_kernels.store import stamp_owners as stamp_reference

PAD = -1


def token_slots(blocks, block_size, positions):
    return blocks[positions // block_size] * block_size + positions % block_size


def compare(owner, retained, residual, sizes):
    from echokv_kernels.gpu.stamp import stamp_owners

    expected = owner.clone()
    stamp_reference(expected, retained, residual, *sizes)
    stamp_owners(owner, retained, residual, *sizes)
    assert torch.equal(owner, expected)


@pytest.mark.parametrize("sizes", [(16, 16), (48, 80), (80, 48), (16, 48)])
@pytest.mark.parametrize("num_tokens", [1, 15, 256, 700])
def test_steps_agree_with_the_reference(device, sizes, num_tokens):
    torch.manual_seed(num_tokens)
    owner = torch.randint(-1, 5000, (160,), device=device)
    owner[0] = -1
    for start in (0, 5, 160):
        ids = (torch.randperm(159) + 1).to(device)
        positions = torch.arange(start, start + num_tokens, device=device)
        retained = token_slots(ids[:80], sizes[0], positions)
        residual_ids = ids[80:].clone()
        residual_ids[torch.rand(residual_ids.shape, device=device) < 0.3] = 0
        residual = token_slots(residual_ids, sizes[1], positions)
        padding = torch.rand(num_tokens, device=device) < 0.1
        retained[padding], residual[padding] = PAD, PAD
        compare(owner, retained.int(), residual, sizes)


def test_stamped_pages_are_exact(device):
    from echokv_kernels.gpu.stamp import stamp_owners

    sizes = (48, 80)
    owner = torch.full((12,), -1, device=device)
    retained = torch.tensor([5, 9, 3, 7], device=device)
    residual = torch.tensor([8, 0, 4], device=device)
    positions = torch.arange(170, device=device)
    slots = token_slots(retained, 48, positions), token_slots(residual, 80, positions)
    stamp_owners(owner, *slots, *sizes)
    tables = retained[None].int(), residual[None].int()
    assert exact_pages(owner, *tables, *sizes).tolist() == [[True, False, True]]
    # The third R page goes to somebody's residual page and back.
    stamp_owners(owner, torch.tensor([8 * 48 + 3], device=device), slots[1][:1] * 0, *sizes)
    assert exact_pages(owner, *tables, *sizes).tolist() == [[False, False, True]]


def test_padding_and_null_pages_stamp_nothing(device):
    from echokv_kernels.gpu.stamp import stamp_owners

    owner = torch.arange(12, device=device) * 100 - 1
    before = owner.clone()
    pad = torch.full((6,), PAD, device=device)
    first = torch.arange(6, device=device)
    page = torch.full((6,), 80, device=device)
    for retained, residual in ((pad, pad), (pad, page), (first, page), (pad[:0], pad[:0])):
        stamp_owners(owner, retained, residual, 48, 80)
        assert torch.equal(owner, before)


def test_bad_arguments_are_named(device):
    from echokv_kernels.gpu.stamp import stamp_owners

    owner = torch.full((4,), -1, device=device)
    slots = torch.arange(6, device=device)
    with pytest.raises(ValueError, match="one slot of each kind"):
        stamp_owners(owner, slots, slots[:2], 16, 16)
    with pytest.raises(ValueError, match="retained_slots has dtype"):
        stamp_owners(owner, slots.float(), slots, 16, 16)
    with pytest.raises(ValueError, match="residual_slots has dtype"):
        stamp_owners(owner, slots[:3], slots[::2], 16, 16)
    with pytest.raises(ValueError, match="owner has dtype"):
        stamp_owners(owner.int(), slots, slots, 16, 16)
