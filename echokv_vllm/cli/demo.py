"""`echokv demo`: serve the tiny model and show what each mode costs."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_model"


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="serve a tiny model with EchoKV and print what each mode costs",
        description="Starts `vllm serve` with EchoKV on a tiny model, asks needle questions in "
        "full and compressed mode, sends a burst that exceeds the KV pool, and repeats the burst "
        "on stock vLLM with a pool of the same size.",
    )
    parser.add_argument("--model", default=None, metavar="DIR", help=f"model (default: {EXAMPLE})")
    parser.add_argument("--checkpoint", default=None, metavar="DIR", help="its EchoKV checkpoint")
    parser.add_argument("--prompts", type=int, default=24, help="needle questions per mode")
    parser.add_argument("--burst", type=int, default=18, help="concurrent requests of the burst")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the figures there too")
    parser.add_argument("--logs", default=None, metavar="DIR", help="folder for the server logs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo and print its table.

    Raises:
        FileNotFoundError: No example model beside the package and none named.
    """
    from echokv_vllm.demo.scenario import DemoOptions, run_demo
    from echokv_vllm.demo.table import render, to_json

    model = Path(arguments.model or EXAMPLE)
    checkpoint = Path(arguments.checkpoint or model / "echokv-local-0.5")
    for path in (model, checkpoint):
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path} is not a folder. The demo needs the repository's examples/tiny_model, or "
                "--model and --checkpoint (written by `echokv train`)."
            )
    logs = Path(arguments.logs or tempfile.mkdtemp(prefix="echokv-demo-"))
    logs.mkdir(parents=True, exist_ok=True)
    options = DemoOptions(
        str(model), str(checkpoint), logs, num_prompts=arguments.prompts, burst=arguments.burst
    )
    result = run_demo(options, lambda line: print(f"[demo] {line}", flush=True))
    print()
    print(render(result))
    if arguments.json:
        Path(arguments.json).write_text(to_json(result) + "\n", encoding="utf-8")
