"""Which copy of a block the prefix cache hands out.

vLLM keeps every block published under a hash and hands out the oldest. A request that computed a
prefix again, because its D blocks were gone, publishes new D blocks beside new R blocks; as long
as the old R blocks come first, no lookup finds a D block next to the R block it belongs to, and
all that follow compute the prefix once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes

if TYPE_CHECKING:
    from echokv_vllm.scheduler.residual import EchoResidualManager


def offer_own_pairs(manager: EchoResidualManager, request: Any) -> None:
    """Makes a lookup find the blocks a request has just published, where it finds no pair.

    Other copies leave the prefix cache; requests that hold them keep them.

    Args:
        manager: The D manager; both groups have published the request's blocks.
        request: vLLM's request.
    """
    retained = manager.link.retained
    ledger = manager.ledgers.get(request.request_id)
    if ledger is None or retained is None:
        return
    r_size, d_size = retained.block_size, manager.block_size
    r_row = retained.req_to_blocks[request.request_id]
    d_row = manager.req_to_blocks[request.request_id]
    first = max(ledger.num_settled, ledger.num_adopted // r_size)
    end = min(
        retained.num_cached_block.get(request.request_id, 0),
        manager.num_cached_block.get(request.request_id, 0) * d_size // r_size,
    )
    if first >= end:
        return
    hash_size = manager.block_pool.hash_block_size
    r_hashes = resolve_block_hashes(request.block_hashes, hash_size, r_size)
    d_hashes = resolve_block_hashes(request.block_hashes, hash_size, d_size)
    for index in range(first, end):
        pages = range(-(-index * r_size // d_size), -(-(index + 1) * r_size // d_size))
        own_r = (retained, r_row[index], r_hashes[index])
        own_d = [(manager, d_row[page], d_hashes[page]) for page in pages]
        # A page that was dropped, or has left the cache, makes no pair.
        is_whole = all(block.block_hash is not None for _, block, _ in (own_r, *own_d))
        if own_d and is_whole and not _is_pair_offered(manager, own_r, own_d):
            for copy in (own_r, *own_d):
                _evict_others(*copy)
    ledger.num_settled = end


def _is_pair_offered(manager: EchoResidualManager, own_r: Any, own_d: list[Any]) -> bool:
    r_block, partner = _offered(own_r[0], own_r[2]), manager.link.partner
    return all(
        partner.get(_offered(group, block_hash).block_id) == r_block.block_id
        for group, _, block_hash in own_d
    )


def _offered(group: Any, block_hash: Any) -> Any:
    return group.block_pool.get_cached_block(block_hash, [group.kv_cache_group_id])[0]


def _evict_others(group: Any, block: Any, block_hash: Any) -> None:
    while (offered := _offered(group, block_hash)) is not block:
        group.block_pool.evict_blocks({offered.block_id})
