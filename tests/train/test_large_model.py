"""`benchmarks/training/large_model.py` on a small shape: it runs the command and reads its bars."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "training" / "large_model.py"


def run(tmp_path, *options):
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 200, encoding="utf-8")
    command = [
        sys.executable, str(SCRIPT), str(tmp_path / "out.json"), "--tiny", "--vocab-size", "260",
        "--data", str(text), "--sequence-len", "64", "--num-tokens", "6000",
        "--recent-tokens", "16", *options,
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_phases_of_a_training(tmp_path):
    ended = run(
        tmp_path, "--plan", "auto", "--ratio", "0.5", "--stage2", "kl", "--stage2-steps", "2"
    )
    assert ended.returncode == 0, ended.stderr
    answer = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    steps = {phase["phase"]: phase["steps"] for phase in answer["phases"]}
    assert steps["plan: heads"] == 2 and steps["stage II, kl"] == 2 and steps["fit"] > 1
    assert sum(phase["seconds"] for phase in answer["phases"]) <= answer["seconds"] + 1
    assert answer["options"][-1] == "2"


def test_a_failed_training_leaves_no_answer(tmp_path):
    ended = run(tmp_path, "--ratio", "2")
    assert ended.returncode == 2 and "ratio=2.0" in ended.stderr
    assert not (tmp_path / "out.json").exists()
