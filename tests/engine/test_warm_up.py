"""What a server launches is compiled before its first request, also by steps outside of graphs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "interpreted_launches.py"
# Planned with every step's metadata, and so with the metadata that graphs are captured with.
PLANNING = {"_stamp_kernel", "_rows_kernel", "_shares_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", ["local-0.5", pytest.param("local-0.25", marks=pytest.mark.nightly)]
)
def test_serving_launches_what_the_warm_up_did(
    plan: str, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompt_of: Callable[..., list[int]], tmp_path: Path,
) -> None:  # fmt: skip
    model = model_of(num_layers=2)
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps(
            {
                "model": str(model),
                "checkpoint": str(checkpoint_of(model, plan, recent_tokens=16)),
                "echokv": {},
                "options": {"max_model_len": 256, "max_num_batched_tokens": 96, "max_num_seqs": 3},
                # Alone, with others, with a full one, and beside prompt chunks.
                "prompts": [prompt_of(length) for length in (60, 40, 130, 90)],
                "modes": ["compressed", "compressed", "full", "compressed"],
                "max_tokens": 4,
            }
        )
    )
    done = subprocess.run([sys.executable, str(SCRIPT), str(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = json.loads(Path(f"{job}.launches").read_text())
    warm, served = set(launches["warm"]), set(launches["served"])
    late = {variant for variant in served - warm if variant.split()[0] not in PLANNING}
    assert not late
    names = {variant.split()[0] for variant in warm}
    assert {"exact_decode_kernel", "absorb_kernel", "reduce_kernel", "combine_kernel"} <= names
    assert sum("reduce_kernel" in variant for variant in warm) > 1, "no step had few, or many"
