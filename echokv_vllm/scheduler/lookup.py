"""Prefix-cache lookup of the D group.

A D block is usable only beside the R block it was written with: the worker accepts a D
page by a stamp that names the R slot of its first token (``echokv_kernels.store``). Without one the
token's discarded heads can still be rebuilt, which spares a request its prompt where it may be
compressed: R blocks in the cache are exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes

from echokv_vllm.scheduler.link import PoolLink, link_of


def residual_hits(
    block_hashes: Any,
    max_length: int,
    group_ids: Sequence[int],
    block_pool: Any,
    block_size: int,
    alignment_tokens: int,
) -> tuple[tuple[list[Any], ...], int]:
    """The D blocks that serve a prefix hit.

    Exact: the leading run of cached blocks whose partner R block is the one the R lookup
    returns. Otherwise: every block up to ``max_length``, null where none is usable. Strict servers
    look exactly, but for requests that memory leaves no room to be full.

    Args:
        block_hashes: Chained hashes of the request's prompt.
        max_length: Upper bound in tokens, the R group's hit.
        group_ids: Ids of the D group.
        block_pool: The pool both groups draw on.
        block_size: Tokens per D page.
        alignment_tokens: The hit's length must be a multiple of this.

    Returns:
        One list of blocks per group id, and the hit's length in tokens.
    """
    link = link_of(block_pool)
    assert link.retained is not None and link.residual is not None
    hash_size = block_pool.hash_block_size
    hashes = resolve_block_hashes(block_hashes, hash_size, block_size)
    r_size = link.retained.block_size
    r_hashes = resolve_block_hashes(block_hashes, hash_size, r_size)
    found: tuple[list[Any], ...] = tuple([] for _ in group_ids)
    is_exact = True
    for index, block_hash in enumerate(itertools.islice(hashes, max_length // block_size)):
        hit = block_pool.get_cached_block(block_hash, list(group_ids))
        if hit and not _is_paired(link, hit[0], block_pool, r_hashes, index * block_size // r_size):
            link.residual.counters.hits_unpaired += 1
            hit = None
        if not hit:
            if is_exact and link.strict and link.residual.wants_exact_hit(index * block_size):
                break
            is_exact = False
            hit = [block_pool.null_block] * len(found)
        for blocks, block in zip(found, hit, strict=True):
            blocks.append(block)
    length = len(found[0]) * block_size
    length -= length % alignment_tokens
    for blocks in found:
        del blocks[length // block_size :]
    return found, length


def _is_paired(link: PoolLink, block: Any, block_pool: Any, r_hashes: Any, r_index: int) -> bool:
    assert link.retained is not None
    if r_index >= len(r_hashes):
        return False
    partner = block_pool.get_cached_block(r_hashes[r_index], [link.retained.kv_cache_group_id])
    return bool(partner) and link.partner.get(block.block_id) == partner[0].block_id
