"""`benchmarks/engine/scheduling.py` runs and refuses what it does not know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "engine" / "scheduling.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--requests", "6", "--steps", "20", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_configuration_is_measured() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[-4:]]
    assert [line[0] for line in lines] == ["stock", "full", "auto", "compressed"]
    assert all(0 < float(line[1]) < 1000 and 0 < float(line[4]) < 1000 for line in lines)


def test_an_unknown_configuration_is_refused() -> None:
    done = run("--configs", "stock,fast")
    assert done.returncode == 2 and "'fast' is none of stock, full, auto" in done.stderr
