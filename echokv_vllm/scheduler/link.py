"""What the R manager and the D manager of one block pool share.

vLLM gives a manager its own group only. The two EchoKV managers find each other, and the
requests' modes, through this object, kept beside the pool it belongs to.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from echokv_kernels.step_plan import StepKind

if TYPE_CHECKING:
    from echokv_vllm.scheduler.residual import EchoResidualManager
    from echokv_vllm.scheduler.retained import EchoRetainedManager


class PoolLink:
    """Shared state of the two managers over one block pool.

    Attributes:
        retained: The R manager, set by itself.
        residual: The D manager, set by itself.
        requested_modes: Mode named by a request, by internal request id. Entries outlive
            preemption and vanish with the request object.
        max_model_len: vLLM's, in tokens; 0 before the first request.
        by_priority: Whether vLLM preempts the least important request, not the last one.
        looked_up: The request whose prompt is being looked up in the prefix cache, if any.
        found_retained: R blocks that serve the prefix hit being looked up.
        retained_need: (request id, R pages it needs) of the allocation under way. vLLM
            asks the groups one after the other; D must see the sum.
        retained_hits: Block ids of the R pages that allocation would adopt from the
            prefix cache.
        has_published: Whether R published blocks of the request that D is asked to publish next.
        partner: R block id whose first token's slot is the stamp of a D block, by D block
            id. Kept after the D block is freed: it may be adopted from the prefix cache.
    """

    def __init__(self) -> None:
        self.retained: EchoRetainedManager | None = None
        self.residual: EchoResidualManager | None = None
        self.requested_modes: dict[str, str] = {}
        self.max_model_len = 0
        self.by_priority = False
        self.looked_up: Any | None = None
        self._requests: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self.found_retained: Sequence[Any] = ()
        self.retained_need: tuple[str, int] = ("", 0)
        self.retained_hits: frozenset[int] = frozenset()
        self.has_published = False
        self.partner: dict[int, int] = {}

    def add_request(self, request: Any, mode: str | None, max_model_len: int) -> None:
        """Remembers a request and the mode it names, if any, for as long as it lives."""
        self.max_model_len = max_model_len
        self._requests[request.request_id] = request
        self.requested_modes.pop(request.request_id, None)  # of a request that had the id before
        if mode is not None:
            self.requested_modes[request.request_id] = mode
            weakref.finalize(request, self._forget, request.request_id)

    def find_request(self, request_id: str) -> Any | None:
        """vLLM's request object of an id; managers are given the id only."""
        return self._requests.get(request_id)

    def _forget(self, request_id: str) -> None:
        # A later request may have taken over the id.
        if request_id not in self._requests:
            self.requested_modes.pop(request_id, None)

    @property
    def strict(self) -> bool:
        """Whether inexact K/V stay out of the prefix cache."""
        assert self.residual is not None, "echokv: the residual manager is not built yet"
        return self.residual.settings.strict

    @property
    def default_mode(self) -> str:
        """Mode of requests that do not name one."""
        assert self.residual is not None, "echokv: the residual manager is not built yet"
        return self.residual.settings.mode

    def step_kind(self, request_ids: Iterable[str]) -> StepKind:
        """What is certain of all these requests' residual pages, once they are scheduled."""
        assert self.residual is not None, "echokv: the residual manager is not built yet"
        ledgers = self.residual.ledgers
        # Whatever takes a page from a request, or gives it none, taints it in the same moment.
        lacking = {
            (ledger := ledgers.get(request_id)) is None or ledger.taint is not None
            for request_id in request_ids
        }
        if lacking == {False}:
            return StepKind.FULL
        if lacking == {True}:
            return StepKind.COMPRESSED
        return StepKind.MIXED


_LINKS: weakref.WeakKeyDictionary[Any, PoolLink] = weakref.WeakKeyDictionary()


def link_of(block_pool: Any) -> PoolLink:
    """The link of a pool, made on first use by the first manager over it."""
    link = _LINKS.get(block_pool)
    if link is None:
        link = _LINKS[block_pool] = PoolLink()
    return link


def find_link(block_pool: Any) -> PoolLink | None:
    """The link of a pool, or None when the pool serves another backend."""
    return _LINKS.get(block_pool)
