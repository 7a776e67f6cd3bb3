"""What is measured on a running engine: pure decode steps, and prefill throughput.

The engine core is driven by hand in this process, step after step: only so can steps that hold
nothing but decoding requests be told from the others. What a server does with a step's results in
its front-end process, while the core goes on, is left out: in one process it would add to the step.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from dataclasses import dataclass
from typing import Any

# Pure decode steps not counted: the first ones may compile kernels or still wait for the last
# prefill, because with async scheduling two steps are under way at once.
SKIPPED_STEPS = 4
# Calls of step() that let the engine forget aborted requests; calls without work are free.
DRAIN_STEPS = 4
KINDS = ("decode", "prefill")


@dataclass(frozen=True)
class Scenario:
    """One measurement, written `decode:32x8192` or `prefill:4x16384`.

    Attributes:
        kind: `decode` measures step times of requests that all decode, `prefill` the prompt
            tokens per second of requests that generate one token.
        batch: Requests, all submitted at once.
        prompt_len: Tokens of each prompt.
    """

    kind: str
    batch: int
    prompt_len: int

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """Reads the written form.

        Raises:
            ValueError: Not of that form.
        """
        match = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*)", text)
        if match is None or match[1] not in KINDS:
            raise ValueError(
                f"scenario {text!r} must be KIND:BATCHxPROMPT_LEN with KIND one of "
                f"{', '.join(KINDS)}, for example decode:32x8192"
            )
        return cls(match[1], int(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"{self.kind}:{self.batch}x{self.prompt_len}"

    def max_tokens(self, num_steps: int, token_budget: int) -> int:
        """Tokens each request may generate.

        While the last prompts are computed the first requests decode already, one token per step.
        Their limit must leave ``num_steps`` steps in which everybody decodes.

        Args:
            num_steps: Pure decode steps to measure.
            token_budget: Tokens per step of the engine (max_num_batched_tokens).
        """
        if self.kind == "prefill":
            return 1
        prefill_steps = -(-self.batch * self.prompt_len // max(1, token_budget - self.batch))
        return prefill_steps + SKIPPED_STEPS + num_steps + 8


def _submit(engine: Any, scenario: Scenario, max_tokens: int, seed: int) -> list[str]:
    """Adds the scenario's requests with distinct random prompts; returns their ids."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # In a server the text is made by another process, so it is left out here.
    params = SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    ids = []
    for index in range(scenario.batch):
        source = random.Random(f"{seed}/{scenario}/{index}")
        prompt = {"prompt_token_ids": source.choices(range(256), k=scenario.prompt_len)}
        ids.append(f"{scenario}/{seed}/{index}")
        engine.add_request(ids[-1], prompt, params)
    return ids


def measure_decode(
    engine: Any, scenario: Scenario, num_steps: int, token_budget: int, seed: int = 0
) -> dict[str, Any]:
    """Times steps in which all requests decode and nothing else runs.

    The time of a step is the time between its result and the one before. With async scheduling
    that is the engine's real pace, while the duration of one call means little.

    Returns:
        Milliseconds: ``step_ms`` (median), ``p20_ms``, ``p80_ms``, ``mean_ms`` (far from the median
        when the pace is uneven), all ``steps_ms``; and
        ``prefill_s``, the seconds until every request had its first token.

    Raises:
        RuntimeError: The requests did not all stay in the batch.
    """
    ids = _submit(engine, scenario, scenario.max_tokens(num_steps, token_budget), seed)
    started: set[str] = set()
    seconds: list[float] = []
    prefill_s = 0.0
    begin = last = time.perf_counter()
    while len(seconds) < SKIPPED_STEPS + num_steps:
        outputs = engine.engine_core.get_output().outputs
        now = time.perf_counter()
        if any(output.finish_reason is not None for output in outputs):
            raise RuntimeError(
                f"{scenario}: requests ended after {len(seconds)} pure decode steps; the KV cache "
                "is too small to hold all of them at once. Give the engine more memory."
            )
        if not outputs:  # a chunk of a prompt, or a step that only filled the queue
            continue
        grown = {output.request_id for output in outputs}
        # Every request got a token and none its first one: no prompt was in this step.
        if len(grown) == scenario.batch and grown <= started:
            seconds.append(now - last)
        elif seconds:
            raise RuntimeError(
                f"{scenario}: only {len(grown)} requests were in a step after {len(seconds)} pure "
                "decode steps; the KV cache is too small. Give the engine more memory."
            )
        started |= grown
        if len(started) == scenario.batch and not prefill_s:
            prefill_s = now - begin
        last = now
    engine.abort_request(ids)
    for _ in range(DRAIN_STEPS):
        engine.step()
    steps_ms = [1e3 * value for value in seconds[SKIPPED_STEPS:]]
    quantiles = statistics.quantiles(steps_ms, n=5, method="inclusive")
    return {
        "step_ms": statistics.median(steps_ms),
        "p20_ms": quantiles[0],
        "p80_ms": quantiles[3],
        "mean_ms": statistics.fmean(steps_ms),
        "num_steps": len(steps_ms),
        "prefill_s": prefill_s,
        "steps_ms": [round(value, 4) for value in steps_ms],
    }


def measure_prefill(engine: Any, scenario: Scenario, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Prompt tokens per second until every request has its one token; one run to warm up.

    Returns:
        ``tokens_per_s`` (median), ``min_tokens_per_s``, ``max_tokens_per_s`` and all ``runs_s``.
    """
    runs_s = []
    for repeat in range(repeats + 1):
        _submit(engine, scenario, 1, seed + repeat)
        begin = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
        runs_s.append(time.perf_counter() - begin)
        for _ in range(DRAIN_STEPS):
            engine.step()
    rates = [scenario.batch * scenario.prompt_len / value for value in runs_s[1:]]
    return {
        "tokens_per_s": statistics.median(rates),
        "min_tokens_per_s": min(rates),
        "max_tokens_per_s": max(rates),
        "runs_s": runs_s[1:],
        "warm_up_s": runs_s[0],
    }
