"""Engines on a GPU, each in a process of its own.

A module lists its engines in `jobs()` and marks each test with the names of those it looks at,
`@pytest.mark.engines("stock", "full-{plan}")`; the test's parameters fill in the braces. Only what
the selected tests need is started, all of it at once. `MODEL` changes the shape of the model.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_checkpoint, write_model

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "gpu_engine.py"
# Starting an engine keeps a few cores busy.
NUM_PROCESSES = max(7, (os.cpu_count() or 1) // 4)
# Far above what any takes: ranks that wait for each other would never end.
JOB_SECONDS = 600
MAX_TOKENS = 48
# What vLLM says of kernels that requests had to wait for.
COMPILED = re.compile(r"JIT compilation during inference: (\w+)")
LENGTHS = (1, 2, 5, 17, 64, 100, 200, 333, 500, 47, 48, 49, 700, 900)


def prompts() -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(255) for _ in range(length)] for length in LENGTHS]


def needed_jobs(items: list[pytest.Item], path: Path) -> set[str]:
    """Names in the `engines` marks of a module's selected tests, but for those to be skipped."""
    names = set()
    for item in items:
        skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
        if item.path == path and not skipped:
            call = getattr(item, "callspec", None)
            parameters = call.params if call else {}
            for mark in item.iter_markers("engines"):
                names |= {name.format(**parameters) for name in mark.args}
    return names


@pytest.fixture(scope="module")
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """``run(name)`` is the answer of a job. All run at once, a few processes at a time.

    A job's plan names a preset, or one and the shards it divides into: ``local-0.5/2``; None is
    stock vLLM. The answer is that of ``gpu_engine.py``, and ``compiled``: names of the kernels
    that were compiled while it served.
    """
    folder = tmp_path_factory.mktemp("gpu")
    jobs = request.module.jobs()
    needed = needed_jobs(request.session.items, request.path)
    shape = {"num_layers": 4, "hidden_size": 512, "head_dim": 64}
    model = write_model(folder / "m", **(shape | getattr(request.module, "MODEL", {})))
    checkpoints = {}
    for plan in sorted({jobs[name]["plan"] for name in needed} - {None}):
        preset, _, shards = plan.partition("/")
        checkpoints[plan] = str(
            write_checkpoint(
                folder / plan.replace("/", "-"), model, preset,
                shards=int(shards or 1), recent_tokens=32,
            )
        )  # fmt: skip
    defaults: dict[str, Any] = {
        "model": str(model), "runner": "v2", "options": {}, "prompts": prompts(),
        "modes": [None] * len(LENGTHS), "max_tokens": MAX_TOKENS,
    }  # fmt: skip

    def execute(name: str) -> dict[str, Any] | str:
        path = folder / f"{name}.json"
        job = defaults | jobs[name] | {"checkpoint": checkpoints.get(jobs[name]["plan"])}
        path.write_text(json.dumps(job))
        log = path.with_suffix(".log")
        command = [sys.executable, str(SCRIPT), str(path)]
        try:
            with log.open("w") as out:
                subprocess.run(command, stdout=out, stderr=out, timeout=JOB_SECONDS, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return f"{error}\n{log.read_text()[-8000:]}"
        answer: dict[str, Any] = json.loads(Path(f"{path}.out").read_text())
        said = log.read_text()
        assert "Kernel JIT monitor activated" in said
        answer["compiled"] = sorted(set(COMPILED.findall(said)))
        return answer

    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        started = {name: pool.submit(execute, name) for name in sorted(needed)}
    answers = {name: job.result() for name, job in started.items()}

    def answer_of(name: str) -> dict[str, Any]:
        answer = answers[name]
        if isinstance(answer, str):
            pytest.fail(f"{name} ended with an error:\n{answer}")
        return answer

    return answer_of
