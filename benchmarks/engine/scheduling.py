"""What scheduling costs the host: vLLM's scheduler over EchoKV's managers, nothing computed.

    python benchmarks/engine/scheduling.py [--requests 256] [--configs stock,full,auto,compressed]

All requests decode one token per step, scheduled asynchronously, with prefix caching and room for
everything. With hundreds of them a step can take the host longer than the GPU. Milliseconds per
step, median [p10, p90], of schedule() and update_from_output(). Meaningful on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from models import LLAMA_8B, write_model
from replay import GO_ON, PAGE, TOKEN_BYTES, make_scheduler
from traffic import Traffic
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

CONFIGS = ("stock", "full", "auto", "compressed")
PROMPT_LEN, OUTPUT_LEN = 512, 3000
WARM_UP = 40  # steps until all prompts are computed, and a few more


def start(config: str, num_requests: int, model: Path) -> AsyncScheduler:
    """A scheduler with room for all of its requests, which wait."""
    length = PROMPT_LEN + OUTPUT_LEN
    traffic = Traffic(
        arrivals=[], kv_cache_bytes=2 * num_requests * length * TOKEN_BYTES,
        max_model_len=length, max_num_seqs=num_requests,
    )  # fmt: skip
    scheduler = make_scheduler(config, traffic, model, AsyncScheduler)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(PAGE, sha256)
    for index in range(num_requests):
        params = SamplingParams(max_tokens=OUTPUT_LEN, temperature=0, ignore_eos=True)
        # No two prompts have a page in common.
        prompt = [index % 200 + 2, index // 200 + 2, *[GO_ON] * (PROMPT_LEN - 2)]
        scheduler.add_request(Request(str(index), prompt, params, None, block_hasher=hasher))
    return scheduler


def step(scheduler: AsyncScheduler) -> tuple[float, float, int]:
    """Milliseconds of schedule() and of update_from_output(), and requests of the step."""
    begin = time.perf_counter()
    output = scheduler.schedule()
    scheduled = time.perf_counter() - begin
    names = list(output.num_scheduled_tokens)
    done = [scheduler.requests[name].num_computed_tokens >= PROMPT_LEN for name in names]
    answer: Any = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[GO_ON] if is_done else [] for is_done in done],
    )
    begin = time.perf_counter()
    scheduler.update_from_output(output, answer)
    return scheduled * 1e3, (time.perf_counter() - begin) * 1e3, len(names)


def measure(config: str, num_requests: int, num_steps: int, model: Path) -> str:
    """A line of the table."""
    scheduler = start(config, num_requests, model)
    for _ in range(WARM_UP):
        step(scheduler)
    schedule, update, counts = zip(*(step(scheduler) for _ in range(num_steps)), strict=True)
    assert min(counts) == num_requests, f"{min(counts)} of {num_requests} requests ran in a step"
    parts = []
    for times in (schedule, update):
        tenths = statistics.quantiles(times, n=10)
        parts.append(f"{statistics.median(times):.2f} [{tenths[0]:.2f}, {tenths[-1]:.2f}]")
    return f"{config:<12} {parts[0]:<22} {parts[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--configs", default=",".join(CONFIGS), help=f"of {', '.join(CONFIGS)}")
    args = parser.parse_args()
    configs = args.configs.split(",")
    if unknown := [config for config in configs if config not in CONFIGS]:
        parser.error(f"--configs {unknown[0]!r} is none of {', '.join(CONFIGS)}")
    if args.requests < 1 or args.steps < 2:
        parser.error("--requests must be at least 1 and --steps at least 2")
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), LLAMA_8B)
        print(f"{'':<12} {'schedule()':<22} update_from_output()")
        for config in configs:
            print(measure(config, args.requests, args.steps, model), flush=True)


if __name__ == "__main__":
    main()
