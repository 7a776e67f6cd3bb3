"""Scheduling alone: traffic through vLLM's scheduler, steps timed by a model of one GPU.

    python benchmarks/engine/replay.py [--traffic burst,chat] [--configs stock,auto] [--json FILE]

Admission, prefix caching, EchoKV's managers and preemption are the real code; nothing is computed.
A step takes as long as its weights, prompt tokens and cached bytes would on an H200 with
Llama-3.1-8B and `local-0.5` (`Costs`), so hours of traffic take minutes on a CPU. Configurations:
stock, auto, compressed, and auto-prompt, which is auto with `look_ahead: false`: a request starts
as soon as its prompt fits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from models import LLAMA_8B, write_model
from traffic import TRAFFIC, Arrival, Traffic
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from echokv_vllm import compat
from echokv_vllm.config import SchedulerSettings
from echokv_vllm.specs import EchoResidualSpec, EchoRetainedSpec

CONFIGS = ("stock", "auto-prompt", "auto", "compressed")
PAGE = 16  # tokens
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
TOKEN_BYTES = NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * 2 * 2
STOP, GO_ON = 1, 7  # tokens


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, read off `benchmarks/results/2026-11-23-h200-3`.

    Attributes:
        step: Weights and everything that does not depend on the requests.
        prompt_token: A token of a prompt.
        cached_byte: A byte of K/V that a decode reads.
    """

    step: float = 0.0055
    prompt_token: float = 1 / 38_000
    cached_byte: float = 1 / 4.1e12


@dataclass
class Result:
    """What a replay counted.

    Attributes:
        seconds: Until the last request ended.
        tokens_per_second: Prompts and outputs over that time.
        peak_running: Most requests in a step.
        preemptions: How often a running request lost its pages.
        recomputed: Tokens it had computed before.
        mean_latency: Seconds from arrival to end.
        longest_gap: Most seconds between two tokens of one request.
        pages_dropped: Residual pages given up under pressure.
    """

    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_running: int = 0
    preemptions: int = 0
    recomputed: int = 0
    mean_latency: float = 0.0
    longest_gap: float = 0.0
    pages_dropped: int = 0


def make_scheduler(
    config: str, traffic: Traffic, model: Path, kind: type[Scheduler] = Scheduler
) -> Scheduler:
    """vLLM's scheduler over a pool of the traffic's size."""
    vllm_config = EngineArgs(
        model=str(model), max_model_len=traffic.max_model_len, max_num_seqs=traffic.max_num_seqs,
        max_num_batched_tokens=16384, load_format="dummy", async_scheduling=False,
    ).create_engine_config()  # fmt: skip
    if config == "stock":
        page_bytes = PAGE * TOKEN_BYTES
        spec = FullAttentionSpec(
            block_size=PAGE, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16
        )
        groups = [KVCacheGroupSpec(["layer"], spec)]
    else:
        page_bytes = PAGE * TOKEN_BYTES // 2
        settings = SchedulerSettings(
            mode=config.partition("-")[0], recent_tokens=256, admit_full_below=0.9,
            restore_below=0.7, restore_steps=64, strict=config != "compressed",
            look_ahead=config != "auto-prompt",
            watermark=0.0, retained_block_size=PAGE, residual_block_size=PAGE, plan="local-0.5",
            ratio=0.5,
        )  # fmt: skip
        common: dict[str, Any] = dict(
            block_size=PAGE, num_kv_heads=NUM_KV_HEADS // 2, head_size=HEAD_DIM,
            dtype=torch.bfloat16, echo_settings=settings.to_json(),
        )  # fmt: skip
        groups = [
            KVCacheGroupSpec(["retained"], EchoRetainedSpec(**common)),
            KVCacheGroupSpec(["residual"], EchoResidualSpec(**common)),
        ]
    num_blocks = traffic.kv_cache_bytes // page_bytes
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    pool = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    manager = StructuredOutputManager(vllm_config)
    return kind(vllm_config, pool, manager, block_size=PAGE, hash_block_size=PAGE)


