"""Bytes of slots, pages and plans, and the block sizes that follow. Nothing else computes them.

A *slot* holds the key and the value of one head of one token. A *page* holds `block_size` tokens
of all heads that one layer stores in it. A *block* of vLLM's pool is a packed row of the pages of
all layers of one group (retained heads R, or residual = discarded heads D); every block of the
pool has the same size, that of the larger group, and the smaller group is padded at its end.

Example: 32 layers, 8 KV heads of 128 elements, bfloat16, plan `local-0.375` (3 retained heads),
so R has 96 slots per token, D has 160, and `solve_block_sizes(96, 160)` says 80 and 48 tokens.

    slot      [ K: 128 x 2 bytes | V: 128 x 2 bytes ]                               512 bytes
    R page    head 0: slot of token 0, 1, .. 79 | head 1: .. | head 2: ..      3*80 = 240 slots
              = 122,880 bytes; token 5 of head 1 starts at (1*80 + 5) * 512 =   43,520
    D page    head 0: slot of token 0, 1, .. 47 | .. | head 4: ..              5*48 = 240 slots
              = 122,880 bytes
    R block   [ layer 0: R page | layer 1: R page | ... | layer 31: R page ]   3,932,160 bytes
    D block   [ layer 0: D page | layer 1: D page | ... | layer 31: D page ]   3,932,160 bytes

A layer sees its pages as a strided view [num_blocks, num_heads, block_size, 2 * head_dim] (vLLM's
BLHNC layout) whose first stride is the whole packed block: index it, never reshape it. Within a
head all slots of a page are contiguous.

A coded residual of the discarded heads (method.md §6) will follow the slots inside the R page;
`residual_bits` is where its bytes will enter. Only 0 is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_KEY_AND_VALUE = 2
_RETAINED_PADDING_WEIGHT = 3  # padding R costs compressed capacity; padding D only full mode


def _check_residual_bits(residual_bits: int) -> None:
    if residual_bits != 0:
        raise ValueError(
            f"residual_bits is {residual_bits}; coded residuals are not built yet, use 0"
        )


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


@dataclass(frozen=True)
class PageLayout:
    """One layer's page in one group.

    Attributes:
        num_heads: heads the layer stores in this group.
        head_dim: elements of one key or value.
        block_size: tokens per page.
        itemsize: bytes per element.
        residual_bits: bits per number of the coded residual; only 0.
    """

    num_heads: int
    head_dim: int
    block_size: int
    itemsize: int
    residual_bits: int = 0

    def __post_init__(self) -> None:
        _check_positive(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            itemsize=self.itemsize,
        )
        _check_residual_bits(self.residual_bits)

    @property
    def slot_size(self) -> int:
        """Elements of one slot: the last axis of the view."""
        return _KEY_AND_VALUE * self.head_dim

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one head of one token."""
        return self.slot_size * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of all stored heads of one token."""
        return self.num_heads * self.bytes_per_slot

    @property
    def page_bytes(self) -> int:
        return self.block_size * self.token_bytes

    def view_shape(self, num_blocks: int) -> tuple[int, int, int, int]:
        """Shape of the layer's view of a pool with `num_blocks` blocks."""
        return num_blocks, self.num_heads, self.block_size, self.slot_size


