"""Real vLLM engines inside the test process, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read when vLLM is imported or an engine starts: the engine must live in this process so that
# tests can look into scheduler and worker, and nothing may leave the machine.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def engine(
    model: Path,
    checkpoint: Path | None = None,
    echokv: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """A running ``vllm.LLM``; with ``checkpoint``, on the echokv backend.

    Args:
        model: Model folder.
        checkpoint: EchoKV checkpoint folder; None runs stock vLLM.
        echokv: Further echokv options.
        options: Engine arguments; defaults suit tiny models in float32.
    """
    from vllm import LLM

    values: dict[str, Any] = dict(
        dtype="float32", enforce_eager=True, max_model_len=1024, max_num_batched_tokens=256,
        max_num_seqs=16, disable_log_stats=True,
    )  # fmt: skip
    values.update(options)
    if checkpoint is not None:
        values["attention_backend"] = "echokv"
        values["additional_config"] = {"echokv": {"checkpoint": str(checkpoint), **(echokv or {})}}
    llm = LLM(str(model), **values)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm


def generate(
    llm: Any, prompts: list[list[int]], modes: list[str | None] | str | None = None,
    max_tokens: int = 48, **sampling: Any,
) -> list[Any]:  # fmt: skip
    """Greedy completions of token-id prompts, vLLM's RequestOutput objects in order."""
    from vllm import SamplingParams

    if not isinstance(modes, list):
        modes = [modes] * len(prompts)
    params = [
        SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=1,
            extra_args=None if mode is None else {"echokv": mode}, **sampling,
        )
        for mode in modes
    ]  # fmt: skip
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return list(llm.generate(inputs, params, use_tqdm=False))


def tokens(outputs: list[Any]) -> list[list[int]]:
    """The generated token ids of each output."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler_of(llm: Any) -> Any:
    """The engine's scheduler object."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def residual_manager(llm: Any) -> Any:
    """The D manager of an engine on the echokv backend."""
    from echokv_vllm.scheduler.link import find_link

    return find_link(scheduler_of(llm).kv_cache_manager.block_pool).residual
