"""The pressure policy, pure Python."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echokv_vllm.scheduler.policy import Hysteresis, admits_full, share_out

# The machine may be busy, and a failure must come back.
repeatable = settings(deadline=None, derandomize=True)
holdings_of = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(0, 40))


@pytest.mark.parametrize(
    ("num_free", "num_needed", "below", "expected"),
    [
        (100, 90, 0.9, True),  # exactly the share is allowed
        (100, 91, 0.9, False),
        (100, 100, 1.0, True),
        (50, 41, 0.9, False),
        (0, 0, 1.0, True),
        (10, 20, 1.0, False),  # never more than is free
        (100, 1, 0.0, False),
    ],
)
def test_a_request_starts_full_up_to_the_share(
    num_free: int, num_needed: int, below: float, expected: bool
) -> None:
    assert admits_full(num_free, num_needed, 100, below) is expected


@pytest.mark.parametrize(
    ("holdings", "num_pages", "expected"),
    [
        ({"a": 5, "b": 3, "c": 1}, 2, {"a": 2}),
        ({"a": 5, "b": 3, "c": 1}, 4, {"a": 3, "b": 1}),
        ({"a": 5, "b": 3, "c": 1}, 100, {"a": 5, "b": 3, "c": 1}),
        ({"a": 2, "b": 2, "c": 2}, 1, {"a": 1}),
        ({"a": 2, "b": 2, "c": 2}, 2, {"a": 1, "b": 1}),
        ({"c": 2, "a": 2}, 1, {"c": 1}),
        ({"a": 0, "b": 1}, 1, {"b": 1}),
        ({"a": 3}, 0, {}),
        ({}, 3, {}),
    ],
)
def test_the_largest_holder_gives_first_and_ties_go_in_order(
    holdings: dict[str, int], num_pages: int, expected: dict[str, int]
) -> None:
    assert share_out(holdings, num_pages) == expected


@repeatable
@given(holdings_of, st.integers(0, 400))
def test_a_demand_is_met_exactly_or_as_far_as_it_goes(
    holdings: dict[str, int], num_pages: int
) -> None:
    taken = share_out(holdings, num_pages)
    assert sum(taken.values()) == min(num_pages, sum(holdings.values()))
    assert all(0 < count <= holdings[name] for name, count in taken.items())


@repeatable
@given(holdings_of, st.integers(0, 400))
def test_who_gives_ends_up_level_and_above_nobody_who_does_not(
    holdings: dict[str, int], num_pages: int
) -> None:
    taken = share_out(holdings, num_pages)
    left = {name: count - taken.get(name, 0) for name, count in holdings.items()}
    for name in taken:
        assert max(left.values()) - left[name] <= 1


@repeatable
@given(holdings_of, st.integers(0, 400))
def test_splitting_page_by_page_gives_the_same_levels(
    holdings: dict[str, int], num_pages: int
) -> None:
    """Reference: the largest holder gives one page, again and again."""
    left = dict(holdings)
    for _ in range(min(num_pages, sum(holdings.values()))):
        left[max(left, key=lambda name: left[name])] -= 1
    taken = share_out(holdings, num_pages)
    assert sorted(left.values()) == sorted(n - taken.get(k, 0) for k, n in holdings.items())


def test_calm_must_last_before_room_is_reported() -> None:
    hysteresis = Hysteresis(below=0.5, num_steps=3)
    usages = [0.4, 0.4, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert [hysteresis.update(usage) for usage in usages] == [
        False, False, False, False, False, True, False, False, True,
    ]  # fmt: skip


@repeatable
@given(st.lists(st.floats(0, 1), max_size=60), st.integers(1, 5), st.floats(0, 1))
def test_an_event_ends_exactly_that_many_calm_steps(
    usages: list[float], num_steps: int, below: float
) -> None:
    hysteresis = Hysteresis(below, num_steps)
    last_event = -1
    for index, usage in enumerate(usages):
        event = hysteresis.update(usage)
        window = usages[max(last_event + 1, index - num_steps + 1) : index + 1]
        assert event == (len(window) == num_steps and all(u < below for u in window))
        if event:
            last_event = index
