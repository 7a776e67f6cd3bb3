"""Decisions of the pressure policy, without vLLM: when to admit full, whom to shrink, when
to keep residuals again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


def admits_full(num_free: int, num_needed: int, num_usable: int, admit_full_below: float) -> bool:
    """Whether an ``auto`` request may start with its full cache.

    Args:
        num_free: Free pages of the pool.
        num_needed: Pages the whole request needs in full mode.
        num_usable: Pages of the pool, the null page not counted.
        admit_full_below: Largest share of the pool that may be in use afterwards.
    """
    return num_usable - (num_free - num_needed) <= admit_full_below * num_usable


def share_out(holdings: Mapping[str, int], num_pages: int) -> dict[str, int]:
    """Splits a demand over requests so that the largest holders end up level.

    Args:
        holdings: Pages each request could give up.
        num_pages: Pages wanted; less is returned when less is held.

    Returns:
        Pages to take per request, requests that give nothing left out. Ties go to the
        request that comes first in ``holdings``.
    """
    ranked = sorted((name for name in holdings if holdings[name]), key=lambda n: -holdings[n])
    level, spare = 0, 0  # holders keep `level` pages, the last `spare` levelled ones one more
    total = 0
    for num_holders, name in enumerate(ranked, 1):
        # The largest holders down to the next one's level, as many as the demand reaches.
        total += holdings[name]
        below = holdings[ranked[num_holders]] if num_holders < len(ranked) else 0
        if total - num_holders * below >= num_pages:
            level, spare = divmod(total - num_pages, num_holders)
            ranked = ranked[:num_holders]
            break
    first_spare = len(ranked) - spare
    taken = {
        name: holdings[name] - level - (place >= first_spare) for place, name in enumerate(ranked)
    }
    return {name: count for name, count in taken.items() if count > 0}


@dataclass
class Hysteresis:
    """Turns a noisy usage signal into rare "there is room again" events.

    Attributes:
        below: Share of the pool in use under which a step counts as calm.
        num_steps: Calm steps in a row that make an event.
    """

    below: float
    num_steps: int
    num_calm: int = 0

    def update(self, usage: float) -> bool:
        """Counts one scheduler step; True when the calm has lasted long enough."""
        self.num_calm = self.num_calm + 1 if usage < self.below else 0
        if self.num_calm < self.num_steps:
            return False
        self.num_calm = 0
        return True
