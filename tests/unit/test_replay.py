"""`benchmarks/engine/replay.py`: vLLM's scheduler at full size, on a burst measured on an H200."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "engine" / "replay.py"


@pytest.fixture(scope="module")
def burst(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("replay") / "results.json"
    options = ["--traffic", "burst", "--configs", "stock,auto-prompt,auto", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(path.read_text())
    return results["burst"]


@pytest.mark.slow
def test_looking_ahead_preempts_nothing_and_costs_no_time(burst: dict[str, Any]) -> None:
    prompt, ahead = burst["auto-prompt"], burst["auto"]
    assert prompt["preemptions"] > 0 and ahead["preemptions"] == 0
    assert ahead["longest_gap"] < 1 < prompt["longest_gap"]
    assert ahead["seconds"] < prompt["seconds"] < burst["stock"]["seconds"]
    assert ahead["peak_running"] > 1.5 * burst["stock"]["peak_running"]


@pytest.mark.slow
def test_the_model_of_time_is_near_what_was_measured(burst: dict[str, Any]) -> None:
    """benchmarks/results/2026-11-23-h200-3: stock 44.5 s, auto with vLLM's admission 34.8 s."""
    assert burst["stock"]["seconds"] == pytest.approx(44.5, rel=0.15)
    assert burst["auto-prompt"]["seconds"] == pytest.approx(34.8, rel=0.15)


def test_unknown_traffic_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--traffic", "storm"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "'storm' is none of burst, chat" in done.stderr
