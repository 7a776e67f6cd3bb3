"""Echoed decode against its parts in PyTorch: absorbed context, exact part, current token."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from decode_scene import Scene

DTYPES = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float16]}

VARIANTS = {
    "plain": {},
    "one of many": {"group": 1, "num_echoed": 1, "sources": ((0, [2]),)},
    "wide group": {"group": 16, "head_dim": 64, "block_size": 48, "residual_block_size": 80},
    "group beyond a tile": {"group": 24, "num_echoed": 1, "context_lens": (300, 63, 15, 170, 0)},
    "group of 3": {"group": 3, "block_size": 80, "num_echoed": 3},
    "layers": {"sources": ((1, None), (0, [2, 0])), "head_dim": 64, "block_size": 80},
    "anchor only": {"sources": ((1, None),), "group": 4, "bias": False},
    "partial": {"head_dim": 96, "rotary_dim": 24, "block_size": 112, "residual_block_size": 16},
    "interleaved": {"interleaved": True, "group": 4, "head_dim": 128, "bias": False},
    "wide head": {"head_dim": 256, "num_retained": 1, "num_echoed": 1, "group": 4},
    "many sources": {
        "sources": ((1, None), (0, None)), "head_dim": 128, "num_echoed": 4, "group": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("rotation_block", [0, 16, 64, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_its_parts(kit, device, variant, rotation_block):
    for dtype in DTYPES[device.type]:
        Scene(kit, device, rotation_block, dtype=dtype, **VARIANTS[variant]).check()


UNROTATED = {
    **{
        name: VARIANTS[name]
        for name in ("plain", "group beyond a tile", "group of 3", "layers", "partial")
    },
    "anchor only": {"sources": ((1, None),), "group": 4, "bias": False, "num_echoed": 4},
    "interleaved": {"interleaved": True, "group": 4, "head_dim": 64, "num_echoed": 1},
    "wide head": {**VARIANTS["wide head"], "chunk_len": 256},
    "several tiles": {"chunk_len": 256, "num_programs": 1, "context_lens": (600, 300, 257)},
}


@pytest.mark.parametrize("variant", UNROTATED)
def test_unrotated_matches_its_parts(kit, device, variant):
    for dtype in DTYPES[device.type]:
        sizes = {"context_lens": (290, 63, 15, 130, 1, 0), **UNROTATED[variant]}
        Scene(kit, device, 1, dtype=dtype, **sizes).check()


@pytest.mark.parametrize("length", [1, 127, 128, 129, 385])
def test_unrotated_odd_lengths(kit, device, length):
    for dtype in DTYPES[device.type]:
        Scene(kit, device, 1, context_lens=(length, length - 1), full=(), dtype=dtype).check()


@pytest.mark.parametrize("rotation_block", [0, 48, 64, 256])
@pytest.mark.parametrize(
    "variant", ["plain", "group beyond a tile", "layers", "partial", "many sources"]
)
def test_two_loops(kit, device, variant, rotation_block):
    """As wide features take them: keys, then values; short tiles by half the warps."""
    for dtype in DTYPES[device.type]:
        Scene(
            kit, device, rotation_block, dtype=dtype, fused_bytes=0, **VARIANTS[variant]
        ).check()  # fmt: skip


@pytest.mark.parametrize("rotation_block", [48, 112, 768])
def test_blocks_unrelated_to_pages_and_chunks(kit, device, rotation_block):
    for dtype in DTYPES[device.type]:
        Scene(
            kit, device, rotation_block, dtype=dtype,
            context_lens=(1100, 47, 48, 49, 700),
        ).check()  # fmt: skip


@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 127, 128, 129, 255, 500, 512])
def test_odd_lengths(kit, device, length):
    for dtype in DTYPES[device.type]:
        Scene(kit, device, context_lens=(length, length - 1), full=(), dtype=dtype).check()


@pytest.mark.gpu
def test_captured_beside_other_work(kit, device):
    """On a stream of its own in a graph, as a layer runs it, layer after layer."""
    if device.type != "cuda":
        pytest.skip("captures a CUDA graph")
    scene = Scene(kit, device, 256, head_dim=128, group=4, num_programs=264, dtype=torch.bfloat16)
    want, _ = scene.run()
    context, finish, output, _ = scene.prepare()
    context()  # compiles
    finish()
    branch, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    other = torch.randn(2048, 2048, device=device)
    other = other @ other  # makes cuBLAS's handle, which a capture may not
    with torch.cuda.graph(graph):
        for _ in range(20):
            other = other @ other
            branch.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(branch):
                context()
            other = other / other.norm()
            torch.cuda.current_stream().wait_stream(branch)
            finish()
    for _ in range(5):
        output.fill_(777.0)
        graph.replay()
        assert torch.equal(output.cpu(), want)


@pytest.mark.parametrize("num_parts", [2, 5])
def test_exact_pages_in_parts(kit, device, num_parts):
    for dtype in DTYPES[device.type]:
        Scene(kit, device, group=3, dtype=dtype, num_parts=num_parts).check()


def test_chained(kit, device):
    for rotation_block in (1, 64):
        scene = Scene(kit, device, rotation_block, group=4, dtype=DTYPES[device.type][0])
        want, _ = scene.run()
        context, finish, output, _ = scene.prepare()
        context(chained=True)
        finish(chained=True)
        assert torch.equal(output.cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize("rotation_block", [1, 64, 256])
def test_captured_as_one_chain(kit, device, rotation_block):
    """On one stream, every kernel begun before the one before it ends, layer after layer."""
    if device.type != "cuda":
        pytest.skip("captures a CUDA graph")
    scene = Scene(
        kit, device, rotation_block, head_dim=128, group=4, num_programs=264, dtype=torch.bfloat16
    )
    want, _ = scene.run()
    context, finish, output, _ = scene.prepare()
    context(chained=True)  # compiles
    finish(chained=True)
    torch.cuda.synchronize()
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(20):
            context(chained=True)
            finish(chained=True)
            outputs.append(output.clone())
            output.fill_(777.0)
    output.fill_(777.0)
    for _ in range(5):
        graph.replay()
        for copy in outputs:
            assert torch.equal(copy.cpu(), want)


def test_no_compressed_request_touches_nothing(kit, device):
    scene = Scene(kit, device, full=range(7), dtype=DTYPES[device.type][0])
    got, _ = scene.run()
    assert (got == 777).all()


def test_more_programs_than_items_and_the_reverse(kit, device):
    for num_programs in (1, 40):
        Scene(kit, device, num_programs=num_programs, dtype=DTYPES[device.type][0]).check()


@pytest.mark.parametrize("few", [0, 16])
@pytest.mark.parametrize("num_programs", [1, 40])
def test_reduces_items_of_few_and_of_many_requests(kit, device, monkeypatch, num_programs, few):
    from echokv_kernels.gpu import decode

    monkeypatch.setattr(decode, "REDUCE", dataclasses.replace(decode.REDUCE, few=few))
    for dtype in DTYPES[device.type]:
        Scene(
            kit, device, context_lens=(1500, 900), full=(), dtype=dtype, num_programs=num_programs,
        ).check()  # fmt: skip


@pytest.mark.parametrize("variant", ["plain", "wide group", "group beyond a tile", "partial"])
def test_combines_many_requests_in_wide_tiles(kit, device, monkeypatch, variant):
    from echokv_kernels.gpu import decode

    monkeypatch.setattr(decode, "COMBINE", dataclasses.replace(decode.COMBINE, wide_from=1))
    for dtype in DTYPES[device.type]:
        Scene(
            kit, device, dtype=dtype, full=(1, 15),
            **{**VARIANTS[variant], "context_lens": (65, 30, 100, 0, 77, 1) * 3},
        ).check()  # fmt: skip


@pytest.mark.parametrize("group_pad", [1, 4, 16])
@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
def test_tiles_follow_the_batch(kit, device, group_pad, head_dim):
    from echokv_kernels.gpu.launch import COMBINE, REDUCE

    few, many = (REDUCE.tile(n, group_pad, head_dim) for n in (1, 4096))
    assert few[0] >= many[0] and few[1] <= many[1]
    for items, columns in (few, many):
        assert items & (items - 1) == columns & (columns - 1) == head_dim % columns == 0
        assert items * columns * group_pad <= REDUCE.elements
    dim_pad = 1 << (head_dim - 1).bit_length()
    few, many = (COMBINE.tile(n, 4, group_pad, dim_pad) for n in (1, 4096))
    assert few[0] == 16 and many[0] == 32 and few[1] <= many[1] <= dim_pad
    for rows, columns, stages in (few, many):
        assert (rows + columns) * dim_pad * 4 * stages <= 227 * 1024


@pytest.mark.parametrize("rotation_block", [16, 32, 256])
def test_scratch_of_many_wide_heads_is_bounded(kit, monkeypatch, rotation_block):
    """Forty heads that read forty: lines of 400 KB, for each rotation block of each program."""
    from echokv_kernels.gpu import scratch
    from echokv_kernels.gpu.heads import EchoedHeads
    from echokv_kernels.gpu.launch import DecodeTiles
    from echokv_kernels.reconstruct import EchoMaps, FeatureSource

    monkeypatch.setattr(scratch, "num_programs", lambda *_: 264)
    num, dim = 40, 128
    cache, maps = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((2, num, 16, 2 * dim), (num, num * dim, dim))
    )
    source = FeatureSource([cache], [torch.arange(num)])
    heads = EchoedHeads.of(source, EchoMaps(maps, maps), [(n, n) for n in range(num)], [], 1)
    shape = scratch.DecodeShape.of(rotation_block, DecodeTiles(), [heads])
    assert shape.chunk_len == shape.num_blocks * rotation_block >= shape.block_len
    made = scratch.DecodeScratch.allocate([heads], shape, 256, 264, 131072)
    size = made.absorbed.numel() * made.absorbed.element_size()
    assert size <= scratch.LINE_BYTES + scratch.OWN_LINE_BYTES


def test_unabsorbable_rotation_block(kit, device):
    from echokv_kernels.gpu.launch import DecodeTiles
    from echokv_kernels.gpu.scratch import DecodeShape

    with pytest.raises(ValueError, match=r"rotation_block is 24.*multiple of 16"):
        DecodeShape.of(24, DecodeTiles())
    shape = DecodeShape.of(1, DecodeTiles())
    assert shape.chunk_len % shape.item_align == shape.item_align % shape.block_len == 0
    for block in (0, 16, 48, 64, 1024, 1536, 4096):
        shape = DecodeShape.of(block, DecodeTiles())
        assert shape.chunk_len % shape.block_len == 0
        assert block == 0 or block % shape.block_len == 0
        assert dataclasses.replace(shape).num_blocks == max(
            1, shape.chunk_len // (block or 1 << 30)
        )