@dataclass(frozen=True)
class PlanLayout:
    """Cache bytes of a whole model under a plan (one rank's heads under tensor parallelism).

    Attributes:
        retained_heads_per_layer: how many heads each layer retains.
        num_kv_heads: heads every layer has.
        head_dim: elements of one key or value.
        itemsize: bytes per element.
        residual_bits: bits per number of the coded residual; only 0.
    """

    retained_heads_per_layer: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    itemsize: int
    residual_bits: int = 0

    def __post_init__(self) -> None:
        _check_positive(
            num_layers=len(self.retained_heads_per_layer),
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            itemsize=self.itemsize,
        )
        _check_residual_bits(self.residual_bits)
        for layer, retained in enumerate(self.retained_heads_per_layer):
            if not 0 <= retained <= self.num_kv_heads:
                raise ValueError(
                    f"layer {layer} retains {retained} heads; it has {self.num_kv_heads}, so "
                    f"retain 0 to {self.num_kv_heads}"
                )

    @property
    def retained_slots(self) -> int:
        """Slots per token in retained pages, over all layers."""
        return sum(self.retained_heads_per_layer)

    @property
    def residual_slots(self) -> int:
        """Slots per token in residual pages, over all layers."""
        return self.num_kv_heads * len(self.retained_heads_per_layer) - self.retained_slots

    @property
    def bytes_per_slot(self) -> int:
        return _KEY_AND_VALUE * self.head_dim * self.itemsize

    @property
    def retained_bytes_per_token(self) -> int:
        """Bytes of a token whose residual pages were dropped."""
        return self.retained_slots * self.bytes_per_slot

    @property
    def residual_bytes_per_token(self) -> int:
        """Bytes that dropping a token's residual pages frees."""
        return self.residual_slots * self.bytes_per_slot

    @property
    def full_bytes_per_token(self) -> int:
        return self.retained_bytes_per_token + self.residual_bytes_per_token

    @property
    def ratio(self) -> float:
        """Retained bytes over full bytes."""
        return self.retained_bytes_per_token / self.full_bytes_per_token

    def block_sizes(self) -> BlockSizes:
        """Tokens per block of both groups; every process of a server must come to the same."""
        return solve_block_sizes(self.retained_slots, self.residual_slots)


@dataclass(frozen=True)
class BlockSizes:
    """Tokens per block of the two groups, and how much of a block each leaves empty.

    Attributes:
        retained: tokens per retained block.
        residual: tokens per residual block.
        retained_padding: empty part of a retained block, 0 to 1.
        residual_padding: empty part of a residual block, 0 to 1.
    """

    retained: int
    residual: int
    retained_padding: float
    residual_padding: float

    @property
    def hit_granularity(self) -> int:
        """Tokens that prefix-cache hits are multiples of."""
        return math.lcm(self.retained, self.residual)


def solve_block_sizes(
    retained_slots: int,
    residual_slots: int,
    granularity: int = 16,
    max_block: int = 256,
    lcm_cap: int = 256,
) -> BlockSizes:
    """Block sizes that make the two groups' blocks nearly equal in bytes.

    Least `3 * retained_padding + residual_padding` wins; then the least common multiple (prefix
    hits are multiples of it, hence also its cap); then the smaller blocks.

    Args:
        retained_slots: slots per token in retained pages, over all layers; at least 1.
        residual_slots: likewise in residual pages.
        granularity: block sizes are multiples of it.
        max_block: largest block size.
        lcm_cap: largest least common multiple of the two.

    Raises:
        ValueError: an argument is not positive, or no block size is within the caps.
    """
    _check_positive(
        retained_slots=retained_slots,
        residual_slots=residual_slots,
        granularity=granularity,
    )
    if min(max_block, lcm_cap) < granularity:
        raise ValueError(
            f"no multiple of {granularity} is within max_block={max_block} and "
            f"lcm_cap={lcm_cap}; raise them or lower the granularity"
        )
    sizes = range(granularity, max_block + 1, granularity)
    pairs = [(r, d) for r in sizes for d in sizes if math.lcm(r, d) <= lcm_cap]

    def padding(pair: tuple[int, int]) -> tuple[float, float]:
        retained, residual = retained_slots * pair[0], residual_slots * pair[1]
        block = max(retained, residual)
        return (block - retained) / block, (block - residual) / block

    def cost(pair: tuple[int, int]) -> tuple[float, int, int]:
        retained_padding, residual_padding = padding(pair)
        # Equal paddings reached by different sizes must compare equal in floating point.
        weighted = round(_RETAINED_PADDING_WEIGHT * retained_padding + residual_padding, 12)
        return weighted, math.lcm(*pair), sum(pair)

    best = min(pairs, key=cost)
    return BlockSizes(*best, *padding(best))
