"""How prompt chunks over compressed context are cut into rounds."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from echokv_vllm.worker.gpu.prefill import TILE, build_prefill, lay_out_rounds


def check(requests: list[tuple[int, int, int]], num_tiles: int) -> None:
    """Every position of every request is in exactly one segment, chunks in one piece."""
    rounds = lay_out_rounds(requests, num_tiles)
    seen = {request: [] for request, _, _ in requests}
    for layout in rounds:
        assert layout.num_tiles <= num_tiles
        numbers = [segment.request for segment in layout.segments]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        free = 0
        for segment in layout.segments:
            assert segment.first_tile == free and segment.start % TILE == 0
            free += segment.num_tiles
            if segment.start < segment.stop:
                seen[segment.request].append((segment.start, segment.stop, layout.is_chunk))
    for request, context, chunk in requests:
        spans = sorted(seen[request])
        assert [span for span in spans if span[2]] == [
            (context // TILE * TILE, context + chunk, True)
        ]
        assert spans[0][0] == 0 and spans[-1][1] == context + chunk
        assert all(one[1] == two[0] for one, two in itertools.pairwise(spans))
    order = [layout.is_chunk for layout in rounds]
    assert order == sorted(order, reverse=True), "chunk rounds come first"


def test_random_batches() -> None:
    source = random.Random(0)
    for _ in range(300):
        count = source.randint(1, 9)
        requests = [
            (7 + i, source.choice((0, 0, 1, 127, 128, 129, source.randint(0, 5000))), n)
            for i, n in enumerate(source.randint(1, 700) for _ in range(count))
        ]
        check(requests, source.choice((8, 9, 16, 64)))


def test_a_long_context_takes_several_rounds() -> None:
    rounds = lay_out_rounds([(0, 131072, 2048)], 128)
    assert [layout.is_chunk for layout in rounds] == [True] + [False] * 8


def test_a_chunk_that_does_not_fit_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="longer than its workspace"):
        lay_out_rounds([(0, 0, 9 * TILE)], 8)


def test_device_arrays() -> None:
    query_start = np.array([0, 1, 2, 302, 310])
    host_seq_lens = np.array([50, 60, 300, 1008])
    seq_lens = torch.tensor(host_seq_lens, dtype=torch.int32)
    compressed = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    step = build_prefill(
        2, query_start, host_seq_lens, torch.tensor(query_start, dtype=torch.int32), seq_lens,
        compressed, 8, all_full=False,
    )  # fmt: skip
    assert (step.first_request, step.first_token, step.num_tokens) == (2, 2, 308)
    assert step.residual_lens.tolist() == [300, 0]
    assert step.seq_lens.tolist() == [300, 1008]
    assert step.query_start_loc.tolist() == [0, 300, 308]
    assert step.token_request.tolist() == [2] * 300 + [3] * 8
    chunk, context = step.rounds
    assert chunk.is_chunk and chunk.lens.tolist() == [0, 1008 - 896]
    assert chunk.tile_request.tolist() == [2, 2, 2, 3]
    assert chunk.tile_start.tolist() == [0, 128, 256, 896]
    assert chunk.table[0].tolist() == [0, 1, 2] and chunk.table[1][0] == 3
    assert chunk.query_start_loc.tolist() == [0, 300, 308]
    assert not context.is_chunk and context.lens.tolist() == [896]
    assert context.tile_request.tolist() == [3] * 7
    assert (context.first_token, context.num_tokens) == (300, 8)
    assert context.max_query_len == 8 and context.query_start_loc.tolist() == [0, 8]


def test_a_full_step_has_no_rounds() -> None:
    query_start, seq_lens = np.array([0, 1, 301]), torch.tensor([50, 300], dtype=torch.int32)
    step = build_prefill(
        1, query_start, seq_lens.numpy(), torch.tensor(query_start, dtype=torch.int32), seq_lens,
        torch.zeros(2, dtype=torch.int32), 8, all_full=True,
    )  # fmt: skip
    assert step.rounds == [] and step.residual_lens.tolist() == [300]
    assert step.token_request.tolist() == [1] * 300
