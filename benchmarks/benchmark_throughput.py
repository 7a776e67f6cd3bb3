"""Offline throughput of stock vLLM and EchoKV in one run, measured by `vllm bench throughput`.

    python benchmarks/benchmark_throughput.py MODEL --checkpoint DIR [--mode auto] -- BENCH OPTIONS

Everything after `--` goes to both runs unchanged, for example `--random-input-len 8000
--random-output-len 500 --num-prompts 64 --num-warmups 8 --gpu-memory-utilization 0.5`. (vLLM 0.32
ignores its own `--input-len` and `--output-len`.) The table's last column is the ratio to stock.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def bench(model: str, options: list[str], output: Path) -> dict[str, float]:
    """One `vllm bench throughput` in a process of its own; its JSON result."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "throughput",
        "--model", model, "--output-json", str(output), *options,
    ]  # fmt: skip
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True)
    return dict(json.loads(output.read_text(encoding="utf-8")))


def split_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first ``--``."""
    if "--" not in arguments:
        return arguments, []
    end = arguments.index("--")
    return arguments[:end], arguments[end + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--checkpoint", required=True, help="EchoKV checkpoint of the model")
    parser.add_argument("--mode", default="auto", choices=("auto", "full", "compressed"))
    parser.add_argument("--json", type=Path, help="write both results there")
    # argparse gives a list of positionals nothing that follows an option, so `--` is split here.
    own, bench_options = split_options(sys.argv[1:])
    args = parser.parse_args(own)
    settings = {"echokv": {"checkpoint": args.checkpoint, "mode": args.mode}}
    echokv = ["--attention-backend", "echokv", "--additional-config", json.dumps(settings)]
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "stock": bench(args.model, bench_options, Path(folder) / "stock.json"),
            f"echokv {args.mode}": bench(
                args.model, [*bench_options, *echokv], Path(folder) / "echokv.json"
            ),
        }
    stock = results["stock"]["tokens_per_second"]
    print(f"\n{'run':<18} {'requests/s':>11} {'tokens/s':>11} {'of stock':>9}")
    for name, result in results.items():
        tokens_per_second = result["tokens_per_second"]
        print(
            f"{name:<18} {result['requests_per_second']:>11.3f} {tokens_per_second:>11.1f} "
            f"{tokens_per_second / stock:>8.2f}x"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
