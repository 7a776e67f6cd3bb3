"""Writes, stamps and exactness, against loops and against a model of the page pool."""

import random

import pytest
import torch

from echokv_kernels.layout import PageLayout
from echokv_kernels.store import exact_pages, gather_pages, stamp_owners, write_pages

PAD = -1


def bits(tensor):
    return tensor.clone().view(torch.int32)


@pytest.mark.parametrize("block_size", [16, 48, 112])
@pytest.mark.parametrize("heads", [None, [2, 0]])
def test_write_touches_the_named_slots_only(kit, block_size, heads):
    torch.manual_seed(0)
    num_heads = 3 if heads is None else len(heads)
    layouts = [PageLayout(num_heads, 32, block_size, 4)] * 2
    first, cache = kit.packed_views(layouts, 6, torch.float32)
    before, neighbour = bits(cache), bits(first)
    key, value = torch.randn(7, 3, 32), torch.randn(7, 3, 32)
    slots = [block_size - 1, 3 * block_size, PAD, 5 * block_size + 7, 2, PAD, block_size, 99]
    write_pages(
        key, value, cache, torch.tensor(slots), None if heads is None else torch.tensor(heads)
    )
    for token, slot in enumerate(slots[:7]):
        if slot == PAD:
            continue
        kept = list(range(3)) if heads is None else heads
        at = cache[slot // block_size, :, slot % block_size]
        assert torch.equal(at, torch.cat((key[token, kept], value[token, kept]), -1))
        at.view(torch.int32).copy_(before[slot // block_size, :, slot % block_size])
    assert torch.equal(bits(cache), before), "a slot that was not named changed"
    assert torch.equal(bits(first), neighbour), "another layer's page changed"


def test_null_page_keeps_its_bytes(kit):
    (cache,) = kit.packed_views([PageLayout(2, 32, 16, 2)], 4, torch.bfloat16)
    cache[0] = 7.0
    key = torch.randn(4, 2, 32)
    write_pages(key, key, cache, torch.tensor([0, 15, PAD, 16]), first_slot=16)
    assert bool((cache[0] == 7.0).all())
    assert torch.equal(cache[1, :, 0, :32], key[3].bfloat16())
    assert bool(cache[1, :, 1:].isnan().all()) and bool(cache[2:].isnan().all())


def test_only_padding_writes_nothing(kit):
    (cache,) = kit.packed_views([PageLayout(1, 32, 16, 4)], 2, torch.float32)
    before = bits(cache)
    write_pages(torch.ones(3, 1, 32), torch.ones(3, 1, 32), cache, torch.full((5,), PAD))
    assert torch.equal(bits(cache), before)


def test_wrong_heads_are_named(kit):
    (cache,) = kit.packed_views([PageLayout(1, 32, 16, 4)], 2, torch.float32)
    with pytest.raises(ValueError, match="2 heads of 64"):
        write_pages(torch.ones(1, 2, 32), torch.ones(1, 2, 32), cache, torch.tensor([16]))


def test_gather_repeats_the_last_column(kit):
    (cache,) = kit.packed_views([PageLayout(3, 32, 16, 4)], 5, torch.float32)
    cache.copy_(torch.randn(cache.shape))
    table = torch.tensor([[4, 2], [1, 3]], dtype=torch.int32)
    pages = gather_pages(cache, table, 1, 2, torch.tensor([2, 0]))
    assert torch.equal(pages[0, 0], cache[2][[2, 0]]) and torch.equal(pages[1, 1], cache[3][[2, 0]])
    assert torch.equal(gather_pages(cache, table, 0, 1)[1, 0], cache[1])


RETAINED, RESIDUAL = 48, 80


def slots_of(blocks, block_size, positions):
    return torch.tensor([blocks[p // block_size] * block_size + p % block_size for p in positions])


def exact(owner, retained, residual):
    table = exact_pages(
        owner, torch.tensor([retained]), torch.tensor([residual]), RETAINED, RESIDUAL
    )
    return table[0].tolist()


def stamp(owner, retained, residual, positions):
    stamp_owners(
        owner,
        slots_of(retained, RETAINED, positions),
        slots_of(residual, RESIDUAL, positions),
        RETAINED,
        RESIDUAL,
    )


def test_written_pages_are_exact_in_one_step_or_many():
    retained, residual = [5, 9, 3, 7], [8, 2, 4]
    at_once = torch.full((12,), -1)
    stamp(at_once, retained, residual, range(170))
    one_by_one = torch.full((12,), -1)
    for position in range(170):
        stamp(one_by_one, retained, residual, [position])
    assert torch.equal(at_once, one_by_one)
    assert exact(at_once, retained, residual) == [True, True, True]
    assert at_once[8] == 5 * RETAINED and at_once[2] == 9 * RETAINED + 32


def test_page_reused_for_retained_heads_is_stale():
    owner = torch.full((12,), -1)
    stamp(owner, [5, 9, 3, 7], [8, 2, 4], range(170))
    stamp(owner, [2], [0], range(10))
    assert exact(owner, [5, 9, 3, 7], [8, 2, 4]) == [True, False, True]


def test_page_reused_by_another_request_is_stale_for_the_first_only():
    owner = torch.full((12,), -1)
    stamp(owner, [5, 9], [8], range(80))
    stamp(owner, [6, 1], [8], range(60))
    assert exact(owner, [5, 9], [8]) == [False]
    assert exact(owner, [6, 1], [8]) == [True]


def test_page_back_in_the_same_request_at_another_position_is_stale_at_the_old_one():
    owner = torch.full((12,), -1)
    stamp(owner, [5, 9, 3, 7, 10], [8, 2], range(160))
    stamp(owner, [5, 9, 3, 7, 10], [8, 2, 8], range(160, 200))
    assert exact(owner, [5, 9, 3, 7, 10], [8, 2, 8]) == [False, True, True]


def test_null_page_is_never_exact():
    owner = torch.full((12,), -1)
    stamp(owner, [5, 9, 3, 7], [0, 2, 0], range(170))
    assert exact(owner, [5, 9, 3, 7], [0, 2, 0]) == [False, True, False]
    # A row of zeros is what a captured graph warms up with.
    assert exact(owner, [0, 0, 0, 0], [0, 0, 0]) == [False] * 3
    assert owner[0] == -1
    assert exact(torch.zeros(12, dtype=torch.int64), [0, 0], [0]) == [False]


def test_padding_stamps_nothing():
    owner = torch.arange(12) * 100 - 1
    before = owner.clone()
    pad = torch.full((6,), PAD)
    stamp_owners(owner, pad, pad, RETAINED, RESIDUAL)
    assert torch.equal(owner, before)
    # A warm-up step with zeroed block tables but real slots stays inside the null page.
    stamp_owners(owner, torch.arange(6), torch.full((6,), RESIDUAL), RETAINED, RESIDUAL)
    assert torch.equal(owner, before)


def test_padded_slots_between_real_ones_do_not_count():
    owner = torch.full((12,), -1)
    retained = torch.tensor([5 * RETAINED, PAD, 5 * RETAINED + 1])
    residual = torch.tensor([8 * RESIDUAL, 2 * RESIDUAL, 8 * RESIDUAL + 1])
    stamp_owners(owner, retained, residual, RETAINED, RESIDUAL)
    assert (owner >= 0).nonzero().flatten().tolist() == [8]
    with pytest.raises(ValueError, match="3 retained and 2 residual"):
        stamp_owners(owner, retained, residual[:2], RETAINED, RESIDUAL)


def test_random_pool_never_accepts_foreign_pages():
    """Requests come, grow, lose pages and go; tables keep stale entries, as vLLM's workers do."""
    dice = random.Random(7)
    num_blocks = 40
    owner = torch.full((num_blocks,), -1)
    content = {}  # residual page -> (request, page index) whose tokens it holds
    free = list(range(1, num_blocks))
    live = {}
    accepted = rejected = 0
    for step in range(400):
        if len(live) < 4 and len(free) > 6:
            live[step] = {"len": 0, "retained": [], "residual": [], "held": set()}
        dice.shuffle(free)
        for name in list(live):
            request = live[name]
            new = dice.choice([1, 1, 1, 30, 100])
            end = request["len"] + new
            need = -(-end // RETAINED) - len(request["retained"])
            need_residual = -(-end // RESIDUAL) - len(request["residual"])
            if need + need_residual > len(free) or end > 500:
                free += request["retained"] + [request["residual"][i] for i in request["held"]]
                del live[name]
                continue
            request["retained"] += [free.pop() for _ in range(need)]
            for _ in range(need_residual):
                keep = dice.random() < 0.7
                if keep:
                    request["held"].add(len(request["residual"]))
                request["residual"].append(free.pop() if keep else 0)
            positions = range(request["len"], end)
            stamp(owner, request["retained"], request["residual"], positions)
            for position in positions:
                content.pop(request["retained"][position // RETAINED], None)
                page = request["residual"][position // RESIDUAL]
                if page:
                    content[page] = (name, position // RESIDUAL)
            request["len"] = end
            complete = [i for i in request["held"] if (i + 1) * RESIDUAL <= end]
            if complete and dice.random() < 0.4:
                dropped = dice.choice(complete)
                request["held"].discard(dropped)
                free.append(request["residual"][dropped])
        for name, request in live.items():
            if not request["residual"]:
                continue
            verdict = exact(owner, request["retained"], request["residual"])
            for i, page in enumerate(request["residual"]):
                right = content.get(page) == (name, i)
                assert not verdict[i] or right, "accepted a page with foreign content"
                assert verdict[i] or i not in request["held"], "rejected a page it still holds"
                accepted += verdict[i]
                rejected += page != 0 and not verdict[i]
    assert accepted > 500 and rejected > 50, (accepted, rejected)
