"""Writing, reading and stamping the pages of a paged KV cache.

A cache is a view [num_blocks, num_heads, block_size, 2 * head_dim] (layout.py). Its blocks lie
far apart in memory, so it must be indexed and never reshaped.

The functions that write have no shape that depends on data, so they can run in a captured
graph. Tokens to leave out are masked: they put back what they found, or what is always there.

Page stamps (design: engine.md §3.2). `owner[page]` names the retained slot of the first token of
a residual page, or is -1. All residual pages of a request are found through its block table, but
an entry may be stale: the scheduler may have given the page away without telling anyone. A page
is exact, and may be read, only if its stamp is the one that its place in the table demands.
"""

from __future__ import annotations

import torch


def write_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    heads: torch.Tensor | None = None,
    first_slot: int = 0,
) -> None:
    """Stores one step's keys and values: token slot s goes to `cache[s // bs, :, s % bs]`.

    Args:
        key: [T, H, head_dim], any float dtype.
        value: [T, H, head_dim].
        cache: [num_blocks, num_heads, block_size, 2 * head_dim], written in place.
        slot_mapping: [>= T] int; slots must differ unless they are left out.
        heads: [num_heads] int64, heads to store, in cache order; None stores all of them.
        first_slot: slots below it are left out. 0 leaves out padding (-1); residual pages pass
            the block size, so that the null page 0 keeps its content.

    Raises:
        ValueError: the heads or the head size do not match the cache.
    """
    if heads is not None:
        key, value = key[:, heads], value[:, heads]
    fresh = torch.cat((key, value), dim=-1).to(cache.dtype)
    if fresh.shape[1:] != (cache.shape[1], cache.shape[3]):
        raise ValueError(
            f"{fresh.shape[1]} heads of {fresh.shape[2]} elements (K and V) do not fit a cache "
            f"with {cache.shape[1]} heads of {cache.shape[3]}; pass the heads the cache holds"
        )
    block_size = cache.shape[2]
    slot = slot_mapping[: fresh.shape[0]].to(torch.int64)
    wanted = slot >= first_slot
    slot = torch.where(wanted, slot, 0)
    block, offset = slot // block_size, slot % block_size
    kept = cache[block, :, offset]
    cache[block, :, offset] = torch.where(wanted[:, None, None], fresh, kept)


def gather_pages(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    first_page: int,
    num_pages: int,
    heads: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pages `first_page ...` of each block table row, [rows, num_pages, heads, bs, 2 * head_dim].

    Columns beyond the table repeat its last one; callers mask such tokens.

    Args:
        cache: [num_blocks, num_heads, block_size, 2 * head_dim].
        block_table: [rows, P] int.
        first_page: column to start at.
        num_pages: columns to gather.
        heads: int64 indices of the heads to read; None reads all.
    """
    column = torch.arange(first_page, first_page + num_pages, device=block_table.device)
    block = block_table[:, column.clamp(max=block_table.shape[1] - 1)].to(torch.int64)
    if heads is None:
        # On CPUs three times as fast as indexing a view whose blocks are far apart.
        return cache.index_select(0, block.flatten()).unflatten(0, block.shape)
    return cache[block[..., None], heads]


def stamp_owners(
    owner: torch.Tensor,
    retained_slots: torch.Tensor,
    residual_slots: torch.Tensor,
    retained_block_size: int,
    residual_block_size: int,
) -> None:
    """Stamps the pages that one step writes; once per step, before anything reads.

    A page with a retained token becomes -1. A residual page whose first token is written now
    gets that token's retained slot. Null page 0 always stays -1, so padding writes -1 there.

    Args:
        owner: [num_blocks] int64, changed in place.
        retained_slots: [T] int, slots of the step's tokens in retained pages, padding -1.
        residual_slots: [T] int, slots in residual pages; padding, and slots of page 0, do not
            count.
        retained_block_size: tokens per retained page.
        residual_block_size: tokens per residual page.

    Raises:
        ValueError: the two slot mappings describe different numbers of tokens.
    """
    if retained_slots.shape != residual_slots.shape:
        raise ValueError(
            f"{retained_slots.shape[0]} retained and {residual_slots.shape[0]} residual slots; "
            "pass the slots of the same tokens"
        )
    retained_slots = retained_slots.to(torch.int64)
    residual_slots = residual_slots.to(torch.int64)
    none = retained_slots.new_full((), -1)
    real = retained_slots >= retained_block_size
    owner[torch.where(real, retained_slots // retained_block_size, 0)] = none
    starts_page = (residual_slots >= residual_block_size) & (
        residual_slots % residual_block_size == 0
    )
    claims = real & starts_page
    page = torch.where(claims, residual_slots // residual_block_size, 0)
    owner[page] = torch.where(claims, retained_slots, none)


def exact_pages(
    owner: torch.Tensor,
    retained_table: torch.Tensor,
    residual_table: torch.Tensor,
    retained_block_size: int,
    residual_block_size: int,
) -> torch.Tensor:
    """Which residual pages hold what their place in the block table says.

    Args:
        owner: [num_blocks] int64 (`stamp_owners`).
        retained_table: [n, PR] int, block ids of the retained pages.
        residual_table: [n, PD] int, block ids of the residual pages, 0 where there is none.
        retained_block_size: tokens per retained page.
        residual_block_size: tokens per residual page.

    Returns:
        [n, PD] bool. Columns beyond a request's length are meaningless.
    """
    num_pages = residual_table.shape[1]
    first_token = torch.arange(num_pages, device=owner.device) * residual_block_size
    column = (first_token // retained_block_size).clamp(max=retained_table.shape[1] - 1)
    retained_block = retained_table[:, column].to(torch.int64)
    tag = retained_block * retained_block_size + first_token % retained_block_size
    page = residual_table.to(torch.int64)
    return (page != 0) & (owner[page] == tag)
