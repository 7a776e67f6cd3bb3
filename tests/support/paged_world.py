"""The two KV cache managers inside vLLM's real KVCacheManager, without a model.

``World`` runs the allocation part of vLLM's scheduling loop over real requests, has a symbolic
worker execute the steps, and checks the books after every pass.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from typing import Any

from echo_pool import kv_cache_manager, settings
from symbolic_worker import Page, Step, SymbolicWorker
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

from echokv_vllm import compat
from echokv_vllm.config import SchedulerSettings
from echokv_vllm.scheduler.link import find_link

init_none_hash(sha256)
compat.patch_lookup()
compat.patch_allocation()


def _next_token(names: list[int]) -> int:
    """Depends on the prefix only, as greedy decoding does."""
    return names[-1] % 50


class World:
    """A scheduler reduced to allocation, a symbolic worker, and checks on both.

    Args:
        num_blocks: Pages of the pool, the null page included.
        echo: Settings; None takes :func:`settings`.
        caching: Whether prefix caching is on.
        depth: Steps in flight while the next is scheduled; 0 is synchronous scheduling.
        budget: Tokens per step.
        max_running: Requests that may run at once.
        gate: vLLM's ``scheduler_reserve_full_isl``.
    """

    def __init__(
        self,
        num_blocks: int,
        echo: SchedulerSettings | None = None,
        *,
        caching: bool = True,
        depth: int = 0,
        budget: int = 64,
        max_running: int = 64,
        gate: bool = True,
        max_model_len: int = 4096,
    ) -> None:
        self.echo = echo or settings()
        self.manager = kv_cache_manager(num_blocks, self.echo, caching, max_model_len)
        self.pool = self.manager.block_pool
        link = find_link(self.pool)
        assert link is not None and link.retained is not None and link.residual is not None
        self.link, self.retained, self.residual = link, link.retained, link.residual
        self.sizes = self.echo.retained_block_size, self.echo.residual_block_size
        self.r_size, self.d_size = self.sizes
        self.caching, self.depth, self.budget = caching, depth, budget
        self.max_running, self.gate = max_running, gate
        self.max_model_len = max_model_len
        self.hasher = get_request_block_hasher(math.gcd(*self.sizes), sha256) if caching else None
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.rows: dict[str, tuple[list[int], list[int]]] = {}
        self.names: dict[str, list[int]] = {}
        self.in_flight: deque[Step] = deque()
        self.finished: list[Request] = []
        self.num_preemptions = 0
        self.worker = SymbolicWorker(self, num_blocks)
        self._predicted = (0, 0)
        self._count_needs()

    def _count_needs(self) -> None:
        """Notes what the managers announce, to compare it with what they take."""
        coordinator = self.manager.coordinator
        original = coordinator.get_num_blocks_to_allocate

        def counted(*args: Any, **kwargs: Any) -> int:
            need = original(*args, **kwargs)
            self._predicted = (need, self.pool.get_num_free_blocks())
            return need

        coordinator.get_num_blocks_to_allocate = counted

    def _allocate(self, request: Request, count: int, **kwargs: Any) -> Any:
        self._predicted = (0, self.pool.get_num_free_blocks())  # if the managers are not asked
        blocks = self.manager.allocate_slots(request, count, **kwargs)
        if blocks is not None:
            need, num_free = self._predicted
            taken = num_free - self.pool.get_num_free_blocks()
            assert taken == need, f"{request.request_id}: {need} pages announced, {taken} taken"
        return blocks

    # Requests ---------------------------------------------------------------------------

    def add(
        self, request_id: str, prompt: list[int], mode: str | None = None, max_tokens: int = 16
    ) -> Request:
        """Queues a request, as the patched ``Scheduler.add_request`` does."""
        params = SamplingParams(max_tokens=max_tokens)
        request = Request(request_id, prompt, params, None, block_hasher=self.hasher)
        self.link.add_request(request, mode, self.max_model_len)
        if not self.link.strict and (mode or self.echo.mode) == "full":
            request.skip_reading_prefix_cache = True
        self._name_tokens(request)
        self.waiting.append(request)
        return request

    def _name_tokens(self, request: Request) -> None:
        names = self.names.setdefault(request.request_id, [])
        for token in request.all_token_ids[len(names) :]:
            names.append(hash((names[-1] if names else 0, token)))

    def name(self, request: Request, token: int) -> int:
        """Name of a prefix of the request, also of tokens that were never delivered."""
        names = self.names[request.request_id]
        while len(names) <= token:
            names.append(hash((names[-1], _next_token(names))))
        return names[token]

    def is_pinned(self, request: Request) -> bool:
        """Whether the request asked for full mode."""
        mode = self.link.requested_modes.get(request.request_id, self.echo.mode)
        return mode == "full"

    def abort(self, request: Request) -> None:
        """Removes a waiting or running request."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._free(request)

    def _free(
        self, request: Request, status: RequestStatus = RequestStatus.FINISHED_ABORTED
    ) -> None:
        request.status = status
        self.manager.free(request)
        self.rows.pop(request.request_id, None)

    # Scheduling -------------------------------------------------------------------------

    def schedule(self) -> Step:
        """One scheduling pass; vLLM's order: running requests, then the waiting queue."""
        step, budget = Step(), self.budget
        self.manager.new_step_starts()
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            count = min(budget, self._num_schedulable(request))
            if count > 0:
                done, victims = self._schedule_running(request, count, step)
                preempted |= victims
                if not done:
                    break
                budget -= count
            index += 1
        while not preempted and self.waiting and budget > 0:
            if len(self.running) == self.max_running:
                break
            count = self._schedule_waiting(self.waiting[0], budget, step)
            if not count:
                break
            budget -= count
        for request, start, count, *_ in step.parts:
            request.num_computed_tokens = start + count
            request.num_in_flight_tokens += count
            if start + count == request.num_tokens + request.num_output_placeholders:
                request.num_output_placeholders += 1
        return step

    def _num_schedulable(self, request: Request) -> int:
        """Tokens that may be scheduled, a decode's token in flight included (vLLM's rule)."""
        ahead = request.num_output_placeholders
        last = request.num_prompt_tokens + request.max_tokens
        if ahead and request.num_computed_tokens + 2 - ahead >= last:
            return 0
        if not self.depth:
            assert not ahead
        return request.num_tokens + ahead - request.num_computed_tokens

    def _schedule_running(self, request: Request, count: int, step: Step) -> tuple[bool, bool]:
        preempted = False
        while True:
            blocks = self._allocate(request, count)
            if blocks is not None:
                for row, new in zip(
                    self.rows[request.request_id], blocks.get_block_ids(), strict=True
                ):
                    row.extend(new)
                self._launch(step, request, request.num_computed_tokens, count)
                return True, preempted
            victim = self.running.pop()
            self._preempt(victim)
            preempted = True
            if victim is request:
                return False, True

    def _preempt(self, request: Request) -> None:
        self.manager.free(request)
        self.rows.pop(request.request_id)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.num_output_placeholders = 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _schedule_waiting(self, request: Request, budget: int, step: Step) -> int:
        if request.num_stale_output_tokens:
            return 0
        hits, num_hit, _ = self.manager.get_computed_blocks(request)
        count = min(budget, request.num_tokens - num_hit)
        blocks = self._allocate(
            request,
            count,
            num_new_computed_tokens=num_hit,
            new_computed_blocks=hits,
            full_sequence_must_fit=self.gate,
            has_scheduled_reqs=bool(self.running),
        )
        if blocks is None:
            return 0
        self.waiting.popleft()
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        r_row, d_row = self.manager.get_block_ids(request.request_id)
        self.rows[request.request_id] = (list(r_row), list(d_row))
        self._launch(step, request, num_hit, count)
        return count

    def _launch(self, step: Step, request: Request, start: int, count: int) -> None:
        r_row, d_row = self.rows[request.request_id]
        end = start + count
        assert len(r_row) == -(-end // self.r_size), f"{request.request_id}: R row too short"
        assert len(d_row) == -(-end // self.d_size), f"{request.request_id}: D row too short"
        step.parts.append((request, start, count, list(r_row), list(d_row)))

    # Time -------------------------------------------------------------------------------

    def step(self) -> Step:
        """Schedules one step and finishes the one ``depth`` passes ago."""
        step = self.schedule()
        self.check()
        self.in_flight.append(step)
        if len(self.in_flight) > self.depth or not step.parts:
            self.finish_step()
        return step

    def finish_step(self) -> None:
        """Runs the oldest step in flight and delivers its tokens."""
        step = self.in_flight.popleft()
        self.worker.run(step)
        for request, start, count, *_ in step.parts:
            request.num_in_flight_tokens -= count
            if request.is_finished():
                continue
            if request.num_stale_output_tokens:
                request.num_stale_output_tokens -= count
                continue
            if start + count == request.num_tokens:
                request.num_output_placeholders -= 1
                self._deliver(request)

    def _deliver(self, request: Request) -> None:
        if request.num_output_tokens + 1 >= request.max_tokens:
            self.running.remove(request)
            self.finished.append(request)
            self._free(request, RequestStatus.FINISHED_LENGTH_CAPPED)
            return
        names = self.names[request.request_id]
        request.append_output_token_ids(_next_token(names[: request.num_tokens]))
        self._name_tokens(request)
        if self.depth:  # vLLM's asynchronous scheduler publishes again here
            known = request.num_computed_tokens - request.num_output_placeholders
            self.manager.cache_blocks(request, known)

    def run(self, max_steps: int = 10_000) -> None:
        """Steps until every request is done.

        Raises:
            AssertionError: ``max_steps`` were not enough, or a check failed.
        """
        for _ in range(max_steps):
            if not self.running and not self.waiting:
                break
            self.step()
        assert not self.running and not self.waiting, "requests are stuck"
        while self.in_flight:
            self.finish_step()
        self.check()

    # Checks -----------------------------------------------------------------------------

    def residual_row(self, request: Request) -> list[int]:
        """D block ids of a running request as the manager sees them; 0 is the null page."""
        return [b.block_id for b in self.residual.req_to_blocks.get(request.request_id, [])]

    def check(self) -> None:
        """Reference counts, totals, row lengths, pins, windows and pairing of every row."""
        refs: Counter[int] = Counter()
        num_held = 0
        for request in self.running:
            name = request.request_id
            r_row = self.retained.req_to_blocks[name]
            d_row = self.residual.req_to_blocks[name]
            assert not any(b.is_null for b in r_row), f"{name}: hole in the R row"
            assert -(-len(r_row) * self.r_size // self.d_size) >= len(d_row)
            refs.update(b.block_id for b in r_row)
            held = [(i, b.block_id) for i, b in enumerate(d_row) if not b.is_null]
            refs.update(page for _, page in held)
            num_held += len(held)
            for index, page in held:
                partner = r_row[index * self.d_size // self.r_size].block_id
                assert self.link.partner[page] == partner, f"{name}: unpaired D page {index}"
            self._check_holdings(request, d_row, len(held))
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == refs[block.block_id], f"page {block.block_id}: ref count"
        in_use = sum(1 for count in refs.values() if count)
        assert self.pool.get_num_free_blocks() == len(self.pool.blocks) - 1 - in_use
        assert self.residual.num_held_pages == num_held
        known = {r.request_id for r in (*self.running, *self.waiting)}
        assert set(self.residual.ledgers) <= known, "state of a request that is gone"
        assert set(self.residual.req_to_blocks) <= known | {""}
        assert len(self.link.partner) < len(self.pool.blocks)

    def _check_holdings(self, request: Request, d_row: list[Any], num_held: int) -> None:
        name = request.request_id
        ledger = self.residual.ledgers[name]
        if self.is_pinned(request):
            assert num_held == len(d_row), f"{name}: a pinned request lost a page"
            assert ledger.taint is None or not self.echo.strict
        if num_held < len(d_row):
            assert ledger.taint is not None, f"{name}: a page is missing, but no taint"
        if ledger.requested == "compressed":
            num_tokens = len(d_row) * self.d_size
            floor = self.echo.floor_pages(num_tokens, self.depth + 1)
            assert num_held <= floor, f"{name}: {num_held} pages, {floor} promised at start-up"

    def check_published(self) -> None:
        """Every block in the prefix cache is exact. Only when no step is in flight."""
        assert self.echo.strict and not self.in_flight
        for block in self.pool.blocks:
            if block.block_hash is not None and not block.is_null:
                page = self.worker.pages[block.block_id]
                # vLLM also publishes the part of a larger R block that a prompt fills.
                num_tokens = (block.block_hash_num_tokens - 1) % self._size(page) + 1
                assert all(page.exact.get(offset) for offset in range(num_tokens)), (
                    f"page {block.block_id} is published but not exact"
                )

    def _size(self, page: Page) -> int:
        return self.r_size if page.group == "r" else self.d_size

    def check_idle(self) -> None:
        """With no request left, nothing is held and nothing remembered."""
        assert self.pool.get_num_free_blocks() == len(self.pool.blocks) - 1
        assert self.residual.num_held_pages == 0
        assert not self.residual.ledgers
        assert not self.residual.num_cached_block and not self.retained.num_cached_block
        assert not self.residual.req_to_blocks and not self.retained.req_to_blocks


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random tokens, the same on every call."""
    source = random.Random(seed)
    return [source.randrange(1000) for _ in range(num_tokens)]


def ledger_of(world: World, request: Request) -> Any:
    """The D manager's state of a request."""
    return world.residual.ledgers[request.request_id]


def held(world: World, request: Request) -> list[int]:
    """Indices of the D pages a request holds."""
    return [index for index, page in enumerate(world.residual_row(request)) if page]
