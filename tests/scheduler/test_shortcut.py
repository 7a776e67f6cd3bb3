"""What is answered without the managers is what they would have answered, in random worlds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from echo_pool import settings
from paged_world import World
from random_worlds import play
from vllm.v1.core.kv_cache_manager import KVCacheManager

from echokv_vllm.scheduler import shortcut
from echokv_vllm.scheduler.link import PoolLink, find_link


def state_of(link: PoolLink, pool: Any) -> dict[str, Any]:
    """Everything a later step could notice."""
    residual, groups = link.residual, (link.retained, link.residual)
    assert residual is not None
    return {
        "rows": [
            {name: [b.block_id for b in row] for name, row in group.req_to_blocks.items()}
            for group in groups
        ],
        "published": [dict(group.num_cached_block) for group in groups],
        "ledgers": {name: dataclasses.astuple(x) for name, x in residual.ledgers.items()},
        "counters": residual.counters.values(),
        "held": residual.num_held_pages,
        "partner": dict(link.partner),
        "blocks": [(b.ref_cnt, b.block_hash) for b in pool.blocks],
        "free": [b.block_id for b in pool.free_block_queue.get_all_free_blocks()],
    }


class Watch:
    """Asks the managers after every short answer, and counts what was answered how.

    Attributes:
        calls: By whether the shortcut answered, and whether the managers changed nothing.
        published: The same for publishing alone.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[tuple[bool, bool]] = Counter()
        self.published: Counter[tuple[bool, bool]] = Counter()
        self.allocate = KVCacheManager.allocate_slots.__wrapped__
        self.cache = KVCacheManager.cache_blocks.__wrapped__
        watch = self

        def allocate_slots(manager: Any, request: Any, count: int, **kwargs: Any) -> Any:
            return watch.allocated(manager, request, count, kwargs)

        def cache_blocks(manager: Any, request: Any, count: int) -> None:
            watch.cached(manager, request, count)

        monkeypatch.setattr(KVCacheManager, "allocate_slots", allocate_slots)
        monkeypatch.setattr(KVCacheManager, "cache_blocks", cache_blocks)

    def allocated(self, manager: Any, request: Any, count: int, kwargs: dict[str, Any]) -> Any:
        if kwargs:  # a newcomer: the shortcut is not asked
            return self.allocate(manager, request, count, **kwargs)
        link = find_link(manager.block_pool)
        assert link is not None and link.residual is not None
        ledger = link.residual.ledgers[request.request_id]
        committed = ledger.num_committed
        is_short = shortcut.needs_nothing(link.residual, request, count, 0, manager.max_model_len)
        noted, ledger.num_committed = ledger.num_committed, committed
        before = state_of(link, manager.block_pool)
        blocks = self.allocate(manager, request, count)
        assert noted == (ledger.num_committed if is_short else committed)
        after = state_of(link, manager.block_pool)
        after["ledgers"][request.request_id] = before["ledgers"].get(request.request_id)
        is_idle = blocks is manager.empty_kv_cache_blocks and after == before
        assert is_idle or not is_short, f"{request.request_id}: the managers had work to do"
        self.calls[is_short, is_idle] += 1
        return blocks

    def cached(self, manager: Any, request: Any, count: int) -> None:
        link = find_link(manager.block_pool)
        assert link is not None and link.residual is not None
        publishes = shortcut.publishes(link.residual, request, count)
        before = state_of(link, manager.block_pool)
        self.cache(manager, request, count)
        is_idle = state_of(link, manager.block_pool) == before
        assert is_idle or publishes, f"{request.request_id}: there was something to publish"
        self.published[not publishes, is_idle] += manager.enable_caching


def test_the_managers_would_have_done_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    for seed in range(300, 316):
        print(f"replay with play({seed}, 30)")
        play(seed, 30)
    short, asked_for_nothing = watch.calls[True, True], watch.calls[False, True]
    assert watch.calls[False, False] > 100, "no step needed anything"
    assert short > 1000 and asked_for_nothing < 0.1 * short, watch.calls
    # vLLM publishes again when tokens arrive, mostly what it has published before.
    assert watch.published[True, True] > 100 and not watch.published[False, True]


@pytest.mark.parametrize("mode", ["full", "auto", "compressed"])
def test_managers_are_asked_when_pages_are_needed(mode: str) -> None:
    """Twice per page: for it, and to publish the one before it."""
    world = World(3000, settings(mode=mode, recent_tokens=16), budget=1000, depth=1)
    for index in range(20):
        world.add(f"q{index}", [index] * 31, max_tokens=100)
    world.step()
    world.step()
    coordinator, asked = world.manager.coordinator, []
    original = coordinator.get_num_blocks_to_allocate
    coordinator.get_num_blocks_to_allocate = lambda *a, **k: asked.append(0) or original(*a, **k)
    num_pages = 64 // min(world.sizes)
    for _ in range(64):
        assert len(world.step().parts) == 20
    assert 20 * num_pages <= len(asked) <= 2 * 20 * num_pages


def test_a_wrong_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut, "publishes", lambda *args: False)
    Watch(monkeypatch)
    with pytest.raises(AssertionError, match=r"managers had work|something to publish"):
        for seed in range(300, 316):
            play(seed, 30)
