"""Manager of group R: the retained heads of every token of every request.

R behaves like vLLM's full attention group. What is added: the D manager learns how many
pages R needs (the two draw on one pool), and inexact blocks are not published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from echokv_vllm.scheduler.link import link_of


def fills_blocks(manager: Any, request_id: str, num_tokens: int) -> bool:
    """Whether so many tokens fill a block that is not in the prefix cache; most steps fill none."""
    num_cached = manager.num_cached_block.get(request_id, 0)
    return bool(num_tokens // manager.block_size > num_cached)


class EchoRetainedManager(FullAttentionManager):
    """See the module docstring. Arguments are vLLM's."""

    # A hit must end on a block boundary of both groups; half a block of one is no use.
    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: Any, block_pool: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, *args, **kwargs)
        self.link = link_of(block_pool)
        self.link.retained = self

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """vLLM's count, noted down for the D manager, which is asked next."""
        need = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        link = self.link
        link.retained_need = (request_id, need)
        # Only newcomers have hits.
        link.retained_hits = (
            frozenset(block.block_id for block in new_computed_blocks)
            if new_computed_blocks
            else frozenset()
        )
        return int(need)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publishes blocks up to the first token that was computed inexactly.

        K/V computed while attending to rebuilt heads differ from exact K/V; a request in
        full mode must never adopt them.
        """
        assert self.link.residual is not None, "echokv: group R without group D"
        limit = self.link.residual.publishable_tokens(request.request_id)
        num_tokens = min(num_tokens, limit)
        self.link.has_published = fills_blocks(self, request.request_id, num_tokens)
        if self.link.has_published:
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """vLLM's lookup, noted down for that of the D group, which is next."""
        found = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, *args, **kwargs
        )
        link_of(block_pool).found_retained = found[0][0]
        return found

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Cascade attention is not used (abstract in vLLM 0.31)."""
        return 0
