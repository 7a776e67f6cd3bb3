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
        max_length: Upper bound in tokens, the R group's hit, which was looked up just before.
        group_ids: Ids of the D group.
        block_pool: The pool both groups draw on.
        block_size: Tokens per D page.
        alignment_tokens: The hit's length must be a multiple of this.

    Returns:
        One list of blocks per group id, and the hit's length in tokens.
    """
    link = link_of(block_pool)
    assert link.retained is not None and link.residual is not None
    hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, block_size)
    r_size = link.retained.block_size
    found: tuple[list[Any], ...] = tuple([] for _ in group_ids)
    is_exact = True
    for index, block_hash in enumerate(itertools.islice(hashes, max_length // block_size)):
        hit = block_pool.get_cached_block(block_hash, list(group_ids))
        is_unpaired = hit and not _is_paired(link, hit[0], index * block_size // r_size)
        if not hit or is_unpaired:
            if is_exact and link.strict and link.residual.wants_exact_hit(index * block_size):
                if is_unpaired:
                    link.residual.count_cut_lookup()
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


def _is_paired(link: PoolLink, block: Any, r_index: int) -> bool:
    partner = link.found_retained[r_index]
    return link.partner.get(block.block_id) == partner.block_id
