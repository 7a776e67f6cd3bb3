"""Random traffic that a small KV pool cannot hold exactly, for `gpu_engine.py`."""

from __future__ import annotations

from typing import Any

TRAFFIC: dict[str, Any] = {
    "seeds": [0, 1, 2],
    "num_requests": 60,
    "options": {
        "num_gpu_blocks_override": 60, "max_num_batched_tokens": 96, "max_model_len": 320,
    },
    "echokv": {"admit_full_below": 1.0},
}  # fmt: skip


def check(answer: dict[str, Any]) -> None:
    """Nothing was lost, and no rank read a page that belongs to others."""
    print(answer)
    assert answer["lost"] == 0 and answer["free"]
    assert answer["pages_dropped"] > 0 and answer["admitted_compressed"] > 0
    for rank in answer["ranks"]:
        assert rank["foreign"] == 0
        # Without these events the run would prove nothing.
        assert rank["accepted"] > 0 and rank["stale"] > 0
