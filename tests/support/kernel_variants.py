"""Counts how many variants of its warm-up's kernels a server would compile, without a GPU.

    python tests/support/kernel_variants.py

Launches them as different steps do: other numbers of tokens, other widths of block tables, other
places in shared buffers. Prints one JSON object: variants by kernel. A variant that the warm-up did
not compile makes a request wait for the compiler.
"""

from __future__ import annotations

import json

import torch
from compile_kernels import NoDriver, compile_instead_of_launching
from triton.runtime import driver

HEADS, GROUP, HEAD_DIM, TILE, PAGE = 2, 2, 128, 128, 16
BF16, INT = torch.bfloat16, torch.int32


def ints(size: int, shift: int) -> torch.Tensor:
    """[size] int32, `shift` elements behind an aligned address."""
    return torch.zeros(size + shift, dtype=INT)[shift:]


def chunk_step(num_tokens: int, table_width: int, shift: int) -> None:
    """A step with one compressed prompt chunk."""
    from echokv_kernels.gpu.features import PagedFeatures
    from echokv_kernels.gpu.merge import merge_partial, write_merged
    from echokv_kernels.gpu.rebuild import materialize
    from echokv_kernels.gpu.rotation import RotationTable
    from echokv_kernels.reconstruct import EchoMaps, FeatureSource
    from echokv_kernels.rotary import Rotary

    cache = torch.zeros(3, HEADS, PAGE, 2 * HEAD_DIM, dtype=BF16)
    features = PagedFeatures.of(FeatureSource([cache], [torch.arange(HEADS)]))
    maps = EchoMaps(*(torch.zeros(HEADS, HEADS * HEAD_DIM, HEAD_DIM, dtype=BF16) for _ in "kv"))
    num_tiles = -(-num_tokens // TILE)
    workspace = torch.zeros(num_tiles, TILE, HEADS, 2, HEAD_DIM, dtype=BF16)
    table = torch.zeros(1, table_width, dtype=INT)
    exact = torch.zeros(4, table_width + 3, dtype=torch.uint8)
    fresh = torch.zeros(num_tokens, 2 * HEADS, HEAD_DIM, dtype=BF16)
    inverse = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    materialize(
        workspace, ints(num_tiles, shift), ints(num_tiles, shift), features, maps, ints(HEADS, 0),
        cache, table, exact, ints(4, 0), table, ints(1, shift), ints(1, shift),
        ints(2, shift), fresh, fresh, ints(HEADS, 0),
        RotationTable.build(Rotary(inverse.float(), HEAD_DIM), 4096), 64,
    )  # fmt: skip
    rows = HEADS * GROUP
    merged = torch.zeros(num_tokens, rows, HEAD_DIM)
    lse = torch.zeros(shift + rows * num_tokens)[shift:].view(rows, num_tokens)
    part = merged.to(BF16)
    for is_first in (True, False):
        merge_partial(
            merged, lse, part, lse, ints(num_tokens, shift), ints(4, 0), first_token=0,
            is_first=is_first,
        )  # fmt: skip
    output = torch.zeros(num_tokens, 2 * rows, HEAD_DIM, dtype=BF16)
    write_merged(output, merged, ints(rows, 0), ints(num_tokens, shift), ints(4, 0))


def store_step(num_tokens: int, shift: int) -> None:
    """A step's store; keys and values are parts of one projection, as a model has them."""
    from echokv_kernels.gpu.store import store_pages

    cache = torch.zeros(3, HEADS, PAGE, 2 * HEAD_DIM, dtype=BF16)
    projected = torch.zeros(num_tokens, 4 * HEADS * HEAD_DIM, dtype=BF16)
    key, value = projected.view(num_tokens, 2, 2 * HEADS, HEAD_DIM).unbind(1)
    slots = torch.zeros(num_tokens + shift, dtype=torch.int64)[shift:]
    store_pages(key, value, cache, cache, slots, slots, ints(2 * HEADS, 0))


def main() -> None:
    driver.set_active(NoDriver())
    compiled: dict[str, set[str]] = {}
    compile_instead_of_launching({}, compiled)
    for num_tokens, table_width, shift in ((16, 32, 0), (17, 33, 1), (300, 7, 3), (129, 1, 2)):
        chunk_step(num_tokens, table_width, shift)
        store_step(num_tokens, shift)
    print(json.dumps({name: len(variants) for name, variants in compiled.items()}))


if __name__ == "__main__":
    main()
