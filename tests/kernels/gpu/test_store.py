"""One launch for both groups' pages, against `write_pages` called once per group."""

import pytest
import torch

from echokv_kernels.layout import PageLayout
from echokv_kernels.store import write_pages

PAD = -1


def make_layer(kit, device, retained, discarded, sizes, head_dim, dtype, num_blocks=9):
    """Views of a layer's R and D pages in one packed pool full of NaN; None for an empty group."""
    layouts = [
        PageLayout(len(heads), head_dim, size, dtype.itemsize)
        for heads, size in zip((retained, discarded), sizes, strict=True)
        if heads
    ]
    views = kit.packed_views(layouts, num_blocks, dtype)
    pool = views[0].untyped_storage()
    moved = torch.empty(0, dtype=dtype).set_(pool).to(device)
    views = [moved.as_strided(v.shape, v.stride(), v.storage_offset()) for v in views]
    retained_cache = views.pop(0) if retained else None
    return moved, retained_cache, views.pop(0) if discarded else None


def make_keys(num_tokens, num_heads, head_dim, dtype, device, gap=16):
    """Keys and values as views of one buffer, as a fused projection leaves them."""
    width = num_heads * (head_dim + 8)
    rows = torch.randn(num_tokens, 2 * width + gap, device=device).to(dtype)
    both = rows[:, : 2 * width].view(num_tokens, 2, num_heads, head_dim + 8)[..., :head_dim]
    return both[:, 0], both[:, 1]


def make_slots(num_tokens, block_size, num_blocks, device, dtype=torch.int64):
    """Different slots in any order, some of null page 0, some padding, and a tail beyond T."""
    slots = torch.randperm(num_blocks * block_size)[: num_tokens + 5]
    slots[torch.rand(slots.shape) < 0.2] = PAD
    # The reference parks tokens to leave out at slot 0, which the null page keeps free.
    slots[slots == 0] = PAD
    return slots.to(dtype).to(device)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def compare(pool, caches, key, value, slots, heads):
    """Runs the kernel and the reference on copies of a pool; every byte must agree."""
    from echokv_kernels.gpu.store import place_heads, store_pages

    expected = pool.clone()
    for cache, group_slots, group, first in zip(caches, slots, heads, (False, True), strict=True):
        if cache is not None:
            view = expected.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            group = torch.tensor(group, device=pool.device)
            first_slot = cache.shape[2] if first else 0
            write_pages(key, value, view, group_slots, group, first_slot)
    store_pages(key, value, *caches, *slots, place_heads(*heads, pool.device))
    assert torch.equal(bits(pool), bits(expected))


@pytest.mark.parametrize("sizes", [(16, 16), (48, 80), (80, 48), (16, 48)])
@pytest.mark.parametrize("num_tokens", [1, 7, 33])
def test_both_groups_agree_with_the_reference(kit, device, sizes, num_tokens):
    torch.manual_seed(num_tokens)
    heads = ([2, 0], [1, 4, 3])
    pool, *caches = make_layer(kit, device, *heads, sizes, 32, torch.float32)
    key, value = make_keys(num_tokens, 5, 32, torch.float32, device)
    slots = [make_slots(num_tokens, size, 9, device) for size in sizes]
    compare(pool, caches, key, value, slots, heads)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dims_and_dtypes(kit, device, head_dim, dtype):
    torch.manual_seed(head_dim)
    heads = ([1], [0])
    pool, *caches = make_layer(kit, device, *heads, (16, 16), head_dim, dtype)
    key, value = make_keys(11, 2, head_dim, dtype, device)
    slots = [make_slots(11, 16, 9, device, torch.int32) for _ in range(2)]
    compare(pool, caches, key, value, slots, heads)


@pytest.mark.parametrize("heads", [([1, 0, 2], []), ([], [2, 0, 1])])
def test_layers_with_one_group(kit, device, heads):
    torch.manual_seed(3)
    pool, *caches = make_layer(kit, device, *heads, (48, 80), 64, torch.float32)
    key, value = make_keys(13, 3, 64, torch.float32, device)
    slots = [
        None if cache is None else make_slots(13, cache.shape[2], 9, device) for cache in caches
    ]
    compare(pool, caches, key, value, slots, heads)


