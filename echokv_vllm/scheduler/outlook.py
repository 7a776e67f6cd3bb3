"""What running requests will still need, so that admission does not lead to preemption.

vLLM admits a request as soon as its prompt fits, and preempts another when outputs have filled
what was left: that stream stalls until its whole context has been computed again. Here a newcomer
waits instead, as long as the running requests are expected to need the pages. The pages in use are
foretold for every moment at which one of them ends, output lengths by those of finished requests
(Past-Future scheduler, arXiv 2507.10150). The forecast counts every request in its smallest
form: pages that pressure may drop are free.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from vllm.v1.request import RequestStatus

from echokv_vllm.scheduler.ledger import AUTO, FULL, RequestLedger

if TYPE_CHECKING:
    from echokv_vllm.scheduler.residual import EchoResidualManager

NUM_REMEMBERED = 256  # finished requests; traffic changes
MIN_REMEMBERED = 8  # before them, what finishes first is not typical: it is short
# Of a compressed request: its window holds on to the page it is leaving while a step is under way.
LEAVING_PAGES = 1
MAX_SKIPPED = 3  # steps for which a refusal holds without a forecast
MAX_MOMENTS = 256  # that a forecast looks at; more cost time


class OutputLengths:
    """Output lengths of the last finished requests, in tokens.

    An output that ended at its bound says that others with no higher bound may reach theirs, and
    nothing of those that may become longer.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[int, bool]] = deque()
        self._ended: list[int] = []  # sorted
        self._capped: list[int] = []  # sorted
        self._sums: list[int] = [0]  # of the first i in _ended

    def add(self, length: int, is_capped: bool = False) -> None:
        """Notes the output of a request that ended by itself, or at its bound."""
        if len(self._recent) == NUM_REMEMBERED:
            oldest, was_capped = self._recent.popleft()
            (self._capped if was_capped else self._ended).remove(oldest)
        self._recent.append((length, is_capped))
        insort(self._capped if is_capped else self._ended, length)
        self._sums = [0, *accumulate(self._ended)]

    def expected_rest(self, num_generated: int, bound: int) -> float | None:
        """Mean tokens to come of a request that has generated some; None where nobody knows.

        Args:
            num_generated: Tokens it has generated.
            bound: Tokens it may generate in all.
        """
        first = bisect_right(self._ended, num_generated)
        num_longer = len(self._ended) - first
        num_capped = len(self._capped) - bisect_left(self._capped, bound)
        known = num_longer + num_capped
        if len(self._ended) + num_capped < MIN_REMEMBERED or not known:
            return None
        return (self._sums[-1] - self._sums[first] + num_capped * bound) / known - num_generated


class Growth(NamedTuple):
    """Future pages of one request in one group, or of a newcomer in both.

    Attributes:
        rest: Tokens until it ends.
        num_tokens: Tokens it has.
        page_size: Tokens per page.
        lacking: Pages it needs for the tokens it has, beyond those in use.
        own: Pages that become free, of those in use now, when it ends.
    """

    rest: int
    num_tokens: int
    page_size: int
    lacking: int
    own: int


