"""`benchmarks/engine`: mistakes on its command lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "engine"


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("compare", ["--out", "x", "--scenarios", "decode:1x8,foo"], "scenario 'foo' must be KIND"),
        ("compare", ["--out", "x", "--configs", "stok"], "unknown configuration 'stok'"),
        ("run_one", ["--steps", "1"], "--steps 1 has no percentiles; measure at least 2"),
        ("run_one", ["--repeats", "0"], "--repeats 0 measures nothing"),
    ],
)
def test_mistakes_are_found_before_the_work(script: str, arguments: list[str], words: str) -> None:
    if script == "run_one":
        arguments = ["--model", "m", "--backend", "b", "--scenario", "decode:1x8", *arguments]
    command = [sys.executable, str(FOLDER / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]
