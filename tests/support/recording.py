"""What an in-process engine did, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from engines import scheduler_of


@dataclass
class RecordedRow:
    """One request's part of one step.

    Attributes:
        request_id: vLLM's internal request id.
        context_len: Tokens cached before the step.
        token_ids: [T] int64, the chunk.
        exact: [context_len] bool, context tokens whose D page was exact.
        donor: Request whose pages this one adopted from the prefix cache, on first sight.
    """

    request_id: str
    context_len: int
    token_ids: torch.Tensor
    exact: torch.Tensor
    donor: str | None = None


@dataclass
class RecordedStep:
    """One step of the worker.

    Attributes:
        rows: Its requests, in batch order.
        logits: [tokens, vocabulary] float32 of all tokens, not only the sampled ones.
    """

    rows: list[RecordedRow]
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class StepRecorder:
    """Records every step of an engine on the echokv backend while it is attached."""

    def __init__(self, llm: Any) -> None:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        self.runner = worker.model_runner
        self.model = self.runner.model
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        self.builder = next(iter(context.values())).impl.worker.steps
        self.steps: list[RecordedStep] = []
        self._writers: dict[int, str] = {}  # R slot -> request that wrote it last
        self._seen: set[str] = set()

    @contextmanager
    def attached(self) -> Iterator[StepRecorder]:
        """Wraps the step builder and the model, and takes the wraps off again."""
        complete = self.builder.complete

        def recording_complete(common: Any) -> Any:
            step = complete(common)
            self._record(step)
            return step

        def after_forward(model: Any, args: Any, kwargs: Any, hidden: Any) -> None:
            self._record_forward(kwargs["input_ids"], hidden)

        self.builder.complete = recording_complete
        hook = self.model.register_forward_hook(after_forward, with_kwargs=True)
        try:
            yield self
        finally:
            hook.remove()
            del self.builder.complete

    def _record(self, step: Any) -> None:
        rows = []
        starts = step.query_start_loc.tolist()
        slots = step.retained_slots.tolist()
        size = self.builder.retained_block_size
        for index, request_id in enumerate(self.runner.input_batch.req_ids[: step.num_reqs]):
            context_len = int(step.context_lens[index])
            page = torch.arange(context_len) // self.builder.residual_block_size
            row = RecordedRow(
                request_id,
                context_len,
                torch.empty(starts[index + 1] - starts[index], dtype=torch.int64),
                step.exact[index][page].clone(),
            )
            if request_id not in self._seen and context_len:
                last = int(step.retained_table[index, (context_len - 1) // size])
                row.donor = self._writers[last * size + (context_len - 1) % size]
            self._seen.add(request_id)
            for slot in slots[starts[index] : starts[index + 1]]:
                self._writers[slot] = request_id
            rows.append(row)
        self.steps.append(RecordedStep(rows))

    def _record_forward(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> None:
        step = self.steps[-1]
        start = 0
        for row in step.rows:
            row.token_ids = input_ids[start : start + len(row.token_ids)].to(torch.int64).clone()
            start += len(row.token_ids)
        step.logits = self.model.compute_logits(hidden[:start]).to(torch.float32).clone()


@dataclass
class Load:
    """How full an engine was, over a run.

    Attributes:
        num_steps: Scheduler passes.
        num_preemptions: Requests preempted.
        peak_requests: Most requests running at once.
        peak_tokens: Most tokens cached at once, over the running requests.
        min_free_pages: Fewest free pages of the pool.
    """

    num_steps: int = 0
    num_preemptions: int = 0
    peak_requests: int = 0
    peak_tokens: int = 0
    min_free_pages: int = 1 << 60


@contextmanager
def watched_load(llm: Any) -> Iterator[Load]:
    """Counts what the scheduler does while requests run."""
    scheduler, load = scheduler_of(llm), Load()
    schedule = scheduler.schedule

    def counting_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        load.num_steps += 1
        load.num_preemptions += len(output.preempted_req_ids or ())
        load.peak_requests = max(load.peak_requests, len(scheduler.running))
        cached = sum(request.num_computed_tokens for request in scheduler.running)
        load.peak_tokens = max(load.peak_tokens, cached)
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        load.min_free_pages = min(load.min_free_pages, free)
        return output

    scheduler.schedule = counting_schedule
    try:
        yield load
    finally:
        del scheduler.schedule


def kv_cache_bytes(llm: Any) -> int:
    """Bytes of KV cache memory the engine's worker holds, each storage counted once."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    storages = {
        layer.kv_cache.untyped_storage().data_ptr(): layer.kv_cache.untyped_storage().nbytes()
        for layer in context.values()
    }
    return sum(storages.values())
