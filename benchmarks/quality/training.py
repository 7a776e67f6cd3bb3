"""Checkpoints of the rows: loaded where they are there, else trained, several at a time."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import Maps

from echokv_vllm.checkpoint import CONFIG_FILE, EchoCheckpoint
from echokv_vllm.plan import EchoPlan

PLAN_FILE = "plan.json"


def ensure(
    wanted: Sequence[Maps],
    folder: Path,
    common: dict[str, Any],
    jobs: int,
    seconds: float,
) -> dict[str, str]:
    """Make the checkpoints that `folder` lacks.

    Args:
        wanted: Each once, in order of importance; those whose plan others use may stand anywhere.
        folder: Has one checkpoint folder per name.
        common: Options of `TrainOptions` that all of them share.
        jobs: Trainings at a time, each in a process of its own.
        seconds: Trainings that are not finished by then are left out.

    Returns:
        Name to what went wrong, for those that are not there now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [maps for maps in wanted if not (folder / maps.name / CONFIG_FILE).exists()]
    sources = {maps.plan_of for maps in missing}
    # A plan must be there before the checkpoints that use it.
    waves = (
        [maps for maps in missing if maps.name in sources],
        [maps for maps in missing if maps.name not in sources],
    )
    failures: dict[str, str] = {}
    until = time.time() + seconds
    if not missing:
        return failures
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(jobs, len(missing))) as pool:
        for wave in waves:
            results = [
                pool.apply_async(_attempt, (maps, str(folder), common, until)) for maps in wave
            ]
            for maps, result in zip(wave, results, strict=True):
                try:
                    left = None if until == float("inf") else max(0.0, until - time.time())
                    taken, failure = result.get(left)
                except multiprocessing.TimeoutError:
                    taken, failure = 0.0, "it was not finished in time"
                print(f"  {maps.name}: {failure or f'{taken:.1f} s'}", flush=True)
                if failure is not None:
                    failures[maps.name] = failure
    return failures


def _attempt(
    maps: Maps, folder: str, common: dict[str, Any], until: float
) -> tuple[float, str | None]:
    """Seconds that a training took, and what went wrong."""
    start = time.time()
    if start > until:
        return 0.0, "no time was left to begin it"
    try:
        _train(maps, Path(folder), common)
    except (ValueError, OSError, RuntimeError, TypeError) as error:
        # One plan that cannot be trained must not take the others along.
        return time.time() - start, f"{type(error).__name__}: {error}"
    return time.time() - start, None


def _train(maps: Maps, folder: Path, common: dict[str, Any]) -> None:
    from echokv_vllm.train import TrainOptions, train

    options = {**common, **maps.options}
    plan = options.get("plan")
    if maps.plan_of is not None:
        plan = EchoCheckpoint.load(folder / maps.plan_of).plan
    if isinstance(plan, EchoPlan):
        plan_file = folder / f"{maps.name}.{PLAN_FILE}"
        plan_file.write_text(json.dumps(plan.to_dict()), encoding="utf-8")
        options["plan"] = str(plan_file)
    train(TrainOptions(out=str(folder / maps.name), progress=False, **options))
