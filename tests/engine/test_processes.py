"""Engines in processes of their own: spawned engine core, pipeline and tensor parallelism.

The registered backend is pickled into every process, every rank stamps its own pages, and a
tensor-parallel rank serves its own shard of the plan.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pressure_traffic
import pytest
from engines import engine, generate, tokens

SUPPORT = Path(__file__).parents[1] / "support"
LENGTHS = (5, 48, 130, 300)
POOL = {"num_gpu_blocks_override": 46, "max_model_len": 352, "enable_prefix_caching": False}

pytestmark = pytest.mark.slow


def in_processes(
    folder: Path, model: Path, checkpoint: Path | None, mode: str, prompts: list[list[int]],
    modes: list[str | None] | None = None, **options: Any,
) -> list[list[int]]:  # fmt: skip
    """Greedy tokens of an engine whose core and workers are separate processes."""
    job = folder / "job.json"
    job.write_text(json.dumps({
        "model": str(model), "checkpoint": checkpoint and str(checkpoint),
        "echokv": {"mode": mode}, "options": {**POOL, **options}, "prompts": prompts,
        "modes": modes, "max_tokens": 24,
    }))  # fmt: skip
    ranks = options.get("tensor_parallel_size", options.get("pipeline_parallel_size", 1))
    return answer_of("generate_tokens.py", job, ranks, timeout=600)


def answer_of(script: str, job: Path, ranks: int, timeout: float) -> Any:
    """What a script writes for a job, its engine's core and workers being separate processes."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if ranks > 1:
        # vLLM binds one worker per group of cores and cannot find the groups by itself. More ranks
        # than cores take turns.
        cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
        bound = itertools.islice(cores, ranks)
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, bound))
    done = subprocess.run(
        [sys.executable, SUPPORT / script, job],
        env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads(Path(f"{job}.out").read_text())


@pytest.fixture(scope="module")
def prompts(prompt_of: Callable[..., list[int]]) -> list[list[int]]:
    return [prompt_of(length) for length in LENGTHS]


def in_process(
    model: Path, checkpoint: Path, mode: str, prompts: list[list[int]], modes: Any = None
) -> list[list[int]]:
    """The same in this process."""
    with engine(model, checkpoint, {"mode": mode}, **POOL) as llm:
        return tokens(generate(llm, prompts, modes, max_tokens=24))


def test_a_spawned_engine_answers_like_one_in_process(
    tmp_path: Path, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompts: list[list[int]],
) -> None:  # fmt: skip
    model = model_of()
    folder = checkpoint_of(model)
    modes = ["full", "compressed", "compressed", "compressed"]
    spawned = in_processes(tmp_path, model, folder, "auto", prompts, modes)
    assert spawned == in_process(model, folder, "auto", prompts, modes)
    assert spawned != in_process(model, folder, "full", prompts, None)


@pytest.fixture
def two_cores() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks need two cores")


@pytest.mark.nightly
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("mode", ["full", "compressed"])
@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (2, 4), (4, 4)])
def test_tensor_parallel_ranks_serve_their_shards(
    mode: str, ranks: int, shards: int, tmp_path: Path, model_of: Callable[..., Path],
    checkpoint_of: Callable[..., Path], prompts: list[list[int]],
) -> None:  # fmt: skip
    model = model_of(num_kv_heads=8)
    folder = checkpoint_of(model, shards=shards)
    parts = in_processes(tmp_path, model, folder, mode, prompts, tensor_parallel_size=ranks)
    assert parts == in_process(model, folder, mode, prompts)


@pytest.mark.nightly
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("mode", ["full", "compressed"])
def test_pipeline_stages_rebuild_their_own_layers(
    mode: str, tmp_path: Path, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompts: list[list[int]],
) -> None:  # fmt: skip
    model = model_of()
    folder = checkpoint_of(model)
    # Compiled: vLLM's CPU warm-up cannot run the second stage eagerly.
    two_stages = in_processes(
        tmp_path, model, folder, mode, prompts, pipeline_parallel_size=2, enforce_eager=False
    )
    assert two_stages == in_process(model, folder, mode, prompts)


@pytest.mark.nightly
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_parallel_size": 2},
        # Compiled for the same reason as above.
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
)
def test_ranks_under_pressure_read_no_foreign_page(
    parallel: dict[str, Any], tmp_path: Path, model_of: Callable[..., Path],
    checkpoint_of: Callable[..., Path],
) -> None:  # fmt: skip
    """The interpreted GPU path: one scheduler drops pages, every rank notices by its stamps."""
    model = model_of()
    traffic = pressure_traffic.TRAFFIC
    options = {
        **traffic["options"], "dtype": "float32", "enforce_eager": True,
        "distributed_executor_backend": "mp", **parallel,
    }  # fmt: skip
    job = tmp_path / "job.json"
    job.write_text(json.dumps({
        "model": str(model), "checkpoint": str(checkpoint_of(model, shards=2, recent_tokens=16)),
        "runner": "v1", **traffic, "options": options, "seeds": [0], "num_requests": 24,
    }))  # fmt: skip
    answer = answer_of("interpreted_ranks.py", job, ranks=2, timeout=1500)
    assert len(answer["ranks"]) == 2
    pressure_traffic.check(answer)
