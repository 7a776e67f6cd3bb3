"""Cache bytes of a compressed request, as the server lays them out."""

from __future__ import annotations

from dataclasses import dataclass

from echokv_kernels.layout import PlanLayout
from echokv_vllm.checkpoint import EchoCheckpoint


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model under one checkpoint.

    Attributes:
        full: Per token with the full cache.
        retained: Per token outside the windows, no padding.
        at_length: Per token of a compressed request of the length given: retained pages, the exact
            pages of sink and recent window, and the padding of all of them.
        maps: Of the maps, once per server.
    """

    full: int
    retained: int
    at_length: float
    maps: int


def footprint(
    checkpoint: EchoCheckpoint, length: int, recent_tokens: int, itemsize: int
) -> Footprint:
    """Bytes of a compressed request of `length` tokens.

    Args:
        checkpoint: The plan and maps.
        length: Tokens of the request.
        recent_tokens: Width of the exact window.
        itemsize: Bytes per number of the cache and of the served maps.
    """
    plan, shape = checkpoint.plan, checkpoint.fingerprint
    layout = PlanLayout(
        tuple(len(layer.retained) for layer in plan.layers),
        shape.num_kv_heads, shape.head_dim, itemsize,
    )  # fmt: skip
    sizes = layout.block_sizes()
    block_bytes = max(
        sizes.retained * layout.retained_bytes_per_token,
        sizes.residual * layout.residual_bytes_per_token,
    )
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
        retained=layout.retained_bytes_per_token,
        at_length=(num_retained + num_kept) * block_bytes / length,
        maps=numbers * itemsize,
    )
