"""Cache bytes of a compressed request, as the server lays them out."""

from __future__ import annotations

from dataclasses import dataclass

from echokv_kernels.layout import PlanLayout, solve_block_sizes
from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.quantization import bytes_per_number

# Tokens per page of a stock cache.
_STOCK_BLOCK = 16


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model under one checkpoint.

    Attributes:
        full: Per token with the full cache, not quantised.
        retained: Per token outside the windows, no padding; scales and coded residuals included.
        at_length: Per token of a compressed request of the length given: retained pages, the exact
            pages of sink and recent window, and the padding of all of them.
        maps: Of the maps, once per server.
    """

    full: int
    retained: float
    at_length: float
    maps: int

    @property
    def ratio(self) -> float:
        """Bytes per token outside the windows over those of the full cache."""
        return self.retained / self.full


def footprint(
    checkpoint: EchoCheckpoint,
    length: int,
    recent_tokens: int,
    itemsize: int,
    cache_format: str = "auto",
    residual_bits: int = 0,
) -> Footprint:
    """Bytes of a compressed request of `length` tokens.

    Args:
        checkpoint: The plan and maps.
        length: Tokens of the request.
        recent_tokens: Width of the exact window.
        itemsize: Bytes per number of a cache that is not quantised, and of the served maps.
        cache_format: Of the retained and the exact heads (see `quantization`).
        residual_bits: Bits per number of the coded residual beside the retained heads.
    """
    plan, shape = checkpoint.plan, checkpoint.fingerprint
    layout = PlanLayout(
        tuple(len(layer.retained) for layer in plan.layers),
        shape.num_kv_heads, shape.head_dim, itemsize,
    )  # fmt: skip
    numbers_per_slot = layout.bytes_per_slot // itemsize
    slot = round(numbers_per_slot * bytes_per_number(cache_format, shape.head_dim, itemsize))
    retained, residual = layout.retained_slots * slot, layout.residual_slots * slot
    sizes = layout.block_sizes()
    if residual_bits:
        coded = numbers_per_slot * bytes_per_number(f"int{residual_bits}", shape.head_dim)
        retained += round(layout.residual_slots * coded)
        sizes = solve_block_sizes(retained, residual)
    block_bytes = max(sizes.retained * retained, sizes.residual * residual)
    num_retained = -(-length // sizes.retained)
    num_residual = -(-length // sizes.residual)
    # The first page stays for the sinks, and every page from the window's first token on.
    before_window = max(0, length - recent_tokens) // sizes.residual
    num_kept = num_residual - max(0, before_window - 1)
    numbers = sum(
        tensor.numel() for maps in checkpoint.maps.values() for tensor in maps.named().values()
    )
    return Footprint(
        full=layout.full_bytes_per_token,
        retained=retained,
        at_length=(num_retained + num_kept) * block_bytes / length,
        maps=numbers * itemsize,
    )


def full_footprint(
    shape: ModelFingerprint, length: int, itemsize: int, cache_format: str
) -> Footprint:
    """Bytes of a full cache of some format; nothing is discarded.

    Args:
        shape: The model.
        length: Tokens of the request.
        itemsize: Bytes per number of a cache that is not quantised.
        cache_format: See `quantization`.
    """
    numbers = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    retained = numbers * bytes_per_number(cache_format, shape.head_dim, itemsize)
    in_blocks = -(-length // _STOCK_BLOCK) * _STOCK_BLOCK
    return Footprint(numbers * itemsize, retained, retained * in_blocks / length, 0)
