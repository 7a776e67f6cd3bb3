"""Manager of group D: the discarded ("residual") heads of tokens that are still exact.

Modes live here. A full request owns D pages for all its tokens. A compressed one owns the
sink page (page 0) and the pages of its recent window; every other row entry is the null
page, because the worker indexes the row by position and must find an entry for each. Under
pressure, pages of ``auto`` requests are dropped just before vLLM would preempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import RequestStatus

from echokv_vllm.config import SchedulerSettings
from echokv_vllm.metrics import MetricsWriter
from echokv_vllm.scheduler import policy
from echokv_vllm.scheduler.copies import offer_own_pairs
from echokv_vllm.scheduler.ledger import AUTO, COMPRESSED, FULL, Counters, RequestLedger
from echokv_vllm.scheduler.link import link_of
from echokv_vllm.scheduler.lookup import residual_hits
from echokv_vllm.scheduler.outlook import Outlook
from echokv_vllm.scheduler.pressure import PressureValve
from echokv_vllm.scheduler.retained import fills_blocks

logger = init_logger("vllm.echokv")


class EchoResidualManager(SingleTypeKVCacheManager):
    """See the module docstring. Arguments are vLLM's.

    Attributes:
        ledgers: State per request id, for requests that hold or are about to hold pages.
        num_held_pages: D pages held by requests, a shared page counted once per holder.
        counters: Totals for metrics.
    """

    def __init__(self, kv_cache_spec: Any, block_pool: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, *args, **kwargs)
        self.settings = SchedulerSettings.from_json(kv_cache_spec.echo_settings)
        self.link = link_of(block_pool)
        self.link.residual = self
        retained = self.link.retained
        assert retained is not None and retained.kv_cache_group_id < self.kv_cache_group_id, (
            "echokv: vLLM must list the retained group before the residual group"
        )
        self.ledgers: dict[str, RequestLedger] = {}
        self.num_held_pages = 0
        self.counters = Counters()
        self.valve = PressureValve(self)
        self.outlook = Outlook(self)
        self.metrics = MetricsWriter()
        self.watermark_pages = int(self.settings.watermark * block_pool.num_gpu_blocks)
        self._log_capacity()

    @property
    def null_block(self) -> Any:
        """The placeholder of tokens without an exact page."""
        return self._null_block

    @property
    def num_usable_blocks(self) -> int:
        """Pages of the pool, the null page not counted."""
        return int(self.block_pool.num_gpu_blocks) - 1

    def _log_capacity(self) -> None:
        s, usable = self.settings, self.num_usable_blocks
        per_token = 1 / s.retained_block_size + 1 / s.residual_block_size
        logger.info(
            "EchoKV: plan %s, ratio %.3f, default mode %s, prefix caching %s; pages of %d (R) "
            "and %d (D) tokens; the pool holds %d tokens in full mode, %d compressed",
            s.plan, s.ratio, s.mode, "strict" if s.strict else "shared", s.retained_block_size,
            s.residual_block_size, int(usable / per_token), usable * s.retained_block_size,
        )  # fmt: skip

    # Modes ------------------------------------------------------------------------------

    def ledger(self, request_id: str) -> RequestLedger:
        """The request's state, made on first sight (again after a preemption)."""
        ledger = self.ledgers.get(request_id)
        if ledger is None:
            ledger = self.ledgers[request_id] = RequestLedger(self._requested(request_id))
        return ledger

    def _requested(self, request_id: str) -> str:
        return self.link.requested_modes.get(request_id, self.settings.mode)

    def wants_exact_hit(self, num_exact: int) -> bool:
        """Whether the request being looked up rather computes than reads rebuilt heads.

        Args:
            num_exact: Tokens of the prefix cache it may read exactly.
        """
        request = self.link.looked_up
        if request is None:
            return True
        requested = self._requested(request.request_id)
        if requested != AUTO:
            return requested == FULL
        settings, rest = self.settings, request.num_tokens - num_exact
        return policy.admits_full(
            self.block_pool.get_num_free_blocks(),
            -(-rest // settings.retained_block_size) + -(-rest // settings.residual_block_size),
            self.num_usable_blocks,
            settings.admit_full_below,
        )

    def count_cut_lookup(self) -> None:
        """Counts a request once whose exact hit ended at a D block of another R block."""
        request = self.link.looked_up
        ledger = None if request is None else self.ledger(request.request_id)
        if ledger is None or not ledger.is_cut:
            self.counters.hits_unpaired += 1
        if ledger is not None:
            ledger.is_cut = True

    def publishable_tokens(self, request_id: str) -> int:
        """Leading tokens whose blocks may enter the prefix cache."""
        ledger = self.ledgers.get(request_id)
        if not self.settings.strict or ledger is None or ledger.taint is None:
            return 1 << 62
        return ledger.taint

    def new_step_starts(self) -> None:
        """vLLM's hook at the start of every scheduling pass."""
        self.valve.restore_when_calm()
        self._report()

    def _report(self) -> None:
        self.metrics.write(self.counters, self.num_usable_blocks, self.num_held_pages)

    # Allocation -------------------------------------------------------------------------

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """D pages the request needs, after making room for R and D pages together.

        vLLM compares the sum over groups with the free pages right after this call and
        preempts when it does not fit. This is therefore the place where modes are decided
        and where residual pages are dropped.
        """
        running = request_id in self.num_cached_block
        reserve = self._reserve(request_id, running) if self.watermark_pages else 0
        asks_nothing = running and not reserve and not self.link.retained_need[1]
        if asks_nothing and self._covers(request_id, num_tokens):
            return 0  # something is to be published or dropped, or shortcut.py would have known
        ledger = self.ledger(request_id)
        hits = (list(new_computed_blocks), num_local_computed_tokens)

        def need() -> int:
            return self._num_pages_needed(request_id, ledger, num_tokens, hits)

        def shortfall() -> int:
            name, retained_need = self.link.retained_need
            assert name == request_id, "echokv: group R must be asked before group D"
            return retained_need + need() + reserve - int(self.block_pool.get_num_free_blocks())

        if not running and (apply_admission_cap or ledger.undecided):
            if self._holds_back(request_id, ledger, num_tokens, need):
                return self.num_usable_blocks + 1  # vLLM finds that it does not fit
            self._admit(request_id, ledger, need)
        protected = self.link.retained_hits | {block.block_id for block in hits[0]}
        if shortfall() > 0 and not self.valve.relieve(shortfall(), protected):
            if ledger.requested == AUTO and ledger.mode == FULL:
                self._stop_keeping(ledger, running)
            if shortfall() > 0:
                self.valve.relieve(shortfall(), protected)
        num_pages = need()
        if not running and shortfall() > 0:
            ledger.undecided = True  # vLLM will say no; the next attempt decides anew
        return num_pages

    def _reserve(self, request_id: str, running: bool) -> int:
        """Pages vLLM keeps free beside those of the allocation under way.

        Of the watermark's, for what it takes from its waiting queue, and only beside others. There
        also waits a session with its next input, which has pages.
        """
        if len(self.num_cached_block) == running:
            return 0
        request = self.link.find_request(request_id) if running else None
        waits = not running or (request is not None and request.status == RequestStatus.WAITING)
        return self.watermark_pages if waits else 0

    def _covers(self, request_id: str, num_tokens: int) -> bool:
        return num_tokens <= len(self.req_to_blocks[request_id]) * self.block_size

    def _holds_back(
        self, request_id: str, ledger: RequestLedger, num_tokens: int, need: Any
    ) -> bool:
        if not self.settings.look_ahead:
            return False
        ledger.mode = FULL if ledger.requested == FULL else COMPRESSED
        num_pages = self.link.retained_need[1] + need()
        if self.outlook.admits(request_id, num_tokens, num_pages):
            return False
        if not ledger.held_back:
            ledger.held_back = True
            self.counters.held_back += 1
        ledger.undecided = True
        return True

    def _admit(self, request_id: str, ledger: RequestLedger, need: Any) -> None:
        ledger.undecided = False
        ledger.mode = COMPRESSED if ledger.requested == COMPRESSED else FULL
        if ledger.requested == AUTO and not policy.admits_full(
            self.block_pool.get_num_free_blocks(),
            need() + self.link.retained_need[1],
            self.num_usable_blocks,
            self.settings.admit_full_below,
        ):
            ledger.mode = COMPRESSED

    def _stop_keeping(self, ledger: RequestLedger, running: bool) -> None:
        if running:
            self.count_demotion(ledger)
        ledger.mode = COMPRESSED

    def count_demotion(self, ledger: RequestLedger) -> None:
        """Counts an ``auto`` request once, when it first gives up residuals."""
        if not ledger.demoted:
            ledger.demoted = True
            self.counters.demoted += 1

    def _num_pages_needed(
        self,
        request_id: str,
        ledger: RequestLedger,
        num_tokens: int,
        hits: tuple[list[Any], int],
    ) -> int:
        """What add_local_computed_blocks and allocate_new_blocks will take from the pool."""
        num_held = len(self.req_to_blocks.get(request_id, ()))
        num_evictable = 0
        if not num_held:
            adopted = self._adopted_hits(ledger, *hits)
            num_held = len(adopted)
            num_evictable = sum(b.ref_cnt == 0 and not b.is_null for b in adopted)
        return num_evictable + self._num_kept(ledger, num_held, num_tokens)

    def _window(self, ledger: RequestLedger, num_tokens: int) -> int:
        """First page of what a request of ``num_tokens`` keeps beside the sink page."""
        if ledger.mode != COMPRESSED:
            return 0
        return max(0, num_tokens - self.settings.recent_tokens) // self.block_size

    def _num_kept(self, ledger: RequestLedger, first: int, num_tokens: int) -> int:
        """How many of the pages ``first`` .. end of ``num_tokens`` are real."""
        window = self._window(ledger, num_tokens)
        end = -(-num_tokens // self.block_size)
        return max(0, end - max(first, window)) + (first == 0 < window)

    def _adopted_hits(
        self, ledger: RequestLedger, blocks: list[Any], num_computed_tokens: int
    ) -> list[Any]:
        """The prefix hit's D blocks a request takes: a compressed one only its window's."""
        num_pages = -(-num_computed_tokens // self.block_size)
        row = blocks[:num_pages] + [self._null_block] * (num_pages - len(blocks))
        window = self._window(ledger, num_computed_tokens)
        row[1:window] = [self._null_block] * max(0, window - 1)
        return row

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Adopts the prefix hit's blocks, null placeholders where none is kept."""
        assert num_external_computed_tokens == 0, "echokv: KV connectors are refused at start-up"
        ledger = self.ledger(request_id)
        row = self.req_to_blocks[request_id]
        assert not row, "echokv: only new requests have prefix hits"
        adopted = self._adopted_hits(ledger, list(new_computed_blocks), num_local_computed_tokens)
        self.block_pool.touch([block for block in adopted if not block.is_null])
        row.extend(adopted)
        self.num_held_pages += sum(not block.is_null for block in adopted)
        self.num_cached_block[request_id] = len(row)
        ledger.num_adopted = num_local_computed_tokens
        if any(block.is_null for block in row):
            ledger.taint_from(num_local_computed_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        """Extends the row to ``num_tokens``; never shorter, the worker reads every entry."""
        ledger = self.ledger(request_id)
        row = self.req_to_blocks[request_id]
        if request_id not in self.num_cached_block:
            self.num_cached_block[request_id] = 0
        if not ledger.admitted:
            self._count_admission(ledger)
        first = len(row)
        num_new = -(-num_tokens // self.block_size) - first
        if num_new <= 0:
            return []
        real = self.block_pool.get_new_blocks(self._num_kept(ledger, first, num_tokens))
        new = [self._null_block] * (num_new - len(real)) + real
        if len(real) < len(new):
            ledger.taint_from(first * self.block_size)
            if first == 0:  # the sink page is kept too
                new[0], new[len(new) - len(real)] = real[0], self._null_block
        self._pair(request_id, new, first)
        self.num_held_pages += len(real)
        row.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in real)
        return new

    def _count_admission(self, ledger: RequestLedger) -> None:
        ledger.admitted = True
        if ledger.mode is None:
            ledger.mode = COMPRESSED if ledger.requested == COMPRESSED else FULL
        if ledger.mode == FULL and ledger.taint is None:
            self.counters.admitted_full += 1
        else:
            self.counters.admitted_compressed += 1

    def _pair(self, request_id: str, blocks: list[Any], first: int) -> None:
        """Notes the R block whose slot the worker stamps on each D page."""
        retained = self.link.retained
        assert retained is not None
        r_row = retained.req_to_blocks[request_id]
        for index, block in enumerate(blocks, first):
            if not block.is_null:
                r_block = r_row[index * self.block_size // retained.block_size]
                self.link.partner[block.block_id] = r_block.block_id

    # Release ----------------------------------------------------------------------------

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Notes the committed tokens and lets a compressed request's window move on."""
        ledger = self.ledgers.get(request_id)
        if ledger is None:
            return
        # Not a maximum: what a waiting request found in the prefix cache on its last
        # attempt may be gone.
        ledger.num_committed = processed_computed_tokens
        if ledger.mode == COMPRESSED:
            self.valve.drop_left_window(request_id, ledger)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publishes blocks up to the first token that was computed inexactly."""
        num_tokens = min(num_tokens, self.publishable_tokens(request.request_id))
        fills = fills_blocks(self, request.request_id, num_tokens)
        if fills:
            super().cache_blocks(request, num_tokens, *args, **kwargs)
        if fills or self.link.has_published:
            offer_own_pairs(self, request)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Forgets a finished, aborted or preempted request."""
        self.outlook.note_end(request_id)
        self.ledgers.pop(request_id, None)
        blocks = list(super().pop_blocks_for_free(request_id))
        self.num_held_pages -= sum(not block.is_null for block in blocks)
        # No further step may follow, and an idle server must not show held pages.
        self._report()
        return blocks

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Cascade attention is not used (abstract in vLLM 0.31)."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """See ``echokv_vllm.scheduler.lookup``."""
        assert not drop_eagle_block, "echokv: draft models are refused at start-up"
        return residual_hits(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec.block_size,
            alignment_tokens,
        )
