"""Storing one step's keys and values in the pages of both groups, in one launch.

Reference: `echokv_kernels.store.write_pages`, once for the retained and once for the residual
pages of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from echokv_kernels.gpu.overlap import let_next_begin, overlap


@dataclass(frozen=True)
class StoreTile:
    """One program's share of a step.

    Attributes:
        num_elements: elements of the keys (and as many of the values) of one head.
        num_warps: warps that copy them.
    """

    num_elements: int
    num_warps: int


# A decode step should spread over as many multiprocessors as it can; a prefill chunk should keep
# several 16-byte loads per thread in flight.
DECODE_TILE = StoreTile(num_elements=512, num_warps=1)
PREFILL_TILE = StoreTile(num_elements=4096, num_warps=4)
MAX_DECODE_LEN = 256  # tokens; longer steps take the prefill tile
VARIANT_LENS = (1, MAX_DECODE_LEN + 1)  # tokens of steps that together need every compiled variant


def place_heads(
    retained: Sequence[int], discarded: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Where each head of a layer is stored, as `store_pages` takes it. Not while serving.

    Args:
        retained: heads of the R page, in page order.
        discarded: heads of the D page, in page order.
        device: where the kernels run.

    Returns:
        [H] int32: p >= 0 is place p of the R page, -1 - p place p of the D page.

    Raises:
        ValueError: the heads are not 0 ... H - 1, each once.
    """
    heads = [*retained, *discarded]
    if sorted(heads) != list(range(len(heads))):
        raise ValueError(
            f"retained heads {list(retained)} and discarded heads {list(discarded)} are not the "
            f"heads 0 to {len(heads) - 1}, each once; list every KV head of the layer"
        )
    places = [0] * len(heads)
    for place, head in enumerate(retained):
        places[head] = place
    for place, head in enumerate(discarded):
        places[head] = -1 - place
    return torch.tensor(places, dtype=torch.int32, device=device)


