"""The demo's three acts: answers per mode, a burst under pressure, the burst on stock vLLM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.demo.server import Server
from echokv_vllm.needle import NeedlePrompt, make_prompts

ANSWER_TOKENS = 12
SAMPLE_SECONDS = 0.05
STOCK_BLOCK_SIZE = 32  # tokens; the CPU backend takes multiples of 32


@dataclass(frozen=True)
class DemoOptions:
    """What ``echokv demo`` runs.

    Attributes:
        model: Model folder.
        checkpoint: EchoKV checkpoint folder.
        log_dir: Folder for the servers' logs.
        num_prompts: Needle prompts per mode.
        prompt_len: Tokens per prompt.
        burst: Concurrent requests of the burst.
        burst_tokens: Tokens each of them generates.
        pool_tokens: Tokens the pool holds in full mode.
        dtype: The model's number type.
    """

    model: str
    checkpoint: str
    log_dir: Path
    num_prompts: int = 24
    prompt_len: int = 1200
    burst: int = 18
    burst_tokens: int = 96
    pool_tokens: int = 16384
    dtype: str = "float32"


@dataclass(frozen=True)
class ModeResult:
    """Answers of one mode: how many were right, and the KV bytes one token takes."""

    mode: str
    num_correct: int
    num_prompts: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class BurstResult:
    """A burst on one server."""

    server: str
    peak_running: int
    num_preemptions: int
    num_pages_dropped: int
    num_completed: int
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Everything the table shows."""

    plan: str
    ratio: float
    pool_bytes: int
    modes: tuple[ModeResult, ...]
    bursts: tuple[BurstResult, ...]


def run_demo(options: DemoOptions, say: Callable[[str], None]) -> DemoResult:
    """Runs both servers one after the other.

    Args:
        options: What to run.
        say: Receives a line of progress.

    Raises:
        ServerError: A server does not start.
        CheckpointError: The checkpoint is unusable.
    """
    from echokv_kernels.layout import PlanLayout

    checkpoint = EchoCheckpoint.load(options.checkpoint)
    plan, shape = checkpoint.plan, checkpoint.fingerprint
    layout = PlanLayout(
        tuple(len(layer.retained) for layer in plan.layers), shape.num_kv_heads, shape.head_dim,
        2 if options.dtype == "bfloat16" else 4,
    )  # fmt: skip
    sizes = layout.block_sizes()
    num_blocks = round(options.pool_tokens * (1 / sizes.retained + 1 / sizes.residual)) + 1
    pool_bytes = num_blocks * max(
        sizes.retained * layout.retained_bytes_per_token,
        sizes.residual * layout.residual_bytes_per_token,
    )
    stock_blocks = pool_bytes // (STOCK_BLOCK_SIZE * layout.full_bytes_per_token)
    common: dict[str, Any] = dict(
        max_model_len=options.prompt_len + max(ANSWER_TOKENS, options.burst_tokens) + 64,
        max_num_seqs=options.burst, dtype=options.dtype, enforce_eager=True,
    )  # fmt: skip
    prompts = make_prompts(options.num_prompts, options.prompt_len, seed=1)
    burst = make_prompts(options.burst, options.prompt_len, seed=2)
    bytes_per_token = {
        "full": layout.full_bytes_per_token, "compressed": layout.retained_bytes_per_token
    }  # fmt: skip

    say(f"starting vLLM with EchoKV (log: {options.log_dir / 'echokv.log'})")
    modes = []
    with Server(
        options.model, options.log_dir / "echokv.log", options.checkpoint,
        num_gpu_blocks_override=num_blocks, **common,
    ) as server:  # fmt: skip
        for mode, num_bytes in bytes_per_token.items():
            say(f"asking {len(prompts)} needle questions in {mode} mode")
            correct = asyncio.run(ask(server, prompts, mode))
            modes.append(ModeResult(mode, correct, len(prompts), num_bytes))
        say(f"sending a burst of {len(burst)} requests to a pool for {options.pool_tokens} tokens")
        bursts = [asyncio.run(_burst(server, burst, options.burst_tokens, "EchoKV, auto"))]
    say(f"the same burst on stock vLLM with the same bytes (log: {options.log_dir / 'stock.log'})")
    with Server(
        options.model, options.log_dir / "stock.log",
        num_gpu_blocks_override=stock_blocks, block_size=STOCK_BLOCK_SIZE, **common,
    ) as server:  # fmt: skip
        bursts.append(asyncio.run(_burst(server, burst, options.burst_tokens, "stock vLLM")))
    return DemoResult(plan.name, plan.ratio, pool_bytes, tuple(modes), tuple(bursts))


def _client(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600.0, max_retries=0)


async def ask(server: Server, prompts: list[NeedlePrompt], mode: str) -> int:
    """Right answers, a few requests at a time so that no pressure arises."""
    gate = asyncio.Semaphore(4)
    async with _client(server) as client:

        async def one(prompt: NeedlePrompt) -> bool:
            async with gate:
                answer = await client.completions.create(
                    model="demo", prompt=prompt.text, max_tokens=ANSWER_TOKENS, temperature=0,
                    # A salt of its own: the second mode must not reuse the first one's cache.
                    extra_body={"vllm_xargs": {"echokv": mode}, "cache_salt": mode},
                )  # fmt: skip
            return prompt.is_correct(answer.choices[0].text)

        return sum(await asyncio.gather(*(one(prompt) for prompt in prompts)))


async def _burst(
    server: Server, prompts: list[NeedlePrompt], num_tokens: int, name: str
) -> BurstResult:
    before, start = server.metrics(), time.monotonic()
    peak = 0
    async with _client(server) as client:

        async def one(prompt: NeedlePrompt) -> bool:
            answer = await client.completions.create(
                model="demo", prompt=prompt.text, max_tokens=num_tokens, temperature=0,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            return answer.usage is not None and answer.usage.completion_tokens == num_tokens

        work = asyncio.gather(*(one(prompt) for prompt in prompts))
        async with httpx.AsyncClient(timeout=30.0) as probe:
            while not work.done():
                text = (await probe.get(f"{server.url}/metrics")).text
                peak = max(peak, _running(text))
                await asyncio.sleep(SAMPLE_SECONDS)
        completed = sum(await work)
    after = server.metrics()

    def grown(metric: str) -> int:
        return int(after.get(metric, 0) - before.get(metric, 0))

    return BurstResult(
        name, peak, grown("vllm:num_preemptions_total"), grown("echokv:pages_dropped"),
        completed, time.monotonic() - start,
    )  # fmt: skip


def _running(metrics: str) -> int:
    """``vllm:num_requests_running`` of a scrape."""
    return sum(
        int(float(line.rsplit(" ", 1)[1]))
        for line in metrics.splitlines()
        if line.startswith("vllm:num_requests_running{")
    )
