"""How decodes are cut, and the memory that their kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from echokv_kernels.gpu.heads import EchoedHeads
from echokv_kernels.gpu.launch import UNROTATED, DecodeTiles, num_programs
from echokv_kernels.gpu.unrotated import unrotated_sizes
from echokv_kernels.step_plan import Shares

LINE_BYTES = 256 << 20  # 1M tokens of an 8B model at rotation block 64, 4M at 256
OWN_LINE_BYTES = 512 << 20  # short rotation blocks of models with many KV heads get shorter chunks


@dataclass(frozen=True)
class DecodeShape:
    """How the tokens of a decode request are cut, given the rotation block.

    Attributes:
        rotation_block: 0, 1, or a multiple of 16.
        chunk_len: tokens of a chunk; chunks whose queries are not absorbed ahead begin at multiples
            of it.
        num_blocks: rotation blocks in a chunk.
        block_len: tokens per tile, within one rotation block.
    """

    rotation_block: int
    chunk_len: int
    num_blocks: int
    block_len: int

    @classmethod
    def of(
        cls, rotation_block: int, tiles: DecodeTiles, groups: Sequence[EchoedHeads] = ()
    ) -> DecodeShape:
        """The shape for everything that will use it.

        Raises:
            ValueError: the rotation block cannot be absorbed tile by tile.
        """
        block_len = tiles.block_len
        if any(tiles.is_wide(*group.feature_size) for group in groups):
            block_len = tiles.wide_block_len
        if rotation_block == 0:
            return cls(0, tiles.chunk_len, 1, block_len)
        if rotation_block == 1:
            tile_len = UNROTATED.tile_len(tiles.chunk_len)
            return cls(1, tiles.chunk_len, 1, min(tiles.block_len, tile_len))
        if rotation_block % 16:
            raise ValueError(
                f"rotation_block is {rotation_block}; absorbed decode needs 0 or a multiple of 16. "
                "Train with --rotation-block 64, or use 1 (un-rotated keys)"
            )
        if rotation_block <= tiles.chunk_len:
            chunk_len = tiles.chunk_len // rotation_block * rotation_block
        else:
            chunk_len = max(
                size for size in range(16, tiles.chunk_len + 1, 16) if rotation_block % size == 0
            )
        while chunk_len % block_len or rotation_block % block_len:
            block_len //= 2
        num_blocks = max(1, chunk_len // rotation_block)
        if num_blocks > 1 and groups:
            device, dtype = groups[0].maps.key.device, groups[0].maps.key.dtype
            block_bytes = max(line_size(group) for group in groups) * dtype.itemsize
            block_bytes *= num_programs(device, rotation_block, tiles)
            num_blocks = max(1, min(num_blocks, OWN_LINE_BYTES // block_bytes))
            chunk_len = num_blocks * rotation_block
        return cls(rotation_block, chunk_len, num_blocks, block_len)

    @property
    def item_align(self) -> int:
        """Work items start at multiples of it: tiles lie within one rotation block."""
        return UNROTATED.tile_len(self.chunk_len) if self.rotation_block == 1 else self.block_len

    def shares(self, num_programs: int, tiles: DecodeTiles) -> Shares:
        """How so many programs share the tokens of a step."""
        return Shares(
            num_shares=num_programs,
            align=self.item_align,
            min_len=tiles.min_share_len,
            request_cost=tiles.request_cost,
            rotation_block=self.rotation_block,
        )

    def num_lines(self, max_reqs: int, max_len: int) -> int:
        """Rotation blocks of `max_reqs` requests of `max_len` tokens."""
        if self.rotation_block < 2:
            return max_reqs * (1 - self.rotation_block)
        return max_reqs * -(-max_len // self.rotation_block)


@dataclass(frozen=True, eq=False)
class DecodeScratch:
    """Memory of echoed decode, shared by all layers of a worker; independent of the context.

    Attributes:
        num_programs: persistent programs.
        max_lines: rotation blocks whose absorbed queries are made ahead; later ones cost more.
        absorbed: one dimension, cache dtype: those lines, then the lines of each program's chunk.
        offset: float32, their score offsets (key bias).
        scores: float32, [num_programs, chunk_len * row_pad].
        weights: cache dtype, of the same shape.
        sums: float32, [num_programs, row_pad * F], weighted features between two chunks.
        item_mean: cache dtype, [programs + max_reqs, row_pad * F], each work item's.
        maximum, total: [programs + max_reqs, row_pad] float32, its softmax state.
        mean: [max_reqs, mean_size], cache dtype, each request's features over all its items.
        lse: [max_reqs, rows] float32, log2, of the same.
        plain, turned: of un-rotated keys (unrotated.py), cache dtype; empty for other rotation
            blocks.
    """

    num_programs: int
    max_lines: int
    absorbed: torch.Tensor
    offset: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor
    sums: torch.Tensor
    item_mean: torch.Tensor
    maximum: torch.Tensor
    total: torch.Tensor
    mean: torch.Tensor
    lse: torch.Tensor
    plain: torch.Tensor
    turned: torch.Tensor

    @classmethod
    def allocate(
        cls,
        groups: list[EchoedHeads],
        shape: DecodeShape,
        max_reqs: int,
        num_programs: int,
        max_len: int,
        line_bytes: int = LINE_BYTES,
    ) -> DecodeScratch:
        """Scratch large enough for each of `groups`.

        Args:
            groups: everything that will use it.
            shape: of the plan's rotation block.
            max_reqs: requests of a step at most.
            num_programs: persistent programs.
            max_len: tokens of a request at most.
            line_bytes: absorbed queries made ahead take no more.
        """
        device, dtype = groups[0].maps.key.device, groups[0].maps.key.dtype
        max_items = num_programs + max_reqs

        def empty(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        rows = max(group.row_pad for group in groups)
        item = max(group.row_pad * group.maps.width for group in groups)
        line = max(line_size(group) for group in groups)
        max_lines = shape.num_lines(max_reqs, max_len)
        max_lines = min(max_lines, line_bytes // (line * dtype.itemsize))
        num_lines = max_lines + num_programs * shape.num_blocks
        assert num_lines * line < 2**31, "elements of absorbed queries are counted in 32 bits"
        plain, turned = 0, 0
        if shape.rotation_block == 1:
            sizes = [unrotated_sizes(group, shape) for group in groups]
            plain, turned = (max(size) for size in zip(*sizes, strict=True))
            max_lines = num_lines = 0
        return cls(
            num_programs=num_programs,
            max_lines=max_lines,
            absorbed=empty(num_lines * line, dtype),
            offset=empty(num_lines * max(group.num_echoed * group.group for group in groups)),
            scores=empty(num_programs * shape.chunk_len * rows),
            weights=empty(num_programs * shape.chunk_len * rows, dtype),
            sums=empty(num_programs * item),
            item_mean=empty(max_items * item, dtype),
            maximum=empty(max_items * rows),
            total=empty(max_items * rows),
            mean=empty(max_reqs * max(mean_size(group) for group in groups), dtype),
            lse=empty(max_reqs * rows),
            plain=empty(num_programs * plain, dtype),
            turned=empty(num_programs * turned, dtype),
        )


def line_size(heads: EchoedHeads) -> int:
    """Elements of a line: the absorbed queries of one rotation block of one request."""
    return heads.num_echoed * heads.group * heads.maps.width


def mean_size(heads: EchoedHeads) -> int:
    """Elements of one request's means: echoed rows [F], then rows of retained heads [head_dim]."""
    maps = heads.maps
    return heads.group * (heads.num_echoed * maps.width + heads.num_retained * maps.head_dim)
