"""Dropping residual pages: pure bookkeeping in the scheduler, no copy, no message.

A dropped page goes back to the pool. The worker's block table keeps the stale entry, and
its stamp stays valid until the pool hands the page out again, so dropping early costs
nothing until the memory is really used.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from echokv_vllm.scheduler.ledger import AUTO, COMPRESSED, FULL, RequestLedger
from echokv_vllm.scheduler.policy import Hysteresis, share_out

if TYPE_CHECKING:
    from echokv_vllm.scheduler.residual import EchoResidualManager


class PressureValve:
    """Takes residual pages from ``auto`` requests and gives them back to the pool.

    Args:
        manager: The D manager whose requests are concerned.
    """

    def __init__(self, manager: EchoResidualManager) -> None:
        self.manager = manager
        settings = manager.settings
        self.hysteresis = Hysteresis(settings.restore_below, settings.restore_steps)

    def relieve(self, shortfall: int, protected: Collection[int]) -> bool:
        """Frees at least ``shortfall`` pages; drops nothing when requests hold fewer.

        Args:
            shortfall: Pages the allocation under way is short of.
            protected: Block ids that allocation would adopt from the prefix cache.

        Returns:
            Whether the pages are free now.
        """
        manager = self.manager
        holdings = {
            request_id: count
            for request_id, ledger in manager.ledgers.items()
            if ledger.requested == AUTO and (count := self.num_droppable(request_id, ledger))
        }
        if sum(holdings.values()) < shortfall:
            return False
        # One page per running request on top: every one of them will ask soon, and the
        # scan over requests is what costs. The extra pages stay exact until reused.
        wanted = shortfall + len(manager.ledgers)
        num_freed = 0
        for request_id, count in share_out(holdings, wanted).items():
            num_freed += self._drop_oldest(request_id, protected, max_pages=count)
        # A page another request shares frees nothing: go on until the pages are there.
        for request_id in sorted(holdings, key=lambda name: -holdings[name]):
            if num_freed >= shortfall:
                break
            num_freed += self._drop_oldest(request_id, protected, max_freed=shortfall - num_freed)
        return num_freed >= shortfall

    def num_droppable(self, request_id: str, ledger: RequestLedger) -> int:
        """Pages between the sink page and the recent window, gaps counted."""
        num_pages = len(self.manager.req_to_blocks.get(request_id, ()))
        return max(0, self._drop_end(ledger.num_committed, num_pages) - ledger.next_drop)

    def drop_left_window(self, request_id: str, ledger: RequestLedger) -> None:
        """Drops what left the recent window of a compressed request.

        Called while the request itself is being allocated, so nothing it publishes in
        this step can be affected: the managers clamp to the taint set here.
        """
        dropped = self._take_oldest(request_id, ledger)
        self.manager.counters.window_pages_dropped += len(dropped)
        self.manager.block_pool.free_blocks(dropped)

    def restore_when_calm(self) -> None:
        """Lets compressed ``auto`` requests keep residuals of new tokens again.

        What was dropped stays dropped: rebuilding it would only store the approximation.
        """
        if not self.hysteresis.update(self.manager.block_pool.get_usage()):
            return
        for request_id, ledger in self.manager.ledgers.items():
            running = request_id in self.manager.num_cached_block
            if running and ledger.requested == AUTO and ledger.mode == COMPRESSED:
                ledger.mode = FULL
                self.manager.counters.restored += 1

    def has_left_window(self, ledger: RequestLedger, num_pages: int, num_committed: int) -> bool:
        """Whether a compressed request would drop pages, had it so many committed tokens."""
        return ledger.next_drop < self._drop_end(num_committed, num_pages)

    def _drop_end(self, num_committed: int, num_pages: int) -> int:
        """Index behind the last of a request's pages that lies outside the recent window."""
        # Only pages whose tokens are all committed: the worker keeps its stale table
        # entry, so nothing may ever be written through it again.
        settings = self.manager.settings
        window = max(0, num_committed - settings.recent_tokens) // self.manager.block_size
        return min(window, num_pages)

    def _drop_oldest(
        self,
        request_id: str,
        protected: Collection[int],
        max_pages: int | None = None,
        max_freed: int | None = None,
    ) -> int:
        """Drops pages of one request under pressure; see ``_take_oldest`` for the limits.

        Returns:
            Pages that became free. Not counted: pages another request holds, and pages
            that the allocation under way takes back.
        """
        manager = self.manager
        ledger = manager.ledgers[request_id]
        if not self._unpublish_uncommitted(request_id, ledger, protected):
            return 0
        was_exact = ledger.taint is None
        dropped = self._take_oldest(request_id, ledger, protected, max_pages, max_freed)
        manager.counters.pages_dropped += len(dropped)
        if was_exact and dropped:
            manager.count_demotion(ledger)
        num_freed = sum(_is_freeable(block, protected) for block in dropped)
        manager.block_pool.free_blocks(dropped)
        return num_freed

    def _take_oldest(
        self,
        request_id: str,
        ledger: RequestLedger,
        protected: Collection[int] = (),
        max_pages: int | None = None,
        max_freed: int | None = None,
    ) -> list[Any]:
        """Takes the oldest pages outside the window out of a request's row.

        Args:
            request_id: The request.
            ledger: Its state.
            protected: Block ids whose release does not count for ``max_freed``.
            max_pages: Most pages to take; None for all.
            max_freed: Stop once this many of them would become free.

        Returns:
            The blocks, oldest first, for the caller to release.
        """
        manager = self.manager
        blocks = manager.req_to_blocks.get(request_id, [])
        end = self._drop_end(ledger.num_committed, len(blocks))
        taken: list[Any] = []
        num_freed = 0
        while ledger.next_drop < end and len(taken) != max_pages and num_freed != max_freed:
            block = blocks[ledger.next_drop]
            if not block.is_null:
                blocks[ledger.next_drop] = manager.null_block
                taken.append(block)
                num_freed += _is_freeable(block, protected)
            ledger.next_drop += 1
        if taken:
            manager.num_held_pages -= len(taken)
            # Steps in flight were launched with the pages in place; from the first token
            # that is not committed on, K/V may be inexact.
            ledger.taint_from(ledger.num_committed)
        return taken

    def _unpublish_uncommitted(
        self, request_id: str, ledger: RequestLedger, protected: Collection[int]
    ) -> bool:
        """Takes back what this request published ahead of its computation.

        vLLM publishes a block when it schedules the step that will write it. A page lost
        later in the same scheduling pass makes that step inexact, so the blocks beyond the
        committed tokens must leave the prefix cache before any page goes.

        Returns:
            False when one of them is already adopted by another request: then nothing may
            be dropped from this request in this step.
        """
        manager = self.manager
        if not (manager.enable_caching and manager.settings.strict):
            return True
        assert manager.link.retained is not None
        ahead = []
        for group in (manager.link.retained, manager):
            first = ledger.num_committed // group.block_size
            for block in group.req_to_blocks.get(request_id, [])[first:]:
                if block.block_hash is not None:
                    ahead.append(block)
        if any(_is_adopted(block, protected) for block in ahead):
            return False
        if ahead:
            manager.block_pool.evict_blocks({block.block_id for block in ahead})
        return True


def _is_adopted(block: Any, protected: Collection[int]) -> bool:
    return bool(block.ref_cnt > 1 or block.block_id in protected)


def _is_freeable(block: Any, protected: Collection[int]) -> bool:
    return bool(block.ref_cnt == 1 and block.block_id not in protected)
