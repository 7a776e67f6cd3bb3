"""Times the prefill workspace's rebuild: python benchmarks/kernels/rebuild.py

One request of 16,384 tokens, four source heads and four discarded heads of 128 elements, bfloat16,
nothing exact: every position of the workspace is two products, [512] x [512, 128] per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import copy_bandwidth, time_graph

from echokv_kernels.gpu.features import PagedFeatures
from echokv_kernels.gpu.launch import RebuildTiles
from echokv_kernels.gpu.rebuild import materialize
from echokv_kernels.gpu.rotation import RotationTable
from echokv_kernels.reconstruct import EchoMaps, FeatureSource
from echokv_kernels.rotary import Rotary

NUM_TOKENS, BLOCK_SIZE, TILE = 16384, 16, 128
NUM_SOURCES, NUM_HEADS, HEAD_DIM = 4, 4, 128
NUM_LAYERS = 3  # features, maps and workspaces of their own, so that none waits in the cache
ROTATION_BLOCKS = (64, 256, 0, 1)
TILES = (
    RebuildTiles(rows=128, heads=2, step=64, num_warps=8, num_stages=3),
    RebuildTiles(rows=128, heads=2, step=64, num_warps=8, num_stages=4),
    RebuildTiles(rows=128, heads=2, step=32, num_warps=8, num_stages=4),
    RebuildTiles(rows=128, heads=1, step=64, num_warps=8, num_stages=3),
    RebuildTiles(rows=64, heads=2, step=32, num_warps=4, num_stages=4),
    RebuildTiles(rows=64, heads=1, step=64, num_warps=4, num_stages=3),
)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def whole(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="cuda")


class Layer:
    """Pages, maps and workspace of one layer; the last token of the request is this step's."""

    def __init__(self, rotation: RotationTable) -> None:
        num_pages = NUM_TOKENS // BLOCK_SIZE
        cache = randn(num_pages + 1, NUM_SOURCES, BLOCK_SIZE, 2 * HEAD_DIM)
        width = NUM_SOURCES * HEAD_DIM
        maps = EchoMaps(*(randn(NUM_HEADS, width, HEAD_DIM) / width**0.5 for _ in range(2)))
        num_tiles = NUM_TOKENS // TILE
        table = torch.randperm(num_pages, device="cuda") + 1
        table = table.to(torch.int32)[None]
        self.workspace = randn(num_tiles, TILE, NUM_HEADS, 2, HEAD_DIM)
        self.arguments: dict[str, Any] = dict(
            tile_request=torch.zeros(num_tiles, dtype=torch.int32, device="cuda"),
            tile_start=torch.arange(num_tiles, dtype=torch.int32, device="cuda") * TILE,
            features=PagedFeatures.of(FeatureSource([cache], [None])),
            maps=maps,
            group_heads=whole(list(range(NUM_HEADS))),
            residual_cache=randn(2, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_DIM),
            residual_table=torch.ones_like(table),
            exact=torch.zeros(1, num_pages, dtype=torch.uint8, device="cuda"),
            compressed=whole([1]),
            retained_table=table,
            seq_lens=whole([NUM_TOKENS]),
            context_lens=whole([NUM_TOKENS - 1]),
            query_start_loc=whole([0, 1]),
            key=randn(1, NUM_SOURCES + NUM_HEADS, HEAD_DIM),
            value=randn(1, NUM_SOURCES + NUM_HEADS, HEAD_DIM),
            discarded=whole([NUM_SOURCES + head for head in range(NUM_HEADS)]),
            rotation=rotation,
        )

    def call(self, rotation_block: int, tiles: RebuildTiles) -> Callable[[], None]:
        return lambda: materialize(
            self.workspace, **self.arguments, rotation_block=rotation_block, tiles=tiles
        )


def main() -> None:
    bandwidth = copy_bandwidth()
    flop = 2 * 2 * NUM_TOKENS * NUM_SOURCES * HEAD_DIM * NUM_HEADS * HEAD_DIM
    num_bytes = 2 * 2 * NUM_TOKENS * (NUM_SOURCES + NUM_HEADS) * HEAD_DIM
    limit = num_bytes / bandwidth * 1e6
    print(f"copy {bandwidth / 1e12:.2f} TB/s: features and workspace take {limit:.1f} us")
    inverse = 500000.0 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
    rotation = RotationTable.build(Rotary(inverse.to(torch.float32), HEAD_DIM), NUM_TOKENS)
    layers = [Layer(rotation) for _ in range(NUM_LAYERS)]
    chosen = RebuildTiles.choose(TILE, HEAD_DIM, NUM_HEADS, 2)
    print(f"RebuildTiles.choose: {chosen}")
    for rotation_block in ROTATION_BLOCKS:
        for tiles in TILES:
            timing = time_graph([layer.call(rotation_block, tiles) for layer in layers])
            print(
                f"rotation block {rotation_block:3} {tiles}: {timing.median:7.1f} us "
                f"({timing.p20:.1f} ... {timing.p80:.1f}), "
                f"{flop / timing.median / 1e6:.0f} TFLOP/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