@triton.jit
def _write_head(
    key_ptr,  # [T, HEAD_DIM] any float: one head of the step
    value_ptr,  # [T, HEAD_DIM] any float
    cache_ptr,  # [num_blocks, num_heads, BLOCK_SIZE, 2 * HEAD_DIM] any float, or None
    slots_ptr,  # [>= T] int64 or int32, or None
    place,  # of the head in the cache
    token,  # [TOKEN_BLOCK] int32
    num_tokens,
    stride_key_token,
    stride_value_token,
    stride_cache_block,
    stride_cache_head,
    FIRST_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    if cache_ptr is not None:
        slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1).to(tl.int64)
        wanted = slot >= FIRST_SLOT
        element = tl.arange(0, PADDED_DIM)
        mask = wanted[:, None]
        if PADDED_DIM != HEAD_DIM:
            mask = mask & (element < HEAD_DIM)[None, :]
        token = token.to(tl.int64)
        key = tl.load(key_ptr + (token * stride_key_token)[:, None] + element[None, :], mask=mask)
        value = tl.load(
            value_ptr + (token * stride_value_token)[:, None] + element[None, :], mask=mask
        )
        slot = tl.where(wanted, slot, 0)
        start = (
            (slot // BLOCK_SIZE) * stride_cache_block
            + place.to(tl.int64) * stride_cache_head
            + (slot % BLOCK_SIZE) * (2 * HEAD_DIM)
        )
        at = cache_ptr + start[:, None] + element[None, :]
        tl.store(at, key.to(cache_ptr.dtype.element_ty), mask=mask)
        tl.store(at + HEAD_DIM, value.to(cache_ptr.dtype.element_ty), mask=mask)


# vLLM keeps the slots of every group in a row of one table; rows need not be aligned.
@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["retained_slots_ptr", "residual_slots_ptr"],
)
def _store_kernel(
    key_ptr,  # [T, H, HEAD_DIM] any float
    value_ptr,  # [T, H, HEAD_DIM] any float
    retained_cache_ptr,  # [num_blocks, m, RETAINED_BLOCK, 2 * HEAD_DIM] any float, or None
    residual_cache_ptr,  # [num_blocks, H - m, RESIDUAL_BLOCK, 2 * HEAD_DIM] any float, or None
    retained_slots_ptr,  # [>= T] int64 or int32, or None
    residual_slots_ptr,  # [>= T] int64 or int32, or None
    head_places_ptr,  # [H] int32
    num_tokens,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_retained_block,
    stride_retained_head,
    stride_residual_block,
    stride_residual_head,
    RETAINED_BLOCK: tl.constexpr,
    RESIDUAL_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_begin(PDL)
    head = tl.program_id(0)
    token = tl.program_id(1) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    place = tl.load(head_places_ptr + head)
    key_ptr += head.to(tl.int64) * stride_key_head
    value_ptr += head.to(tl.int64) * stride_value_head
    if place >= 0:
        _write_head(
            key_ptr, value_ptr, retained_cache_ptr, retained_slots_ptr,
            place, token, num_tokens, stride_key_token, stride_value_token,
            stride_retained_block, stride_retained_head,
            0, RETAINED_BLOCK, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    else:
        _write_head(
            key_ptr, value_ptr, residual_cache_ptr, residual_slots_ptr,
            -1 - place, token, num_tokens, stride_key_token, stride_value_token,
            stride_residual_block, stride_residual_head,
            RESIDUAL_BLOCK, RESIDUAL_BLOCK, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip


def _check_group(
    name: str, cache: torch.Tensor | None, slots: torch.Tensor | None, key: torch.Tensor
) -> None:
    if (cache is None) != (slots is None):
        raise ValueError(f"only one of {name}_cache and {name}_slots is given; pass both or none")
    if cache is None or slots is None:
        return
    num_tokens, _, head_dim = key.shape
    slot_size = 2 * head_dim
    if cache.dim() != 4 or cache.shape[3] != slot_size or cache.stride()[2:] != (slot_size, 1):
        raise ValueError(
            f"{name}_cache has shape {tuple(cache.shape)} and strides {cache.stride()}; slots of "
            f"heads of {head_dim} elements are {slot_size} contiguous elements, one after another"
        )
    if slots.dim() != 1 or slots.stride(0) != 1 or slots.shape[0] < num_tokens:
        raise ValueError(
            f"{name}_slots has shape {tuple(slots.shape)} and strides {slots.stride()}; pass at "
            f"least {num_tokens} contiguous slots, one per token"
        )
    if slots.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}_slots has dtype {slots.dtype}; pass int64 or int32")


def _check(
    key: torch.Tensor,
    value: torch.Tensor,
    retained_cache: torch.Tensor | None,
    residual_cache: torch.Tensor | None,
    head_places: torch.Tensor,
) -> None:
    if key.dim() != 3 or key.shape != value.shape or key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError(
            f"key and value have shapes {tuple(key.shape)} and {tuple(value.shape)}, strides "
            f"{key.stride()} and {value.stride()}; pass two [tokens, heads, head_dim] views whose "
            "last axis is contiguous"
        )
    num_heads = sum(
        cache.shape[1] for cache in (retained_cache, residual_cache) if cache is not None
    )
    if num_heads != key.shape[1] or head_places.shape != (num_heads,):
        raise ValueError(
            f"{key.shape[1]} heads with places of shape {tuple(head_places.shape)} do not fit "
            f"caches with {num_heads} heads together; every head needs one place in one cache"
        )
    if head_places.dtype != torch.int32 or not head_places.is_contiguous():
        raise ValueError(
            f"head_places has dtype {head_places.dtype} and strides {head_places.stride()}; pass "
            "contiguous int32 (place_heads makes it)"
        )


def store_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    retained_cache: torch.Tensor | None,
    residual_cache: torch.Tensor | None,
    retained_slots: torch.Tensor | None,
    residual_slots: torch.Tensor | None,
    head_places: torch.Tensor,
) -> None:
    """Stores one step's keys and values in R and D pages. One launch, no allocation, no sync.

    Tokens whose slot is negative (padding) are left out; so are residual slots of null page 0.
    Numbers are cast to the caches' dtypes.

    Args:
        key: [T, H, head_dim], any float dtype; token and head strides are free.
        value: [T, H, head_dim], likewise.
        retained_cache: [num_blocks, m, R block size, 2 * head_dim], or None for a layer without
            retained heads.
        residual_cache: [num_blocks, H - m, D block size, 2 * head_dim], or None for a layer that
            discards nothing. Both may be views of one pool.
        retained_slots: [>= T] int64 or int32, slots in R pages; None exactly if the cache is.
        residual_slots: [>= T], likewise in D pages.
        head_places: [H] int32 (`place_heads`). Its values are not checked.

    Raises:
        ValueError: a shape, stride or dtype does not fit.
    """
    _check(key, value, retained_cache, residual_cache, head_places)
    _check_group("retained", retained_cache, retained_slots, key)
    _check_group("residual", residual_cache, residual_slots, key)
    num_tokens, num_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    padded_dim = triton.next_power_of_2(head_dim)
    tile = DECODE_TILE if num_tokens <= MAX_DECODE_LEN else PREFILL_TILE
    token_block = max(1, tile.num_elements // padded_dim)
    retained = (0, 0, 1) if retained_cache is None else _extent(retained_cache)
    residual = (0, 0, 1) if residual_cache is None else _extent(residual_cache)
    _store_kernel[(num_heads, triton.cdiv(num_tokens, token_block))](
        key,
        value,
        retained_cache,
        residual_cache,
        retained_slots,
        residual_slots,
        head_places,
        num_tokens,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *retained[:2],
        *residual[:2],
        RETAINED_BLOCK=retained[2],
        RESIDUAL_BLOCK=residual[2],
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        TOKEN_BLOCK=token_block,
        PDL=overlap(key.device)["PDL"],
        num_warps=tile.num_warps,
    )


def _extent(cache: torch.Tensor) -> tuple[int, int, int]:
    """Block stride, head stride and tokens per page."""
    return cache.stride(0), cache.stride(1), cache.shape[2]
