"""Random traffic on a tiny pool, with a shadow copy of everything the residual pages should hold.

The shadow keeps K and V of every discarded head by retained slot, which pressure never takes away.
In every layer of every step, each residual page the worker accepts as exact is compared with it:
one difference means that a request read a page of somebody else.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine, generate, residual_manager, scheduler_of, tokens

from echokv_kernels.step_plan import StepKind
from echokv_vllm import compat, step_kind
from echokv_vllm.worker.impl import EchoKVImpl

MAX_LEN = 256
MODES = ("auto", "full", "compressed")
# Two float32 runs of different batches may break a near-tie differently; anything above this
# difference of log-probabilities is not a tie.
TIE = 1e-3


class Shadow:
    """Compares accepted residual pages with a dense copy; ``update`` replaces the layer's method.

    Attributes:
        num_accepted: Tokens read from residual pages, per layer that read them.
        num_stale: Block table entries within the context that were rejected by their stamp.
        num_steps: Forward passes seen.
        kinds: How many of them were announced as what.
    """

    def __init__(self, original: Callable[..., None]) -> None:
        self.original = original
        self.copies: dict[str, torch.Tensor] = {}
        self.num_accepted = self.num_stale = self.num_steps = 0
        self.kinds: Counter[StepKind] = Counter()
        self._step: Any = None
        self._reads: tuple[torch.Tensor, ...] = ()

    def update(self, impl: Any, layer: Any, key: Any, value: Any, *rest: Any) -> None:
        """``EchoKVImpl.do_kv_cache_update``, then the comparison: attention reads next."""
        self.original(impl, layer, key, value, *rest)
        if not impl.rank_layer.discarded:
            return
        step, cache = impl.worker.steps.step, impl.residual_layer.kv_cache
        if step is not self._step:
            self._step, self._reads = step, self._accepted_tokens(impl.worker.steps)
            self.num_steps += 1
            self._check_kind(impl.worker.steps)
        heads = impl.attention.discarded
        fresh = torch.cat((key[:, heads], value[:, heads]), dim=-1)
        num_slots = cache.shape[0] * impl.worker.steps.retained_block_size
        copy = self.copies.setdefault(impl.layer_name, fresh.new_zeros(num_slots, *fresh.shape[1:]))
        copy[step.retained_slots[: step.num_tokens]] = fresh[: step.num_tokens]
        page, offset, slot = self._reads
        differing = (cache[page, :, offset] != copy[slot]).flatten(1).any(1)
        assert not differing.any(), (
            f"{impl.layer_name}: foreign residual pages {page[differing].unique().tolist()} "
            f"accepted in step {self.num_steps}"
        )
        self.num_accepted += len(page)

    def _check_kind(self, steps: Any) -> None:
        """A step announced as full has every page, stamped."""
        step, kind = steps.step, step_kind.current()
        self.kinds[kind] += 1
        if kind is StepKind.FULL:
            first = torch.arange(step.residual_table.shape[1]) * steps.residual_block_size
            known = first < (step.context_lens + step.query_start_loc.diff())[:, None]
            assert (step.exact | ~known).all(), f"step {self.num_steps} was announced as full"

    def _accepted_tokens(self, steps: Any) -> tuple[torch.Tensor, ...]:
        """Page, offset and retained slot of each context token that is read from a page."""
        step, r_size, d_size = steps.step, steps.retained_block_size, steps.residual_block_size
        num_pages = step.residual_table.shape[1]
        first = torch.arange(num_pages) * d_size
        known = (first < step.context_lens[:, None]) & (step.residual_table != 0)
        self.num_stale += int((known & ~step.exact).sum())
        row, column = (known & step.exact).nonzero(as_tuple=True)
        token = (column * d_size)[:, None] + torch.arange(d_size)
        inside = token < step.context_lens[row][:, None]
        page = step.residual_table[row, column].long()[:, None].expand_as(token)
        r_page = step.retained_table[row[:, None], (token // r_size).clamp(
            max=step.retained_table.shape[1] - 1
        )].long()  # fmt: skip
        slot = r_page * r_size + token % r_size
        return page[inside], (token % d_size)[inside], slot[inside]


@dataclass
class Job:
    """One request of the traffic."""

    name: str
    prompt: list[int]
    mode: str | None
    max_tokens: int
    aborted: bool = False
    output: list[int] | None = None


@dataclass
class Traffic:
    """Random requests and what became of them."""

    source: random.Random
    jobs: dict[str, Job] = field(default_factory=dict)

    def arrive(self, seed: int, prefixes: list[list[int]]) -> Job:
        """Another request: any mode and length; its beginning is shared, own, or a whole recent
        conversation."""
        source = self.source
        mode = source.choice((None, None, *MODES))
        prompt = source.choice(prefixes) if source.random() < 0.6 else []
        prompt = prompt[: source.randint(1, 160)]
        if self.jobs and source.random() < 0.3:
            earlier = self.jobs[source.choice(list(self.jobs)[-5:])]
            prompt = (earlier.prompt + (earlier.output or []))[:180]
        prompt = prompt + [source.randrange(255) for _ in range(source.randint(1, 40))]
        job = Job(
            f"{seed}-{len(self.jobs)}", prompt, mode, source.choice((1, 12, 36, 36))
        )  # fmt: skip
        self.jobs[job.name] = job
        return job


def run_traffic(llm: Any, seed: int, num_requests: int) -> list[Job]:
    """Plays one seed to the end and checks what is left behind."""
    from vllm import SamplingParams

    core, source = llm.llm_engine, random.Random(seed)
    assert core.reset_prefix_cache()
    traffic = Traffic(source)
    prefixes = [[source.randrange(255) for _ in range(160)] for _ in range(3)]
    alive: dict[str, Job] = {}
    while len(traffic.jobs) < num_requests or alive:
        while len(traffic.jobs) < num_requests and source.random() < 0.6:
            job = traffic.arrive(seed, prefixes)
            extra = None if job.mode is None else {"echokv": job.mode}
            params = SamplingParams(
                max_tokens=job.max_tokens, temperature=0, ignore_eos=True, extra_args=extra
            )
            core.add_request(job.name, {"prompt_token_ids": job.prompt}, params)
            alive[job.name] = job
        if alive and source.random() < 0.02:
            job = alive.pop(source.choice(sorted(alive)))
            job.aborted = True
            core.abort_request([job.name])
        for output in core.step():
            if output.finished and output.request_id in alive:
                alive.pop(output.request_id).output = list(output.outputs[0].token_ids)
        if len(traffic.jobs) == num_requests and not core.has_unfinished_requests():
            break
    check_all_accounted_for(llm, list(traffic.jobs.values()))
    return list(traffic.jobs.values())


def check_all_accounted_for(llm: Any, jobs: list[Job]) -> None:
    """No request lost, no page held, no state kept."""
    for job in jobs:
        assert job.aborted or job.output is not None, f"{job.name} is lost"
        assert job.aborted or len(job.output or ()) == job.max_tokens, f"{job.name} is cut short"
    manager = residual_manager(llm)
    pool = manager.block_pool
    gc.collect()
    assert pool.get_num_free_blocks() == manager.num_usable_blocks
    assert manager.num_held_pages == 0 and not manager.ledgers and not manager.num_cached_block
    assert not manager.link.requested_modes
    assert len(manager.link.partner) <= manager.num_usable_blocks


def check_against_stock(model: Path, jobs: list[Job]) -> int:
    """Pinned requests answer as stock vLLM does. Returns how many broke a near-tie otherwise."""
    pinned = [job for job in jobs if job.mode == "full" and not job.aborted]
    assert pinned
    with engine(model, max_model_len=MAX_LEN, enable_prefix_caching=False) as llm:
        outputs = generate(llm, [job.prompt for job in pinned], max_tokens=36, detokenize=False)
    num_ties = 0
    for job, output, expected in zip(pinned, outputs, tokens(outputs), strict=True):
        assert job.output is not None
        differing = [i for i, token in enumerate(job.output) if token != expected[i]]
        if not differing:
            continue
        top = output.outputs[0].logprobs[differing[0]]
        ours, best = job.output[differing[0]], expected[differing[0]]
        assert ours in top and top[best].logprob - top[ours].logprob < TIE, (
            f"{job.name} (prompt of {len(job.prompt)}) differs from stock at {differing[0]}"
        )
        num_ties += 1
    assert num_ties <= len(pinned) // 100, "more ties than two float32 runs can explain"
    return num_ties


@dataclass(frozen=True)
class Server:
    """One engine configuration."""

    plan: str = "local-0.5"
    caching: bool = True
    echokv: tuple[tuple[str, Any], ...] = ()


SERVERS = {
    "caching": Server(echokv=(("admit_full_below", 1.0),)),
    "no-caching": Server(caching=False),
    # Pages of different sizes, a narrow window, and residuals that come back soon.
    "uneven": Server(
        "local-0.25", echokv=(("recent_tokens", 16), ("restore_steps", 4), ("restore_below", 0.9))
    ),
}


def fuzz(
    server: Server,
    model: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    seeds: range,
    num_requests: int,
) -> None:
    """Runs the seeds on one engine, then compares the pinned requests with stock vLLM."""
    options: dict[str, Any] = dict(
        max_model_len=MAX_LEN, max_num_batched_tokens=96, max_num_seqs=12,
        num_gpu_blocks_override=50, enable_prefix_caching=server.caching,
    )  # fmt: skip
    jobs: list[Job] = []
    compat.patch_worker()
    with engine(model, checkpoint, dict(server.echokv), **options) as llm:
        shadow = Shadow(EchoKVImpl.do_kv_cache_update)
        monkeypatch.setattr(
            EchoKVImpl, "do_kv_cache_update", lambda impl, *args: shadow.update(impl, *args)
        )
        preemptions: list[str] = []
        scheduler = scheduler_of(llm)
        preempt = scheduler._preempt_request
        monkeypatch.setattr(
            scheduler, "_preempt_request",
            lambda *a, **k: (preemptions.append(a[0].request_id), preempt(*a, **k)),
        )  # fmt: skip
        for seed in seeds:
            print(f"seed {seed} of {server}: replay with fuzz(..., range({seed}, {seed + 1}), ...)")
            jobs += run_traffic(llm, seed, num_requests)
        counters = residual_manager(llm).counters
    monkeypatch.undo()
    num_ties = check_against_stock(model, jobs)
    print(
        f"{len(jobs)} requests, {sum(job.aborted for job in jobs)} aborted, "
        f"{shadow.num_steps} steps, {shadow.num_accepted} accepted token reads, "
        f"{shadow.num_stale} stale entries rejected, "
        f"{len(preemptions)} preemptions, {num_ties} ties, {counters}, {shadow.kinds}"
    )
    # Without these events the run would prove nothing.
    assert shadow.num_accepted > 0 and shadow.num_stale > 0
    assert set(shadow.kinds) == set(StepKind)
    assert counters.pages_dropped > 0 and counters.window_pages_dropped > 0
    assert counters.admitted_full > 0 and counters.admitted_compressed > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_random_traffic_reads_no_foreign_page_and_keeps_pinned_requests_exact(
    name: str,
    model_of: Callable[..., Path],
    checkpoint_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(num_layers=2)
    checkpoint = checkpoint_of(model, SERVERS[name].plan, recent_tokens=32)
    fuzz(SERVERS[name], model, checkpoint, monkeypatch, range(2), 36)


@pytest.mark.nightly
@pytest.mark.parametrize("name", SERVERS)
def test_much_random_traffic(
    name: str,
    model_of: Callable[..., Path],
    checkpoint_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(num_layers=2)
    checkpoint = checkpoint_of(model, SERVERS[name].plan, recent_tokens=32)
    fuzz(SERVERS[name], model, checkpoint, monkeypatch, range(100, 107), 100)
