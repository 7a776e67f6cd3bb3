"""The GPU path inside the real engine, on the CPU: interpreted kernels, FlashAttention in PyTorch.

Chunked prefill over compressed context, decoding, mixed batches, pages of two sizes, layers
without own pages: the tokens must be those of the portable path.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"
MIXED = (5, 150, 33, 200)  # the short one gives up nothing
LONG = (130, 60, 140, 200)


def run(script: str, job: dict[str, object], folder: Path) -> list[list[int]]:
    path = folder / f"{script}.json"
    path.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / script), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: list[list[int]] = json.loads(Path(f"{path}.out").read_text())
    return answer


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan, rotation_block, num_layers, modes, lengths, kinds",
    [
        ("local-0.5", 64, 2, ["compressed"] * 4, MIXED, {"MIXED"}),
        ("local-0.5", 64, 2, ["compressed"] * 4, LONG, {"COMPRESSED"}),
        ("local-0.25", 64, 2, ["compressed", "full", "compressed", "auto"], LONG, {"MIXED"}),
        pytest.param(
            "paper-0.3", 16, 5, ["compressed"] * 4, LONG, {"COMPRESSED"}, marks=pytest.mark.nightly
        ),
        ("paper-0.5", 1, 2, ["compressed"] * 4, LONG, {"COMPRESSED"}),
        ("local-0.25", 64, 2, ["full", "auto"], (33, 170), {"FULL"}),
    ],
)
def test_tokens_are_those_of_the_portable_path(
    plan: str,
    rotation_block: int,
    num_layers: int,
    modes: list[str],
    lengths: tuple[int, ...],
    kinds: set[str],
    model_of: Callable[..., Path],
    checkpoint_of: Callable[..., Path],
    prompt_of: Callable[[int], list[int]],
    tmp_path: Path,
) -> None:
    model = model_of(num_layers=num_layers)
    checkpoint = checkpoint_of(model, plan, rotation_block=rotation_block, recent_tokens=16)
    job: dict[str, object] = {
        "model": str(model),
        "checkpoint": str(checkpoint),
        "echokv": {},
        "options": {"max_model_len": 256, "max_num_batched_tokens": 96, "max_num_seqs": 4},
        "prompts": [prompt_of(length) for length in lengths],
        "modes": modes,
        "max_tokens": 3,
    }
    portable = run("generate_tokens.py", job, tmp_path)
    assert run("interpreted_engine.py", job, tmp_path) == portable
    seen = set(json.loads((tmp_path / "interpreted_engine.py.json.kinds").read_text()))
    assert kinds <= seen, f"only {seen} occurred: the test proves less than it says"
