"""The answer to a request that needs no page, without asking the managers.

A decode takes a page every 16th step only, yet vLLM asks each group of each request five questions
in every step: what to release, how much is needed, for it, and what to publish. With two groups
and hundreds of requests that takes longer than the GPU's step. Here the managers' state says at
once that all answers are "nothing".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from echokv_vllm.scheduler.ledger import COMPRESSED
from echokv_vllm.scheduler.retained import fills_blocks

if TYPE_CHECKING:
    from echokv_vllm.scheduler.residual import EchoResidualManager


def needs_nothing(
    manager: EchoResidualManager,
    request: Any,
    num_new_tokens: int,
    num_lookahead_tokens: int,
    max_model_len: int,
) -> bool:
    """Whether room for a request's next tokens is there and nothing else would change.

    If so, its committed tokens are noted, which is all that asking the managers would have done.

    Args:
        manager: The D manager.
        request: vLLM's request, without a prefix-cache hit to adopt.
        num_new_tokens: Tokens of the step.
        num_lookahead_tokens: Tokens vLLM wants room for beyond them.
        max_model_len: vLLM's.
    """
    request_id = request.request_id
    ledger = manager.ledgers.get(request_id)
    if (
        ledger is None
        or not ledger.admitted
        or request.status != RequestStatus.RUNNING
        or request_id not in manager.num_cached_block
        or num_new_tokens <= 0
    ):
        return False
    retained = manager.link.retained
    assert retained is not None
    num_computed = min(request.num_computed_tokens, max_model_len)
    end = num_computed + num_new_tokens
    row = manager.req_to_blocks[request_id]
    room = min(
        len(row) * manager.block_size,
        len(retained.req_to_blocks[request_id]) * retained.block_size,
    )
    num_committed = max(0, num_computed - request.num_in_flight_tokens)
    if end + num_lookahead_tokens > room or (
        ledger.mode == COMPRESSED and manager.valve.has_left_window(ledger, len(row), num_committed)
    ):
        return False
    if manager.enable_caching and publishes(manager, request, min(end, request.num_tokens)):
        return False
    ledger.num_committed = num_committed
    return True


def publishes(manager: EchoResidualManager, request: Any, num_tokens: int) -> bool:
    """Whether a request's first tokens fill blocks that are not in the prefix cache yet.

    Args:
        manager: The D manager.
        request: vLLM's request.
        num_tokens: Its tokens whose K/V may be published.
    """
    retained = manager.link.retained
    assert retained is not None
    request_id = request.request_id
    # A hit ends where a block of either group does, so vLLM publishes up to there only.
    num_tokens -= num_tokens % math.lcm(retained.block_size, manager.block_size)
    num_tokens = min(num_tokens, manager.publishable_tokens(request_id))
    return fills_blocks(retained, request_id, num_tokens) or fills_blocks(
        manager, request_id, num_tokens
    )
