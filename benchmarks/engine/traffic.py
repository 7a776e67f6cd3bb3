"""Kinds of traffic for `replay.py`: when requests arrive, their prompts and their outputs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Arrival:
    """One request.

    Attributes:
        time: Seconds.
        prompt_len: Tokens.
        output_len: Tokens it will generate.
        max_tokens: What the client names; None where it names nothing.
        num_shared: Leading tokens of the prompt that all requests have.
    """

    time: float
    prompt_len: int
    output_len: int
    max_tokens: int | None
    num_shared: int = 0


@dataclass(frozen=True)
class Traffic:
    """Requests and the server they meet.

    Attributes:
        arrivals: In order of time.
        kv_cache_bytes: The KV cache.
        max_model_len: Tokens.
        max_num_seqs: Requests that may run at once.
    """

    arrivals: list[Arrival]
    kv_cache_bytes: int
    max_model_len: int
    max_num_seqs: int = 128


def _lognormal(source: random.Random, mean: float, sigma: float, most: int) -> int:
    drawn = source.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
    return max(1, min(most, int(drawn)))


def _burst() -> Traffic:
    """64 prompts of 8,000 tokens at once, 1,000 tokens each, as the client names."""
    return Traffic([Arrival(0.0, 8000, 1000, 1000) for _ in range(64)], 27 * GIB, 9216, 64)


def _stream(
    count: int, rate: float, prompt_len: tuple[int, int], output: tuple[float, float, int],
    max_tokens: int | None, num_shared: int = 0,
) -> list[Arrival]:  # fmt: skip
    """Arrivals at random, `rate` a second; outputs lognormal: mean, sigma and most."""
    source = random.Random(3)
    arrivals, now = [], 0.0
    for _ in range(count):
        now += source.expovariate(rate)
        output_len = _lognormal(source, *output)
        own = source.randint(*prompt_len)
        arrivals.append(Arrival(now, num_shared + own, output_len, max_tokens, num_shared))
    return arrivals


def _chat(max_tokens: int | None) -> Traffic:
    return Traffic(_stream(500, 14, (200, 3000), (400, 0.9, 3000), max_tokens), 6 * GIB, 8192)


def _shared_prompts() -> Traffic:
    """Prompts that begin with the same 6,000 tokens, 12 a second, no bound named."""
    return Traffic(
        _stream(400, 12, (50, 1000), (400, 0.9, 3000), None, num_shared=6000), 4 * GIB, 16384
    )


def _long_prompts() -> Traffic:
    """Documents of 4k to 12k tokens, short outputs, 3 a second."""
    return Traffic(_stream(200, 3, (4000, 12000), (200, 0.6, 1000), 1024), 20 * GIB, 16384)


def _long_outputs() -> Traffic:
    """300 prompts of about 1,000 tokens at once, 4,000 to 6,000 tokens each, as named."""
    source = random.Random(3)
    arrivals = []
    for _ in range(300):
        output = source.randint(4000, 6000)
        arrivals.append(Arrival(0.0, source.randint(800, 1200), output, output))
    return Traffic(arrivals, 20 * GIB, 8192)


def _reasoning() -> Traffic:
    """200 short prompts at once, outputs of any length up to 14,000 tokens, no bound named."""
    source = random.Random(3)
    arrivals = [
        Arrival(0.0, source.randint(100, 800), _lognormal(source, 3000, 0.8, 14000), None)
        for _ in range(200)
    ]
    return Traffic(arrivals, 16 * GIB, 16384)


TRAFFIC: dict[str, Callable[[], Traffic]] = {
    "burst": _burst,
    "chat": lambda: _chat(None),
    "chat-4096": lambda: _chat(4096),
    "shared-prompts": _shared_prompts,
    "long-prompts": _long_prompts,
    "long-outputs": _long_outputs,
    "reasoning": _reasoning,
}