def test_keys_are_cast_to_the_cache(kit, device):
    torch.manual_seed(4)
    heads = ([0], [1])
    pool, *caches = make_layer(kit, device, *heads, (16, 16), 32, torch.float16)
    key, value = make_keys(9, 2, 32, torch.float32, device)
    slots = [make_slots(9, 16, 9, device) for _ in range(2)]
    compare(pool, caches, key, value, slots, heads)


def test_long_steps_take_the_prefill_tile(kit, device):
    torch.manual_seed(5)
    heads = ([1], [0])
    pool, *caches = make_layer(kit, device, *heads, (48, 80), 32, torch.float32, num_blocks=40)
    key, value = make_keys(301, 2, 32, torch.float32, device)
    slots = [make_slots(301, size, 40, device) for size in (48, 80)]
    compare(pool, caches, key, value, slots, heads)


def test_left_out_tokens_touch_nothing(kit, device):
    from echokv_kernels.gpu.store import place_heads, store_pages

    pool, *caches = make_layer(kit, device, [0], [1], (16, 16), 32, torch.float32)
    before = bits(pool).clone()
    # Padding may be NaN, and its keys may not exist at all.
    key, value = (torch.full((6, 2, 32), float("nan"), device=device) for _ in range(2))
    padding = torch.full((6,), PAD, device=device)
    null_page = torch.arange(6, device=device)
    store_pages(key, value, *caches, padding, null_page, place_heads([0], [1], device))
    store_pages(key[:0], value[:0], *caches, padding, null_page, place_heads([0], [1], device))
    assert torch.equal(bits(pool), before)


@pytest.mark.gpu
def test_cache_beyond_two_to_the_31_elements(device):
    from echokv_kernels.gpu.store import place_heads, store_pages

    if device.type != "cuda":
        pytest.skip("needs 5 GB of a GPU")
    num_blocks, size, head_dim = 70_000, 16, 128
    pool = torch.zeros(
        num_blocks * 2 * 2 * size * head_dim * 4, dtype=torch.bfloat16, device=device
    )
    shape, strides = (num_blocks, 1, size, 2 * head_dim), (32_768, 4096, 256, 1)
    caches = [pool.as_strided(shape, strides, offset) for offset in (0, 4096)]
    assert pool.numel() > 2**31
    key, value = make_keys(3, 2, head_dim, torch.bfloat16, device)
    last = num_blocks * size - 1
    slots = torch.tensor([last, last - 17, 16], device=device)
    store_pages(key, value, *caches, slots, slots, place_heads([1], [0], device))
    for cache, head in zip(caches, (1, 0), strict=True):
        stored = cache[slots // size, 0, slots % size]
        assert torch.equal(stored, torch.cat((key[:, head], value[:, head]), -1))


def test_bad_arguments_are_named(kit, device):
    from echokv_kernels.gpu.store import place_heads, store_pages

    _, retained, residual = make_layer(kit, device, [0], [1], (16, 16), 32, torch.float32)
    places = place_heads([0], [1], device)
    key = torch.ones(3, 2, 32, device=device)
    slots = torch.arange(3, device=device)

    def refuse(match, *args):
        with pytest.raises(ValueError, match=match):
            store_pages(*args)

    refuse("3 heads", *[torch.ones(3, 3, 32)] * 2, retained, residual, slots, slots, places)
    refuse("two .tokens", key, key[:2], retained, residual, slots, slots, places)
    refuse("32 contiguous", *[key[..., :16]] * 2, retained, residual, slots, slots, places)
    refuse("at least 3", key, key, retained, residual, slots, slots[:2], places)
    refuse("residual_slots has dtype", key, key, retained, residual, slots, slots.float(), places)
    refuse("only one of", key, key, retained, residual, slots, None, places)
    refuse("1 heads together", key, key, retained, None, slots, None, places)
    refuse("head_places", key, key, retained, residual, slots, slots, places.long())
    with pytest.raises(ValueError, match="each once"):
        place_heads([0, 1], [1], device)
