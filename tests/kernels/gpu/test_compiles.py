"""Kernels compile for a GPU and fit it, in as few variants as meant; seen without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).resolve().parents[2] / "support"
SHARED_BYTES = 227 * 1024  # that a program may have on Hopper
CASES = [
    ("local-0.5", 64, 8, 4, 128),
    ("local-0.25", 256, 8, 4, 128),
    ("paper-0.3", 64, 8, 4, 128),
    ("paper-0.5", 1, 8, 4, 128),
    ("local-0.5", 0, 4, 4, 256),
    ("local-0.5", 64, 8, 4, 256),
    ("local-0.5", 64, 2, 16, 64),
    ("local-0.5", 64, 4, 32, 128),
]
NAMES = ("preset", "rotation_block", "num_kv_heads", "group", "head_dim")


def answer_of(script: str, cache: Path, *arguments: Path) -> dict[str, Any]:
    """What a script in tests/support prints last; in a process without Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / script), *map(str, arguments)],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.slow
def test_all_steps_share_the_warm_up_variants(tmp_path: Path) -> None:
    assert answer_of("kernel_variants.py", tmp_path) == {
        "materialize_kernel": 1,
        "merge_partial_kernel": 2,  # the first part of an accumulator, and later ones
        "write_merged_kernel": 1,
        "_store_kernel": 2,  # of VARIANT_LENS: decode steps and prompt chunks
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles_and_fits(case: tuple[str | int, ...], tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([dict(zip(NAMES, case, strict=True))]))
    (needs,) = answer_of("compile_kernels.py", tmp_path, file)["cases"].values()
    decode = {name for name in needs if name.endswith("_decode_kernel")}
    assert len(decode) == 2 and "exact_decode_kernel" in decode
    assert {"reduce_kernel", "combine_kernel"} <= set(needs)
    assert ("absorb_kernel" in needs) == (case[1] != 1)
    too_big = {name: size for name, size in needs.items() if size > SHARED_BYTES}
    assert not too_big, f"shared memory beyond {SHARED_BYTES} bytes: {too_big}"
