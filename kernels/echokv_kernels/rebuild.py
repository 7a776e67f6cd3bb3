"""Keys and values of the discarded heads of a context, laid out in a workspace.

Prefill has many queries per cached token, so what was dropped is rebuilt once per step, tile by
tile, and ordinary attention runs over the workspace as over a paged KV cache: tile i is page i,
`workspace[..., 0, :]` the keys and `workspace[..., 1, :]` the values.
"""

from __future__ import annotations

import torch

from .reconstruct import EchoMaps, FeatureSource, rebuild
from .rotary import Rotary
from .store import gather_pages


def materialize(
    workspace: torch.Tensor,
    tile_request: torch.Tensor,
    tile_start: torch.Tensor,
    features: FeatureSource,
    maps: EchoMaps,
    group_heads: torch.Tensor,
    residual_cache: torch.Tensor,
    residual_table: torch.Tensor,
    exact: torch.Tensor,
    compressed: torch.Tensor,
    retained_table: torch.Tensor,
    seq_lens: torch.Tensor,
    context_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    discarded: torch.Tensor,
    rotation: Rotary,
    rotation_block: int,
) -> None:
    """Fills the places of some discarded heads in the tiles of compressed requests.

    A position of this step is copied from `key` and `value`, one in an exact page from that page,
    any other one of the context is rebuilt. Positions from the request's length on become 0.
    Tiles that are unused, or of requests that are not compressed, keep what they hold.

    Args:
        workspace: [num_tiles, TILE, nd, 2, head_dim] model dtype, written in place.
        tile_request: [num_tiles] int, row of the tables below; -1 marks an unused tile.
        tile_start: [num_tiles] int, first position of each tile.
        features: where the features lie; addressed by `retained_table`.
        maps: maps of the heads to fill.
        group_heads: [maps.num_heads] int, their places among the layer's nd discarded heads.
        residual_cache: [num_blocks, nd, bsD, 2 * head_dim].
        residual_table: [n, PD] int.
        exact: [n, >= PD] uint8 or bool, whether a residual page may be read. Columns beyond it
            are not exact.
        compressed: [n] int, 0 for requests to leave out.
        retained_table: [n, PR] int.
        seq_lens: [n] int, tokens of each request with this step's.
        context_lens: [n] int, tokens before this step.
        query_start_loc: [n + 1] int, first token of each request in `key` and `value`.
        key: [T, H, head_dim] this step's keys of all KV heads, rotated.
        value: [T, H, head_dim].
        discarded: [nd] int, KV head of each place.
        rotation: the model's rotary embedding.
        rotation_block: rotation block the maps were trained with.

    Raises:
        ValueError: shapes do not fit together.
    """
    check_materialize(
        workspace, features.num_heads, features.head_dim, maps, residual_cache, key, rotation_block
    )
    tile_len, head_dim = workspace.shape[1], maps.head_dim
    places = group_heads.to(torch.int64)
    heads = discarded.to(torch.int64)[places]
    for tile, (request, start) in enumerate(
        zip(tile_request.tolist(), tile_start.tolist(), strict=True)
    ):
        if request < 0 or not int(compressed[request]):
            continue
        seq_len, context_len = int(seq_lens[request]), int(context_lens[request])
        stop = min(start + tile_len, seq_len)
        filled = torch.zeros(tile_len, len(places), 2, head_dim, device=workspace.device)
        num_cached = max(0, min(stop, context_len) - start)
        if num_cached:
            filled[:num_cached] = _cached_positions(
                start, start + num_cached, features, maps, places, residual_cache,
                residual_table[request], exact[request], retained_table[request],
                rotation, rotation_block,
            )  # fmt: skip
        if stop > start + num_cached:
            first = int(query_start_loc[request]) + start + num_cached - context_len
            fresh = slice(first, first + stop - start - num_cached)
            fresh_slots = torch.stack((key[fresh][:, heads], value[fresh][:, heads]), dim=2)
            filled[num_cached : stop - start] = fresh_slots.to(torch.float32)
        workspace[tile][:, places] = filled.to(workspace.dtype)


def _cached_positions(
    start: int,
    stop: int,
    features: FeatureSource,
    maps: EchoMaps,
    places: torch.Tensor,
    residual_cache: torch.Tensor,
    residual_pages: torch.Tensor,
    exact: torch.Tensor,
    retained_pages: torch.Tensor,
    rotation: Rotary,
    rotation_block: int,
) -> torch.Tensor:
    """Positions [start, stop) of one request's context, [stop - start, heads, 2, d] float32."""
    positions = torch.arange(start, stop, device=exact.device)
    block_size = residual_cache.shape[2]
    page = positions // block_size
    num_pages = min(len(exact), len(residual_pages))
    is_exact = (page < num_pages) & (exact[page.clamp(max=num_pages - 1)] != 0)
    first_page, last_page = start // block_size, (stop - 1) // block_size
    pages = gather_pages(
        residual_cache, residual_pages[None], first_page, last_page - first_page + 1, places
    )
    slots = pages[0].transpose(1, 2).flatten(0, 1)[start - first_page * block_size :]
    stored = slots[: stop - start].unflatten(-1, (2, maps.head_dim)).to(torch.float32)
    context = features.gather(retained_pages[None], start, stop)
    rebuilt_key, rebuilt_value = rebuild(context, maps, positions, rotation, rotation_block)
    rebuilt = torch.stack((rebuilt_key[0], rebuilt_value[0]), dim=2).transpose(0, 1)
    return torch.where(is_exact[:, None, None, None], stored, rebuilt)


def check_materialize(
    workspace: torch.Tensor,
    num_sources: int,
    source_head_dim: int,
    maps: EchoMaps,
    residual_cache: torch.Tensor,
    key: torch.Tensor,
    rotation_block: int,
) -> None:
    """Raises ValueError if workspace, sources, maps, pages and keys do not belong together."""
    num_places, head_dim = residual_cache.shape[1], maps.head_dim
    if workspace.shape[2:] != (num_places, 2, head_dim):
        raise ValueError(
            f"a workspace with tiles of {tuple(workspace.shape[1:])} cannot hold the {num_places} "
            f"heads of {head_dim} elements of the residual pages; it must be "
            f"[num_tiles, TILE, {num_places}, 2, {head_dim}]"
        )
    if num_sources * source_head_dim != maps.width or source_head_dim != head_dim:
        raise ValueError(
            f"{num_sources} source heads of {source_head_dim} elements do not feed maps of "
            f"{maps.width} features and {head_dim} elements; pass the sources of the maps' plan"
        )
    if residual_cache.shape[3] != 2 * head_dim or key.shape[2] != head_dim:
        raise ValueError(
            f"slots of {residual_cache.shape[3]} elements and keys of {key.shape[2]}; the maps "
            f"want {2 * head_dim} and {head_dim}"
        )
    if rotation_block < 0:
        raise ValueError(
            f"rotation_block is {rotation_block}; use 0 (absolute), 1 (un-rotated) or a longer "
            "block"
        )
