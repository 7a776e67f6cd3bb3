"""Rows and spans against loops over tokens."""

import itertools

import pytest
import torch

from echokv_kernels.tiles import QueryTiles, Visibility, cut_blocks, cut_spans, split_queries


def start_loc(query_lens):
    ends = torch.tensor(query_lens).cumsum(0)
    return torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int()


@pytest.mark.parametrize("query_tile", [1, 4, 64])
def test_every_token_is_in_one_row_of_its_request(query_tile):
    query_lens, seq_lens = [3, 1, 0, 9, 4, 130], torch.tensor([10, 1, 5, 9, 200, 131])
    tiles = QueryTiles.build(start_loc(query_lens), seq_lens, query_tile)
    want = {}
    token = 0
    for request, query_len in enumerate(query_lens):
        for i in range(query_len):
            want[token] = (request, int(seq_lens[request]) - query_len + i)
            token += 1
    got = {}
    for row, request in enumerate(tiles.request.tolist()):
        for column in range(query_tile):
            index = int(tiles.token[row, column])
            assert want[index] == (request, int(tiles.position[row, column])), "padding included"
            if tiles.valid[row, column]:
                assert index not in got
                got[index] = (request, int(tiles.position[row, column]))
    assert got == want
    assert tiles.num_tokens == token
    assert tiles.token.shape == tiles.valid.shape == tiles.position.shape


def test_split_puts_single_tokens_apart():
    query_lens, seq_lens = [1, 70, 1, 0, 2], torch.tensor([5, 70, 300, 9, 2])
    decode, prefill = split_queries(start_loc(query_lens), seq_lens)
    assert decode.query_tile == 1 and decode.request.tolist() == [0, 2]
    assert decode.token.tolist() == [[0], [71]] and decode.position.tolist() == [[4], [299]]
    assert prefill.query_tile == 64 and prefill.request.tolist() == [1, 1, 4]
    assert int(prefill.valid.sum()) == 72
    assert decode.num_tokens == prefill.num_tokens == 74


def test_split_leaves_empty_sets_out():
    ones = split_queries(start_loc([1, 1]), torch.tensor([1, 1]))
    assert [tile.query_tile for tile in ones] == [1]
    assert split_queries(start_loc([0, 0]), torch.tensor([4, 4])) == []


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"must be \(2,\)"):
        QueryTiles.build(start_loc([1, 1]), torch.tensor([1]), 1)
    with pytest.raises(ValueError, match="query_tile is 0"):
        QueryTiles.build(start_loc([1]), torch.tensor([1]), 0)
    tiles = QueryTiles.build(start_loc([1]), torch.tensor([1]), 1)
    with pytest.raises(ValueError, match="'all'"):
        Visibility.of(tiles, "all", 1)


@pytest.mark.parametrize("mask_block", [None, 16, 48, 112])
@pytest.mark.parametrize("visible", ["causal", "lengths"])
def test_visibility_matches_loops(mask_block, visible):
    generator = torch.Generator().manual_seed(5)
    query_lens, seq_lens = [1, 7, 3], torch.tensor([1, 200, 77])
    tiles = QueryTiles.build(start_loc(query_lens), seq_lens, 4)
    lengths = torch.tensor([0, 193, 50]) if visible == "lengths" else "causal"
    mask = None
    if mask_block:
        mask = torch.rand(3, 200 // mask_block + 1, generator=generator) < 0.4
    seen = Visibility.of(tiles, lengths, 190, mask, mask_block or 1)
    spans = [(0, 64), (64, 80), (80, 144), (144, 208)]
    touched = seen.touched(spans)
    rows = torch.arange(len(tiles.request))
    for i, (start, stop) in enumerate(spans):
        got = seen.visible(rows, start, stop)
        for row, request in enumerate(tiles.request.tolist()):
            for column in range(4):
                limit = int(tiles.position[row, column]) + 1
                if visible == "lengths":
                    limit = int(lengths[request])
                want = [
                    t < min(limit, 190) and (mask is None or bool(mask[request, t // mask_block]))
                    for t in range(start, stop)
                ]
                assert got[row, column].tolist() == want
            assert bool(touched[row, i]) == bool(got[row].any())


def test_spans_cover_all_positions_once():
    for length in (1, 15, 16, 17, 500, 1100):
        for block in (16, 48, 112, 256):
            spans = cut_spans(length, 512, block)
            assert spans[0][0] == 0 and length <= spans[-1][1] < length + block
            assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
            assert all(s % block == 0 and e % block == 0 and e - s <= 512 for s, e in spans)
        for block in (64, 768, 4096):
            spans = cut_blocks(length, 512, block)
            assert spans[0][0] == 0 and spans[-1][1] == length
            assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
            assert all(s // block == (e - 1) // block and e - s <= 512 for s, e in spans)
    assert cut_spans(0, 512, 16) == [] and cut_blocks(0, 512, 64) == []