def peak_growth(growths: Sequence[Growth]) -> int:
    """Most pages that will be in use beyond those in use now, if all generate in step.

    Between two ends pages only become more, so the moments at which somebody ends are enough; of
    more than ``MAX_MOMENTS``, evenly spread ones.
    """
    table = np.array(growths, dtype=np.int64)
    rest, num_tokens, page_size, lacking, own = table.T
    moments = np.unique(rest)
    moments = moments[:: -(-len(moments) // MAX_MOMENTS)]
    alive = rest >= moments[:, None]
    pages = -(-(num_tokens + moments[:, None]) // page_size) + (
        lacking - -(-num_tokens // page_size)
    )
    return max(0, int(np.where(alive, pages, -own).sum(axis=1).max()))


class Outlook:
    """Foresees the pool for a D manager.

    Args:
        manager: The D manager.
    """

    def __init__(self, manager: EchoResidualManager) -> None:
        self.manager = manager
        self.lengths = OutputLengths()
        settings = manager.settings
        self.window_pages = _num_pages(settings.recent_tokens, settings.residual_block_size) + 1
        self._refused = ""
        self._num_skipped = 0
        self._is_skipping = False

    def still_refuses(self, request_id: str) -> bool:
        """Whether the refusal of a newcomer holds in this step without a forecast.

        vLLM asks in every step, and until somebody ends little changes from one to the next. Asked
        before the newcomer's prompt is looked up, which takes longer than the forecast and is for
        nothing if it stays refused.
        """
        self._is_skipping = (
            request_id == self._refused
            and self._num_skipped < MAX_SKIPPED
            and bool(self.manager.num_cached_block)
        )
        self._num_skipped += self._is_skipping
        return self._is_skipping

    def admits(self, request_id: str, num_tokens: int, num_pages: int) -> bool:
        """Whether a newcomer and all that runs are expected to fit until they end.

        A request is always admitted when nothing runs that it would have to wait for.

        Args:
            request_id: The newcomer.
            num_tokens: Tokens vLLM asks room for: all it has, or a first chunk of them.
            num_pages: Pages these take from the pool, in its smallest form.
        """
        manager = self.manager
        newcomer = manager.link.find_request(request_id)
        if newcomer is None or not manager.num_cached_block:
            return True
        if request_id == self._refused and self._is_skipping:
            return False
        lasting, yielding = self._others(newcomer)
        fits = not lasting or (
            self._peak(newcomer, num_tokens, num_pages, lasting) <= self._num_free(yielding)
        )
        self._refused, self._num_skipped = "" if fits else request_id, 0
        return fits

    def _others(self, newcomer: Any) -> tuple[list[Any], list[Any]]:
        """The requests whose end a newcomer has to wait for, and those vLLM preempts before it.

        In neither: sessions that wait for their next input. They keep their pages, and for how
        long nobody knows: a newcomer that waited for them might never start.
        """
        link = self.manager.link
        lasting: list[Any] = []
        yielding: list[Any] = []
        for request_id in self.manager.num_cached_block:
            request = link.find_request(request_id)
            if request is None or request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
                continue
            yields = link.by_priority and request.priority > newcomer.priority
            (yielding if yields else lasting).append(request)
        return lasting, yielding

    def _num_free(self, yielding: Sequence[Any]) -> int:
        """Free pages if every ``auto`` request gives all it can, and the yielding ones the rest.

        Pages of uncommitted tokens count: they can be given soon. Those adopted from the prefix
        cache do not: others may hold them too. One that keeps no more residuals has given all.
        """
        manager = self.manager
        num_free = int(manager.block_pool.get_num_free_blocks())
        for request_id in manager.num_cached_block:
            ledger = manager.ledgers[request_id]
            if ledger.requested == AUTO and ledger.mode == FULL:
                first = max(ledger.next_drop, ledger.num_adopted // manager.block_size)
                end = len(manager.req_to_blocks[request_id]) - self.window_pages
                num_free += max(0, end - first)
        for request in yielding:
            growths = self._growths(request, manager.ledgers[request.request_id])
            num_free += sum(growth.own for growth in growths)
        return num_free

    def _peak(self, newcomer: Any, num_tokens: int, num_pages: int, lasting: Sequence[Any]) -> int:
        manager = self.manager
        ledger = manager.ledgers[newcomer.request_id]
        size = manager.settings.retained_block_size
        lacking = num_pages + _num_pages(newcomer.num_tokens, size) - _num_pages(num_tokens, size)
        rest = self._rest(newcomer)
        growths = [Growth(rest, newcomer.num_tokens, size, lacking + LEAVING_PAGES, 0)]
        if ledger.requested == FULL:
            growths.append(Growth(rest, newcomer.num_tokens, manager.block_size, 0, 0))
        for request in lasting:
            growths += self._growths(request, manager.ledgers[request.request_id])
        return peak_growth(growths)

    def note_end(self, request_id: str) -> None:
        """Remembers the output of a request that leaves, unless it was cut off."""
        self._refused = ""
        request = self.manager.link.find_request(request_id)
        if request is None:
            return
        is_capped = request.status == RequestStatus.FINISHED_LENGTH_CAPPED
        if is_capped or request.status == RequestStatus.FINISHED_STOPPED:
            self.lengths.add(request.num_output_tokens, is_capped)

    def _rest(self, request: Any) -> int:
        num_generated = request.num_output_tokens
        bound = request.max_tokens - num_generated
        # Where the client names no bound, vLLM's is what the model's context leaves.
        room = self.manager.link.max_model_len - request.num_tokens
        most = min(bound, room)
        if _never_ends_itself(request.sampling_params):
            return max(0, most)
        expected = self.lengths.expected_rest(num_generated, num_generated + most)
        if expected is None:
            expected = bound if bound < room else num_generated
        return max(0, math.ceil(min(expected, most)))

    def _growths(self, request: Any, ledger: RequestLedger) -> list[Growth]:
        manager = self.manager
        retained = manager.link.retained
        assert retained is not None
        groups: list[Any] = [retained, manager] if ledger.requested == FULL else [retained]
        rest, growths = self._rest(request), []
        for group in groups:
            size, num_held = group.block_size, len(group.req_to_blocks[request.request_id])
            lacking = _num_pages(request.num_tokens, size) - num_held
            own = num_held - ledger.num_adopted // size
            if ledger.requested != FULL:
                lacking += LEAVING_PAGES
                num_residual = len(manager.req_to_blocks[request.request_id])
                own += min(num_residual, 1 + self.window_pages)  # 1: the sink page
            growths.append(Growth(rest, request.num_tokens, size, lacking, own))
        return growths


def _never_ends_itself(params: Any) -> bool:
    return params is not None and params.ignore_eos and not (params.stop or params.stop_token_ids)


def _num_pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)
