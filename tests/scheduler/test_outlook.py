"""Admission that looks ahead: forecasts in pure Python, and what they do to worlds of requests."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from echo_pool import settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from paged_world import World, prompt
from vllm.v1.request import RequestStatus

from echokv_vllm.scheduler.outlook import (
    MAX_MOMENTS,
    MAX_SKIPPED,
    MIN_REMEMBERED,
    NUM_REMEMBERED,
    Growth,
    OutputLengths,
    peak_growth,
)
from echokv_vllm.scheduler.retained import EchoRetainedManager

# The machine may be busy, and a failure must come back.
repeatable = hypothesis_settings(deadline=None, derandomize=True)
growths = st.builds(
    Growth, st.integers(0, 40), st.integers(1, 50), st.sampled_from([2, 4, 16]), st.integers(0, 9),
    st.integers(0, 30),
)  # fmt: skip
UNNAMED = 4066  # what World's context of 4096 tokens leaves a prompt of 30

# Forecasts ----------------------------------------------------------------------------------


def pages_at(request: Growth, now: int) -> int:
    """Pages beyond those in use now, of a request that is still alive."""
    return (
        request.lacking
        + math.ceil((request.num_tokens + now) / request.page_size)
        - math.ceil(request.num_tokens / request.page_size)
    )


@repeatable
@given(st.lists(growths, min_size=1, max_size=8))
def test_the_peak_is_that_of_every_moment(requests: list[Growth]) -> None:
    peak = 0
    for now in range(max(r.rest for r in requests) + 1):
        alive = sum(pages_at(r, now) for r in requests if r.rest >= now)
        peak = max(peak, alive - sum(r.own for r in requests if r.rest < now))
    assert peak_growth(requests) == peak


def test_requests_that_end_make_room_for_those_that_go_on() -> None:
    together = [Growth(40, 4, 4, 0, 10), Growth(40, 4, 4, 0, 10)]
    assert peak_growth(together) == 20
    in_turn = [Growth(20, 4, 4, 0, 10), Growth(40, 4, 4, 0, 10)]
    assert peak_growth(in_turn) == 10


def test_many_ends_are_looked_at_here_and_there() -> None:
    requests = [Growth(rest, 1, 1, 0, 0) for rest in range(5 * MAX_MOMENTS)]
    exact = max(rest * (len(requests) - rest) for rest in range(len(requests)))
    assert 0.99 * exact < peak_growth(requests) <= exact


@repeatable
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(0, 50))
def test_the_rest_is_the_mean_over_longer_outputs(finished: list[int], generated: int) -> None:
    lengths = OutputLengths()
    for length in finished:
        lengths.add(length)
    longer = [length for length in finished if length > generated]
    expected = lengths.expected_rest(generated, UNNAMED)
    if len(finished) < MIN_REMEMBERED or not longer:
        assert expected is None
    else:
        assert expected == pytest.approx(sum(longer) / len(longer) - generated)


def test_old_outputs_are_forgotten() -> None:
    lengths = OutputLengths()
    for length in [1000] * NUM_REMEMBERED + [10] * NUM_REMEMBERED:
        lengths.add(length)
    assert lengths.expected_rest(0, UNNAMED) == 10
    assert lengths.expected_rest(10, UNNAMED) is None


def test_outputs_that_ended_at_their_bound_speak_of_no_higher_one() -> None:
    """Short answers to a few questions, say, before a burst of long ones."""
    lengths = OutputLengths()
    for _ in range(NUM_REMEMBERED):
        lengths.add(12, is_capped=True)
    assert lengths.expected_rest(0, 96) is None
    assert lengths.expected_rest(4, 12) == 8 and lengths.expected_rest(0, 6) == 6
    for _ in range(NUM_REMEMBERED // 2):
        lengths.add(20)
    assert lengths.expected_rest(0, 96) == 20
    assert lengths.expected_rest(0, 12) == 16  # half of them ended later, half at such a bound


# Admission ----------------------------------------------------------------------------------


def burst(look_ahead: bool, mode: str = "auto", max_tokens: int = 60, **options: Any) -> World:
    """Ten requests at once: their prompts fit, their outputs do not."""
    echo = settings(mode=mode, recent_tokens=0, look_ahead=look_ahead)
    world = World(101, echo, budget=500, caching=False, **options)
    for index in range(10):
        world.add(f"q{index}", prompt(30, index), max_tokens=max_tokens)
    return world


@pytest.mark.parametrize("mode", ["auto", "compressed"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_burst_is_served_without_preemption(mode: str, gate: bool, depth: int) -> None:
    world = burst(True, mode, gate=gate, depth=depth)
    world.run()
    assert len(world.finished) == 10 and not world.num_preemptions
    assert world.residual.counters.held_back > 0
    world.check_idle()
    as_vllm = burst(False, mode, gate=gate, depth=depth)
    as_vllm.run()
    assert as_vllm.num_preemptions > 0 and not as_vllm.residual.counters.held_back


def test_as_many_run_as_will_fit() -> None:
    world = burst(True)
    world.step()
    # 89 tokens: 23 R pages, the sink page and at most two of the window. A request more would not
    # fit, so 100 pages hold three whole ones; those that run are that many.
    assert len(world.running) == 3
    assert world.residual.counters.held_back == 1, "the first in the queue is asked, and no other"
    world.run()


def test_outputs_without_a_bound_count_once_their_lengths_are_known() -> None:
    world = burst(True, max_tokens=UNNAMED)
    world.step()
    world.step()
    assert len(world.running) == 9, "ten would have no room for their next pages"
    for request in list(world.running):
        world.abort(request)
    for _ in range(MIN_REMEMBERED):
        world.residual.outlook.lengths.add(60)
    for index in range(10):
        world.add(f"later{index}", prompt(30, index), max_tokens=UNNAMED)
    world.step()
    assert len(world.running) == 3


def test_outputs_that_were_cut_off_are_not_remembered() -> None:
    world = World(101, settings(), budget=200)
    for index in range(MIN_REMEMBERED + 1):
        request = world.add(f"q{index}", prompt(10, index), max_tokens=5)
        if index == 0:
            world.step()
            world.abort(request)
    world.run()
    lengths = world.residual.outlook.lengths
    assert lengths.expected_rest(0, 4) == 4  # World ends a request instead of its last token
    assert len(lengths._recent) == MIN_REMEMBERED


@pytest.mark.parametrize(("ignore_eos", "num_running"), [(True, 3), (False, 6)])
def test_a_request_that_cannot_end_by_itself_reaches_its_bound(
    ignore_eos: bool, num_running: int
) -> None:
    """Whatever others did: three of ten have room for 60 tokens more, six for five."""
    world = burst(True)
    for request in world.waiting:
        request.sampling_params.ignore_eos = ignore_eos
    for _ in range(MIN_REMEMBERED):
        world.residual.outlook.lengths.add(5)
    world.step()
    assert len(world.running) == num_running


def test_a_request_that_is_alone_starts_whatever_it_may_become() -> None:
    world = World(31, settings(), budget=200)
    world.add("a", prompt(60), max_tokens=2000)
    world.step()
    assert len(world.running) == 1


def test_nobody_waits_for_a_session_that_waits_for_its_next_input() -> None:
    """Its next input may never come, and nothing else runs."""
    world = World(101, settings(recent_tokens=0), budget=500, caching=False)
    session = world.add("session", prompt(200), max_tokens=500)
    for _ in range(3):
        world.step()
    world.running.remove(session)  # as vLLM does when an answer ends; the pages stay
    session.status = RequestStatus.WAITING_FOR_STREAMING_REQ
    world.add("next", prompt(40, 1), max_tokens=10)
    world.in_flight.append(world.schedule())  # step() would miss the session's pages
    world.finish_step()
    assert [request.request_id for request in world.running] == ["next"]
    # What the session holds on to is not expected back either.
    world.add("huge", prompt(40, 2), max_tokens=500)
    world.schedule()
    assert len(world.running) == 1 and world.residual.counters.held_back == 1


@pytest.mark.parametrize("by_priority", [True, False])
def test_nobody_waits_for_less_important_requests(by_priority: bool) -> None:
    """vLLM preempts them first, under ``--scheduling-policy priority`` only."""
    world = World(101, settings(recent_tokens=0), budget=500, caching=False)
    world.link.by_priority = by_priority
    for index in range(3):
        world.add(f"q{index}", prompt(30, index), max_tokens=60)
    world.step()
    assert len(world.running) == 3
    for name, priority in (("as they are", 0), ("urgent", -1)):
        newcomer = world.add(name, prompt(30, 99), max_tokens=60)
        newcomer.priority = priority
        world.step()
        assert (newcomer in world.running) == (by_priority and priority < 0)
        if newcomer in world.waiting:
            world.abort(newcomer)
    # Equals are waited for as ever.
    second = world.add("urgent too", prompt(30, 98), max_tokens=400)
    second.priority = -1
    world.step()
    assert second in world.waiting


def test_a_pinned_request_is_counted_with_all_its_pages() -> None:
    running = {}
    for mode in ("full", "compressed"):
        world = World(101, settings(recent_tokens=0), budget=500, caching=False)
        for index in range(10):
            world.add(f"q{index}", prompt(30, index), mode, max_tokens=60)
        world.step()
        running[mode] = len(world.running)
        world.run()
        assert not world.num_preemptions
    assert running == {"full": 2, "compressed": 3}


def test_pages_found_in_the_prefix_cache_are_not_expected_back() -> None:
    world = World(101, settings(recent_tokens=0), budget=500)
    shared = prompt(40)
    world.add("first", shared, max_tokens=2)
    world.run()
    world.add("a", [*shared, 1, 2, 3, 4], max_tokens=30)
    world.step()
    manager, request = world.residual, world.running[0]
    ledger = manager.ledgers["a"]
    assert ledger.num_adopted == 40
    (growth,) = manager.outlook._growths(request, ledger)
    assert growth.own == 1 + 2, "its own R page, the sink page and a window's"


def test_a_refusal_holds_for_some_steps_or_until_a_request_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = burst(True)
    forecasts: list[int] = []
    outlook = world.residual.outlook
    peak = outlook._peak
    monkeypatch.setattr(outlook, "_peak", lambda *args: (forecasts.append(0), peak(*args))[1])
    world.step()
    assert len(world.running) == 3 and len(forecasts) == 3, "two follow the first, one may not"
    for _ in range(MAX_SKIPPED):
        world.step()
    assert len(forecasts) == 3
    world.step()
    assert len(forecasts) == 4
    world.abort(world.running[0])
    world.step()
    assert len(forecasts) > 4 and len(world.running) == 3
    world.run()


def test_no_prompt_is_looked_up_while_its_refusal_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(201, settings(recent_tokens=0), budget=500)
    shared = prompt(80, 1)
    for index in range(6):
        world.add(f"q{index}", [*shared, *prompt(30, 2 + index)], max_tokens=120)
    looked_up: list[str] = []
    original = EchoRetainedManager.find_longest_cache_hit.__func__

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        looked_up.append(world.link.looked_up.request_id)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(EchoRetainedManager, "find_longest_cache_hit", classmethod(counted))
    world.step()
    waiting = world.waiting[0]
    assert looked_up[-1] == waiting.request_id and len(world.running) > 1
    looked_up.clear()
    for _ in range(2 * (MAX_SKIPPED + 1)):
        world.step()
    assert looked_up == 2 * [waiting.request_id]
    assert not waiting.skip_reading_prefix_cache
    adopted = {}
    while world.running or world.waiting:
        world.step()
        adopted |= {name: ledger.num_adopted for name, ledger in world.residual.ledgers.items()}
    assert adopted[waiting.request_id] == 80, "what it finds when it is admitted counts"


def test_random_traffic_is_preempted_less_and_ends_as_well() -> None:
    preemptions = {}
    for look_ahead in (False, True):
        source = random.Random(7)
        echo = settings(recent_tokens=0, look_ahead=look_ahead)
        world = World(161, echo, budget=64, depth=1)
        for index in range(150):
            world.add(
                f"q{index}", prompt(source.randint(5, 60), index),
                max_tokens=source.choice([5, 20, 80]),
            )  # fmt: skip
        world.run()
        assert len(world.finished) == 150
        preemptions[look_ahead] = world.num_preemptions
        world.check_idle()
    assert preemptions[True] <= preemptions[False] // 4, preemptions