class Replay:
    """One traffic through one configuration.

    Args:
        config: One of ``CONFIGS``.
        traffic: The requests.
        model: Folder with the model's config; its weights are not needed.
        costs: What steps take.
    """

    def __init__(self, config: str, traffic: Traffic, model: Path, costs: Costs) -> None:
        compat.patch_scheduler()
        compat.patch_lookup()
        self.traffic, self.costs = traffic, costs
        self.scheduler = make_scheduler(config, traffic, model)
        self.groups = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(PAGE, sha256)
        self.waiting = list(enumerate(traffic.arrivals))[::-1]
        self.targets: dict[str, Arrival] = {}
        self.last_token: dict[str, float] = {}
        self.latencies: list[float] = []
        self.result = Result()
        self.now = 0.0
        self._count_preemptions()

    def _count_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counted(request: Request, *args: Any, **kwargs: Any) -> Any:
            self.result.preemptions += 1
            self.result.recomputed += request.num_computed_tokens
            return preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = counted

    def run(self) -> Result:
        """Plays all of it."""
        while self.waiting or self.scheduler.has_unfinished_requests():
            self._arrive()
            if self.scheduler.has_unfinished_requests():
                self._step()
            else:
                self.now = self.waiting[-1][1].time
        result, arrivals = self.result, self.traffic.arrivals
        num_tokens = sum(a.prompt_len + a.output_len for a in arrivals)
        result.seconds = self.now
        result.tokens_per_second = num_tokens / self.now
        result.mean_latency = sum(self.latencies) / len(self.latencies)
        result.pages_dropped = getattr(self.groups[-1], "counters", result).pages_dropped
        return result

    def _arrive(self) -> None:
        while self.waiting and self.waiting[-1][1].time <= self.now:
            index, arrival = self.waiting.pop()
            room = self.traffic.max_model_len - arrival.prompt_len
            params = SamplingParams(
                max_tokens=room if arrival.max_tokens is None else min(arrival.max_tokens, room),
                temperature=0, stop_token_ids=[STOP],
            )  # fmt: skip
            # Beyond what they share, no two prompts have a page in common.
            own = [index % 200 + 2, index // 200 + 2]
            num_rest = arrival.prompt_len - arrival.num_shared - len(own)
            prompt = [*[GO_ON] * arrival.num_shared, *own, *[GO_ON] * num_rest]
            request = Request(str(index), prompt, params, None, block_hasher=self.hasher)
            self.targets[request.request_id] = arrival
            self.scheduler.add_request(request)

    def _step(self) -> None:
        output = self.scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        self.now += self._seconds(scheduled) if scheduled else self.costs.step
        self.result.peak_running = max(self.result.peak_running, len(scheduled))
        sampled = [self._sample(self.scheduler.requests[name]) for name in scheduled]
        names = list(scheduled)
        answers = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=sampled,
            ),
        )
        for answer in answers.values():
            for ended in answer.outputs:
                if ended.finish_reason is not None:
                    self.latencies.append(self.now - self.targets[ended.request_id].time)

    def _seconds(self, scheduled: dict[str, int]) -> float:
        prompt_tokens = sum(count for count in scheduled.values() if count > 1)
        decodes = [name for name, count in scheduled.items() if count == 1]
        return (
            self.costs.step
            + self.costs.prompt_token * prompt_tokens
            + self.costs.cached_byte * sum(self._pages_read(decodes)) * PAGE * self._page_token()
        )

    def _page_token(self) -> int:
        return TOKEN_BYTES // len(self.groups)

    def _pages_read(self, names: list[str]) -> Iterator[int]:
        for group in self.groups:
            for name in names:
                yield sum(not block.is_null for block in group.req_to_blocks.get(name, ()))

    def _sample(self, request: Request) -> list[int]:
        name = request.request_id
        if request.num_computed_tokens < request.num_tokens:
            return []  # not the last chunk of its prompt
        if name in self.last_token:
            gap = self.now - self.last_token[name]
            self.result.longest_gap = max(self.result.longest_gap, gap)
        self.last_token[name] = self.now
        is_last = request.num_output_tokens + 1 >= self.targets[name].output_len
        return [STOP if is_last else GO_ON]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, allowed in (("traffic", tuple(TRAFFIC)), ("configs", CONFIGS)):
        parser.add_argument(
            f"--{name}", default=",".join(allowed), metavar="NAME[,NAME...]",
            help=f"any of {', '.join(allowed)} (default: all)",
        )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all results there")
    args = parser.parse_args()
    for name, allowed in (("traffic", tuple(TRAFFIC)), ("configs", CONFIGS)):
        chosen = getattr(args, name).split(",")
        if unknown := [one for one in chosen if one not in allowed]:
            parser.error(f"--{name} {unknown[0]!r} is none of {', '.join(allowed)}")
        setattr(args, name, chosen)
    return args


def main() -> None:
    args = parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), LLAMA_8B)
        for name in args.traffic:
            for config in args.configs:
                result = asdict(Replay(config, TRAFFIC[name](), model, Costs()).run())
                results.setdefault(name, {})[config] = result
                shown = " ".join(f"{key} {value:,.6g}" for key, value in result.items())
                print(f"{name:<13} {config:<12} {shown}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
