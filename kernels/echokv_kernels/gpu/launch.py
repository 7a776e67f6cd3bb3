"""Tile sizes, warps and stages of every kernel, with the command that chose them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

HEAD_DIM_MULTIPLE = 32  # of rebuilding keys and values


@dataclass(frozen=True)
class DecodeTiles:
    """Absorbed decode.

    Attributes:
        chunk_len: tokens whose queries a program absorbs at once where they are not made ahead;
            with two loops, also tokens taken through the first before the second, whose scores
            should stay in the L2 cache.
        block_len: tokens per tile of keys, at most.
        wide_block_len: the same where wide features take two loops; shares of tokens are multiples
            of it.
        programs_per_sm: persistent programs per multiprocessor.
        num_warps: warps per program.
        wide_warps: warps of programs with tiles of `wide_block_len`; one fits a multiprocessor.
        score_stages: depth of the pipeline that loads keys.
        value_stages: depth of the pipeline that loads values.
        max_width: features of one token in a tile of keys, at most.
        value_len: tokens per tile of values.
        fused_bytes: keys of one token up to which one loop takes keys and values; their sums must
            fit the registers. Others take two loops and scratch for the scores, and features of
            more bytes are wide.
        fused_tile_bytes: keys of a tile of that loop, at most.
        fused_stages: depth of its pipeline.
        hold_from: rotation blocks from this length on get their absorbed queries once, at the
            price of a pipeline that begins anew with each of them.
        warp_sums: sums that a warp may hold in registers, rows times features.
        shared_bytes: shared memory that pipelines may take.
        min_share_len: tokens of a program, at least; shorter shares cost more to combine than they
            save.
        request_cost: tokens that a program reads in the time it needs to begin with a request.
    """

    chunk_len: int = 1024
    block_len: int = 64
    wide_block_len: int = 128
    programs_per_sm: int = 2
    num_warps: int = 4
    wide_warps: int = 8
    score_stages: int = 4
    value_stages: int = 5
    max_width: int = 128
    value_len: int = 16
    fused_bytes: int = 1024
    fused_tile_bytes: int = 32 * 1024
    fused_stages: int = 2
    hold_from: int = 1024
    warp_sums: int = 32 * 128
    shared_bytes: int = 200 * 1024
    min_share_len: int = 128
    request_cost: int = 64

    def is_wide(self, width: int, itemsize: int) -> bool:
        """Whether features are wide: `width` of them, padded, of `itemsize` bytes."""
        return width * itemsize > self.fused_bytes

    def is_fused(self, echo_pad: int, width: int, itemsize: int) -> bool:
        """Whether one loop takes keys and values; arguments as of `is_wide`."""
        fits = echo_pad * width <= self.num_warps * self.warp_sums
        return fits and not self.is_wide(width, itemsize)

    def fused_len(self, width: int, itemsize: int) -> int:
        """Tokens per tile of that loop, a power of two; arguments as of `is_wide`."""
        return max(16, 1 << (self.fused_tile_bytes // (width * itemsize)).bit_length() - 1)

    def loop_warps(self, block_len: int) -> int:
        """Warps per program of two loops with `block_len` tokens per tile of keys."""
        return self.wide_warps if block_len >= self.wide_block_len else self.num_warps

    def stages(self, wanted: int, stage_bytes: int) -> int:
        """Depth of a pipeline that fits the shared memory."""
        return max(1, min(wanted, self.shared_bytes // stage_bytes))

    def score_heads(self, num_sources: int, head_dim: int) -> int:
        """Source heads of a tile of keys."""
        return _equal_steps(num_sources, head_dim, self.max_width)

    def value_heads(self, num_sources: int, head_dim: int, row_pad: int, num_warps: int) -> int:
        """Source heads of a tile of values: as many as the registers hold sums of."""
        return _equal_steps(num_sources, head_dim, num_warps * self.warp_sums // row_pad)


def _equal_steps(num_sources: int, head_dim: int, max_width: int) -> int:
    """Source heads taken at once: as many as fit, the same number in every step."""
    return max(
        heads
        for heads in range(1, num_sources + 1)
        if num_sources % heads == 0 and (heads == 1 or heads * head_dim <= max_width)
    )


@dataclass(frozen=True)
class AbsorbTiles:
    """Absorbing queries ahead of decode.

    Attributes:
        lines: rotation blocks of a task.
        members: query heads of one KV head that a task takes, at most.
        task_cost: source heads that could be taken in the time it takes to begin a task.
        requests: requests compared at once when looking for a block's request.
        num_warps: warps per program.
    """

    lines: int = 64
    members: int = 4
    task_cost: int = 1
    requests: int = 32
    num_warps: int = 4

    def query_heads(self, group: int, dim_pad: int) -> int:
        """Query heads of a task, a divisor of the group.

        Shared memory holds the queries of so many heads of up to 128 elements, fewer of longer
        ones.
        """
        return _divisor(group, max(1, self.members * 128 // max(128, dim_pad)))


def _divisor(number: int, most: int) -> int:
    return max(size for size in range(1, most + 1) if number % size == 0)


@dataclass(frozen=True)
class ExactTiles:
    """Attention over exact residual pages.

    Attributes:
        tile_bytes: keys and values of a tile; long heads take fewer tokens.
        num_stages: depth of the pipeline that loads them.
        num_warps: warps per program.
        programs: for all requests of a step, if they have tokens enough.
        max_parts: programs for one request and head; what merges them takes them in turn.
    """

    tile_bytes: int = 32 * 1024
    num_stages: int = 3
    num_warps: int = 4
    programs: int = 128
    max_parts: int = 16

    def parts(self, num_reqs: int, heads: int) -> int:
        """Programs for one request and head, a power of two."""
        wanted = max(1, self.programs // (num_reqs * heads))
        return min(self.max_parts, 1 << (wanted.bit_length() - 1))

    def tokens(self, head_dim: int, itemsize: int) -> int:
        """Tokens of a tile, a power of two from 16 on."""
        most = self.tile_bytes // (2 * head_dim * itemsize)
        return max(16, 1 << (most.bit_length() - 1))


@dataclass(frozen=True)
class ReduceTiles:
    """Work items to one mean per row, by single warps: nothing but registers, many at a time.

    Few requests have many items each, and each load waits for memory as long as a wider one. Two
    kinds of tiles, no more: every kind is a variant to compile.

    Attributes:
        few: requests that are few, at most.
        few_tile: items and features read at once where requests are few.
        many_tile: the same where they are many.
        elements: numbers read at once, at most; wide groups take fewer items.
        programs: for all requests of a step; more than the GPU holds take the time to start.
    """

    few: int = 16
    few_tile: tuple[int, int] = (32, 32)
    many_tile: tuple[int, int] = (2, 128)
    elements: int = 4096
    programs: int = 2560

    def tile(self, num_reqs: int, group_pad: int, head_dim: int) -> tuple[int, int]:
        """Items and features read at once, powers of two; features divide the head size."""
        items, columns = self.few_tile if num_reqs <= self.few else self.many_tile
        columns = min(columns, head_dim & -head_dim)
        return max(1, min(items, self.elements // (columns * group_pad))), columns


@dataclass(frozen=True)
class CombineTiles:
    """Value maps and exact parts.

    Attributes:
        columns: elements of a head that a program takes, at most.
        num_stages: depth of the pipeline that loads features and maps.
        wide_from: programs from which on tiles are wide, so that requests share the value maps.
        wide_rows: rows of a wide tile.
        wide_maps: elements of a source head's map in a wide tile, at most.
        wide_stages: depth of its pipeline.
        num_warps: warps per program.
    """

    columns: int = 32
    num_stages: int = 4
    wide_from: int = 512
    wide_rows: int = 32
    wide_maps: int = 128 * 128
    wide_stages: int = 2
    num_warps: int = 4

    def tile(
        self, num_reqs: int, num_echoed: int, group_pad: int, dim_pad: int
    ) -> tuple[int, int, int]:
        """Rows and columns of a tile that holds one KV head's query heads, and stages.

        Tensor cores want 16 rows.
        """
        rows, columns = max(16, group_pad), min(dim_pad, self.columns)
        tiles = -(-num_reqs * group_pad // rows)
        if tiles * num_echoed * (dim_pad // columns) < self.wide_from:
            return rows, columns, self.num_stages
        wide = max(columns, min(dim_pad, self.wide_maps // dim_pad))
        return max(self.wide_rows, group_pad), wide, self.wide_stages


@dataclass(frozen=True)
class UnrotatedTiles:
    """Decode with un-rotated keys.

    Attributes:
        rows: tokens per tile at most, no more than positions in `RotationTable.fine`; with
            `columns` it fills the registers, so one program runs per multiprocessor.
        columns: key elements of a tile, whole heads.
        step: features per product.
        pairs: pairs of a head rotated at once.
        value_width: features of one token in a tile of values, at most.
        value_len: tokens per tile of values.
        value_stages: depth of the pipeline that loads values.
        num_warps: warps per program.
        num_stages: depth of the pipeline that loads features and maps.
        programs_per_sm: persistent programs per multiprocessor; registers allow one.
    """

    rows: int = 128
    columns: int = 256
    step: int = 64
    pairs: int = 64
    value_width: int = 512
    value_len: int = 32
    value_stages: int = 3
    num_warps: int = 8
    num_stages: int = 4
    programs_per_sm: int = 1

    def fit(self, itemsize: int) -> UnrotatedTiles:
        """What fits shared memory with cache elements of so many bytes."""
        return replace(self, columns=128, step=32, num_stages=2) if itemsize > 2 else self

    def tile_len(self, chunk_len: int) -> int:
        """Tokens per tile: a power of two that divides the chunk."""
        return min(self.rows, chunk_len & -chunk_len)

    def heads(self, num_echoed: int, dim_pad: int) -> int:
        """Echoed heads per tile, a power of two."""
        return max(1, min(self.columns // dim_pad, 1 << (num_echoed - 1).bit_length()))

    def value_heads(self, num_sources: int, head_dim: int) -> int:
        """Source heads of a tile of values."""
        return _equal_steps(num_sources, head_dim, self.value_width)


# Checked by: python benchmarks/kernels/decode.py OUT_FOLDER (H200, Llama-3.1-8B's shape, bf16).
# local-0.5, rotation block 256, 262,144 tokens, decode kernel alone: 146 us; with tiles of 16
# tokens 186, of 64 207, with one program of four warps per multiprocessor 197, of eight and tiles
# of 64 164, holding queries from blocks of 256 on 159, two loops 178, queries by way of the L1
# cache 205. local-0.25: 80 us; with tiles of 32 tokens 87, two loops 107, with three programs per
# multiprocessor (168 registers) 117. Wide features, paper-0.5: 346 us; with four warps and tiles
# of 64 tokens 378, values 32 tokens at a time 353, weights made in the loop over values 408.
# Absorbing, local-0.5, rotation block 64: 33 us; with eight warps 46, two query heads per task 43.
# Reducing with four warps 14 us, with one 5. More: benchmarks/results/2026-11-22-h200-5 to -7 and
# 2026-11-23-h200.
DECODE = DecodeTiles()
ABSORB = AbsorbTiles()
EXACT = ExactTiles()
REDUCE = ReduceTiles()
COMBINE = CombineTiles()
UNROTATED = UnrotatedTiles()


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an interpreter runs a few programs, one after the other."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(device: torch.device, rotation_block: int, tiles: DecodeTiles = DECODE) -> int:
    """Persistent programs of echoed decode."""
    if device.type != "cuda":
        return 3
    per_sm = UNROTATED.programs_per_sm if rotation_block == 1 else tiles.programs_per_sm
    return per_sm * num_multiprocessors(device)


@dataclass(frozen=True)
class RebuildTiles:
    """Rebuilding keys and values into a workspace.

    Attributes:
        rows: positions per program, a power of two that divides the workspace's tile.
        heads: discarded heads per program, a power of two; they share the features' loads and
            rotation, their sums take rows * heads * head_dim registers.
        step: elements of a source head per product, a power of two that divides the head size;
            rotated keys take half of it from each half of the head.
        num_warps: warps per program.
        num_stages: depth of the pipeline that loads features and maps.
    """

    rows: int
    heads: int
    step: int
    num_warps: int = 8
    num_stages: int = 3

    @classmethod
    def choose(cls, tile_len: int, head_dim: int, num_heads: int, itemsize: int) -> RebuildTiles:
        """Tiles for a workspace, a model and a checkpoint.

        Args:
            tile_len: positions per tile of the workspace.
            head_dim: elements of one key or value.
            num_heads: heads the maps rebuild.
            itemsize: bytes per element.

        Raises:
            ValueError: the tile or the head size is not a multiple of 16 or 32.
        """
        rows = min(128, tile_len & -tile_len)
        step = min(64, head_dim & -head_dim)
        if rows < 16 or head_dim % HEAD_DIM_MULTIPLE:
            raise ValueError(
                f"tiles of {tile_len} positions and heads of {head_dim} elements; use multiples "
                f"of 16 and of {HEAD_DIM_MULTIPLE}"
            )
        if itemsize > 2:
            return cls(min(rows, 64), 1, 32, num_stages=2)
        columns = 1 << (head_dim - 1).bit_length()
        wanted = 1 << (num_heads - 1).bit_length()
        return cls(rows, max(1, min(256 // columns, wanted)), step)


@dataclass(frozen=True)
class MergeTiles:
    """Merging attention over parts of the context.

    Attributes:
        tokens: tokens per program.
        num_warps: warps per program.
    """

    tokens: int = 16
    num_warps: int = 4


MERGE = MergeTiles()
