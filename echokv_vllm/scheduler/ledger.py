"""What the D manager remembers about each request, and the counters it reports."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

FULL = "full"
COMPRESSED = "compressed"
AUTO = "auto"


@dataclass
class RequestLedger:
    """State of one request that holds, or is about to hold, pages.

    Attributes:
        requested: Mode the request (or the server's default) asks for.
        mode: How new tokens are stored now: FULL or COMPRESSED. None before admission.
        undecided: Whether the next attempt at admission chooses the mode.
        num_committed: Tokens whose step has finished; a page of uncommitted tokens may
            still be written and must not be dropped.
        taint: First token that may have been computed from rebuilt heads; None when every
            token is exact. Never grows, never cleared while the request holds pages.
        next_drop: Index of the first D page that pressure may take. Page 0, the sink
            page, is never taken.
        num_adopted: Leading tokens found in the prefix cache at admission.
        num_settled: Leading R blocks for which it is settled which copy the prefix cache hands out.
        is_cut: Whether a lookup of its prompt was counted as cut.
        held_back: Whether it was counted as held back.
        admitted: Whether the request was counted as started.
        demoted: Whether it was counted as demoted.
    """

    requested: str
    mode: str | None = None
    undecided: bool = True
    num_committed: int = 0
    taint: int | None = None
    next_drop: int = 1
    num_adopted: int = 0
    num_settled: int = 0
    is_cut: bool = False
    held_back: bool = False
    admitted: bool = False
    demoted: bool = False

    def taint_from(self, token: int) -> None:
        """Marks tokens from ``token`` on as possibly inexact."""
        self.taint = token if self.taint is None else min(self.taint, token)


@dataclass
class Counters:
    """Totals since start-up, exported as metrics (see ``echokv_vllm.metrics``).

    Attributes:
        admitted_full: Requests that started with the full cache.
        admitted_compressed: Requests that started compressed, also those that will keep residuals
            but took over a prefix without them.
        held_back: Requests that waited because the running ones were expected to need the
            pages.
        demoted: ``auto`` requests that lost their first residual page or stopped keeping
            residuals after a full start.
        restored: Times a compressed ``auto`` request went back to keeping residuals.
        pages_dropped: Residual pages taken from running requests under pressure.
        window_pages_dropped: Residual pages that left the recent window of a compressed
            request.
        hits_unpaired: Requests whose prefix-cache hit ended where the D block found belongs to
            another R block.
    """

    admitted_full: int = 0
    admitted_compressed: int = 0
    held_back: int = 0
    demoted: int = 0
    restored: int = 0
    pages_dropped: int = 0
    window_pages_dropped: int = 0
    hits_unpaired: int = 0

    def values(self) -> tuple[int, ...]:
        """The counters in declaration order."""
        return dataclasses.astuple(self)
