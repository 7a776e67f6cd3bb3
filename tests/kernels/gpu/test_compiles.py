"""The decode kernels compile for a GPU and fit it, seen without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "support" / "compile_kernels.py"
SHARED_BYTES = 227 * 1024  # that a program may have on Hopper
CASES = [
    ("local-0.5", 64, 8, 4, 128),
    ("local-0.25", 256, 8, 4, 128),
    ("paper-0.3", 64, 8, 4, 128),
    ("paper-0.5", 1, 8, 4, 128),
    ("local-0.5", 0, 4, 4, 256),
    ("local-0.5", 64, 2, 16, 64),
]
NAMES = ("preset", "rotation_block", "num_kv_heads", "group", "head_dim")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles_and_fits(case: tuple[str | int, ...], tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([dict(zip(NAMES, case, strict=True))]))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (needs,) = json.loads(done.stdout.splitlines()[-1])["cases"].values()
    decode = {name for name in needs if name.endswith("_decode_kernel")}
    assert len(decode) == 1 and "combine_kernel" in needs
    assert ("absorb_kernel" in needs) == (case[1] != 1)
    too_big = {name: size for name, size in needs.items() if size > SHARED_BYTES}
    assert not too_big, f"shared memory beyond {SHARED_BYTES} bytes: {too_big}"
