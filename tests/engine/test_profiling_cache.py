"""vLLM measures the memory of graphs with a cache that it frees before it allocates the real one.

Held by EchoKV, its pages would be missing in the real one's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "rebound_cache.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", ["local-0.5", pytest.param("paper-0.5", marks=pytest.mark.nightly)]
)
def test_first_cache_is_free_when_the_second_is_allocated(
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
                "options": {
                    "max_model_len": 256, "max_num_batched_tokens": 96, "max_num_seqs": 4,
                    "enable_prefix_caching": False, "num_gpu_blocks_override": 64,
                },
                "prompts": [prompt_of(length) for length in (130, 60)],
                "modes": ["compressed", "full"],
                "max_tokens": 3,
            }
        )
    )  # fmt: skip
    done = subprocess.run([sys.executable, str(SCRIPT), str(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, was_free = json.loads(Path(f"{job}.out").read_text())
    assert first == second
    assert was_free, "something holds the first cache"
