"""Attention over exact pages and fresh tokens against dense attention in float64."""

import pytest
import torch

from echokv_kernels import attention
from echokv_kernels.attention import fresh_attention, paged_attention
from echokv_kernels.softmax import merge_attention
from echokv_kernels.tiles import QueryTiles, split_queries

# heads, G, head_dim, block_size
SHAPES = [(3, 1, 32, 16), (2, 2, 64, 48), (2, 4, 96, 112), (1, 16, 128, 80), (8, 4, 64, 16)]


def mixed_batch(kit, num_heads, head_dim, block_size, **options):
    """Prefill, decode, chunked prefill and first tokens, of very different lengths."""
    query_lens = [1, 63, 1, 17, 1, 1, 130, 1]
    context_lens = [1100, 0, block_size - 1, 500, block_size, block_size + 1, 63, 0]
    return kit.PagedBatch(query_lens, context_lens, num_heads, head_dim, block_size, **options)


def causal(request, position, token):
    return token <= position[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_mixed_batch(kit, shape):
    num_heads, group, head_dim, block_size = shape
    batch = mixed_batch(kit, num_heads, head_dim, block_size)
    query = batch.queries(num_heads * group)
    tiles = split_queries(batch.query_start_loc, batch.seq_lens)
    got = paged_attention(
        query.float(), batch.caches[0], batch.block_table, tiles, "causal", batch.scale,
        max_len=batch.max_len,
    )  # fmt: skip
    kit.assert_same(got, batch.dense(query, causal))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask_block", [16, 48, 112])
def test_page_mask_and_visible_len(kit, shape, mask_block):
    num_heads, group, head_dim, block_size = shape
    batch = mixed_batch(kit, num_heads, head_dim, block_size, seed=mask_block)
    query = batch.queries(num_heads * group)
    mask = batch.random_pages(mask_block)
    mask[4] = False  # sees nothing at all
    # Pages that do not count may be poison.
    for request in range(len(batch.query_lens)):
        for token in range(int(batch.seq_lens[request])):
            if not mask[request, token // mask_block]:
                page = batch.block_table[request, token // block_size]
                batch.caches[0][page, :, token % block_size] = float("nan")
    tiles = split_queries(batch.query_start_loc, batch.seq_lens)
    got = paged_attention(
        query.float(), batch.caches[0], batch.block_table, tiles, batch.context_lens, batch.scale,
        page_mask=mask, page_mask_block_size=mask_block, max_len=batch.max_len,
    )  # fmt: skip

    def visible(request, position, token):
        return (token < batch.context_lens[request]) & mask[request, token // mask_block]

    want = batch.dense(query, visible)
    assert bool((want[1][batch.query_start_loc[4]] == float("-inf")).all())
    kit.assert_same(got, want)


@pytest.mark.parametrize("length", ["1", "bs-1", "bs", "bs+1", "63", "500", "512", "513"])
@pytest.mark.parametrize("block_size", [16, 80, 256])
def test_odd_lengths(kit, length, block_size):
    length = {"bs-1": block_size - 1, "bs": block_size, "bs+1": block_size + 1}.get(length) or int(
        length
    )
    for query_len in {1, min(length, 40), length}:
        batch = kit.PagedBatch([query_len], [length - query_len], 2, 32, block_size)
        query = batch.queries(4, num_padding=0)
        tiles = split_queries(batch.query_start_loc, batch.seq_lens)
        got = paged_attention(
            query.float(), batch.caches[0], batch.block_table, tiles, "causal", batch.scale,
            max_len=length,
        )  # fmt: skip
        kit.assert_same(got, batch.dense(query, causal))


@pytest.mark.parametrize("query_tile", [1, 5, 64])
def test_fresh_tokens_and_merge_with_context(kit, query_tile):
    batch = mixed_batch(kit, 2, 64, 48)
    query = batch.queries(4)
    padding = torch.full((3, 2, 64), float("nan"))
    key, value = (
        torch.cat([kv[0, -n:] for kv, n in zip(kvs, batch.query_lens, strict=True)]).float()
        for kvs in (batch.key, batch.value)
    )
    tiles = [QueryTiles.build(batch.query_start_loc, batch.seq_lens, query_tile)]
    fresh = fresh_attention(
        query.float(), torch.cat((key, padding)), torch.cat((value, padding)), tiles,
        batch.query_start_loc, batch.scale,
    )  # fmt: skip

    def in_chunk(request, position, token):
        return (token <= position[:, None]) & (token >= batch.context_lens[request])

    kit.assert_same(fresh, batch.dense(query, in_chunk))
    context = paged_attention(
        query.float(), batch.caches[0], batch.block_table, tiles, batch.context_lens, batch.scale,
        max_len=batch.max_len,
    )  # fmt: skip
    kit.assert_same(merge_attention([fresh, context]), batch.dense(query, causal))


@pytest.mark.parametrize("working_set", [1, 1 << 17])
def test_result_does_not_depend_on_the_working_set(kit, monkeypatch, working_set):
    batch = mixed_batch(kit, 2, 32, 16)
    query = batch.queries(4)
    tiles = split_queries(batch.query_start_loc, batch.seq_lens, 16)
    monkeypatch.setattr(attention, "_WORKING_SET", working_set)
    got = paged_attention(
        query.float(), batch.caches[0], batch.block_table, tiles, "causal", batch.scale,
        max_len=batch.max_len,
    )  # fmt: skip
    kit.assert_same(got, batch.dense(query, causal))


def test_tokens_from_max_len_on_are_not_seen(kit):
    batch = kit.PagedBatch([1, 1], [300, 40], 1, 32, 16)
    query = batch.queries(1)
    got = paged_attention(
        query.float(), batch.caches[0], batch.block_table,
        split_queries(batch.query_start_loc, batch.seq_lens), "causal", batch.scale, max_len=100,
    )  # fmt: skip
    kit.assert_same(got, batch.dense(query, lambda r, p, t: (t <= p[:, None]) & (t < 100)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_half_precision_is_as_good_as_dense(kit, shape, dtype):
    num_heads, group, head_dim, block_size = shape
    batch = mixed_batch(kit, num_heads, head_dim, block_size, dtype=dtype)
    query = batch.queries(num_heads * group)
    tiles = split_queries(batch.query_start_loc, batch.seq_lens)
    got = paged_attention(
        query.to(dtype), batch.caches[0], batch.block_table, tiles, "causal", batch.scale,
        max_len=batch.max_len,
    )  # fmt: skip
    assert got[0].dtype == torch.float32
    kit.assert_as_precise(got, batch.dense(query, causal, dtype=dtype), batch.dense(query, causal))


def test_short_rows_do_not_read_long_contexts(kit, monkeypatch):
    """One long request among short ones: a row is stepped only through its own spans."""
    batch = kit.PagedBatch([1] * 9, [3000] + [20] * 8, 1, 32, 16)
    read = 0
    gather = attention.gather_pages

    def counting(cache, block_table, first_page, num_pages):
        nonlocal read
        read += len(block_table) * num_pages
        return gather(cache, block_table, first_page, num_pages)

    monkeypatch.setattr(attention, "gather_pages", counting)
    tiles = split_queries(batch.query_start_loc, batch.seq_lens)
    query = batch.queries(1)
    mask = batch.random_pages(16, share=1.0)
    mask[0, 1:150] = False  # sinks and a recent window
    for page_mask, most in ((None, 9 * 32 + 188), (mask, 9 * 32 + 64)):
        read = 0
        paged_attention(
            query.float(), batch.caches[0], batch.block_table, tiles, "causal", batch.scale,
            page_mask=page_mask, page_mask_block_size=16, max_len=batch.max_len,
        )  # fmt: skip
        assert 0 < read <= most


def test_wrong_shapes_are_named(kit):
    batch = kit.PagedBatch([1], [5], 2, 32, 16)
    tiles = split_queries(batch.query_start_loc, batch.seq_lens)
    for shape, message in (((1, 3, 32), "3 query heads"), ((1, 4, 64), "64 elements")):
        with pytest.raises(ValueError, match=message):
            paged_attention(
                torch.zeros(shape), batch.caches[0], batch.block_table, tiles, "causal", 1.0,
                max_len=6,
            )  # fmt: skip
