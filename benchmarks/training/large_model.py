"""How long `echokv train` takes on a model of 8 billion weights, and how much memory.

    python benchmarks/training/large_model.py OUT.json --data TEXT --plan auto --ratio 0.5 --uniform

writes a Llama-3.1-8B folder with random weights and runs the command on it; options that are not
its own go to `echokv train`. Time and memory depend on shapes alone; the maps are of no use.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from models import LLAMA_8B, TINY, write_model

from echokv_vllm.cli.main import main as echokv

# A finished bar of tqdm: its title, number of steps and duration.
_BAR = re.compile(r"([^\r\n]+?): 100%[^\r\n]*?\| (\d+)/\d+ \[(?:(\d+):)?(\d+):(\d+)<")


class _Tee(io.TextIOBase):
    """What a command writes to stderr, kept as well."""

    def __init__(self) -> None:
        self.text = ""
        self._stderr = sys.stderr

    def write(self, text: str) -> int:
        self.text += text
        return self._stderr.write(text)

    def flush(self) -> None:
        self._stderr.flush()


def write_weights(folder: Path, device: torch.device) -> None:
    """Adds random bfloat16 weights to a folder of `write_model`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def phases(stderr: str) -> list[dict[str, Any]]:
    """Finished progress bars: title, steps, seconds in all."""
    found: dict[str, dict[str, Any]] = {}
    for title, steps, hours, minutes, seconds in _BAR.findall(stderr):
        duration = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
        # The last line of a bar is the one that counts.
        phase = title.strip()
        found[phase] = {"phase": phase, "steps": int(steps), "seconds": duration}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT.json", type=Path)
    parser.add_argument("--data", required=True, help="calibration text, as for echokv train")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script")
    parser.add_argument("--vocab-size", type=int, default=128_256)
    args, options = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "model", TINY if args.tiny else LLAMA_8B, args.vocab_size)
        write_weights(model, device)
        tee, begin = _Tee(), time.time()
        command = [
            "train", str(model), "--data", args.data, "--out", f"{name}/checkpoint", *options,
        ]  # fmt: skip
        with contextlib.redirect_stderr(tee):
            code = echokv(command)
        seconds = time.time() - begin
        if code:
            raise SystemExit(code)
    answer = {
        "GPU": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "commit": os.environ.get("ECHOKV_COMMIT", "unknown"),
        "torch": torch.__version__,
        "shape": TINY if args.tiny else LLAMA_8B,
        "vocab_size": args.vocab_size,
        "options": options,
        "seconds": round(seconds, 1),
        "peak_gigabytes": (
            round(torch.cuda.max_memory_allocated() / 1e9, 1) if device.type == "cuda" else None
        ),
        "phases": phases(tee.text),
    }
    args.out.write_text(json.dumps(answer, indent=1), encoding="utf-8")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
