"""What the scheduler can promise about a whole step, and how the worker hears of it.

Pages validate themselves, so no step needs a promise. But the worker learns on the device what is
compressed, too late to leave out kernels that will find nothing to do; the scheduler knows it on
the host before. Where it says nothing, or nobody passes it on, steps are mixed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from echokv_kernels.step_plan import StepKind

_ATTRIBUTE = "echokv_step_kind"  # on vLLM's SchedulerOutput, which is pickled whole

_current: ContextVar[StepKind] = ContextVar("echokv_step_kind", default=StepKind.MIXED)


def attach(scheduler_output: Any, kind: StepKind) -> None:
    """Scheduler side: sends a promise along with the step."""
    setattr(scheduler_output, _ATTRIBUTE, kind)


def attached(scheduler_output: Any) -> StepKind:
    """Worker side: the promise that came with a step."""
    kind = getattr(scheduler_output, _ATTRIBUTE, StepKind.MIXED)
    assert isinstance(kind, StepKind)
    return kind


@contextlib.contextmanager
def announced(kind: StepKind) -> Iterator[None]:
    """While a step is prepared and run, in this thread."""
    token = _current.set(kind)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> StepKind:
    """The announced kind of the step under way."""
    return _current.get()
