"""Offline throughput of stock vLLM and EchoKV in one run, measured by `vllm bench throughput`.

    python benchmarks/benchmark_throughput.py MODEL --checkpoint DIR [--modes auto,compressed]
        [--peers fp8] -- BENCH OPTIONS

Everything after `--` goes to all runs unchanged, for example `--random-input-len 8000
--random-output-len 500 --num-prompts 64 --num-warmups 8 --kv-cache-memory-bytes 16G`. (vLLM 0.32
ignores its own `--input-len` and `--output-len`. EchoKV's pages are smaller, so the same
`--num-gpu-blocks-override` is not the same memory.) Peers are stock vLLM with that KV cache dtype.
The table's ratios are to stock; counts include warm-ups. A run that fails (its output says why)
does not keep the others from being measured; the exit code is 1 then.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COUNTED_BENCH = Path(__file__).with_name("counted_bench.py")
MODES = ("auto", "full", "compressed")


def bench(model: str, options: list[str], folder: Path) -> dict[str, Any]:
    """One `vllm bench throughput` in a process of its own.

    Returns:
        Its JSON result and the counts, or `failure`.
    """
    output, counts = folder / "result.json", folder / "counts.json"
    command = [
        sys.executable, str(COUNTED_BENCH), str(counts), "throughput",
        "--model", model, "--output-json", str(output), *options,
    ]  # fmt: skip
    print("+", " ".join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code < 0:
        return {"failure": f"killed by signal {-code}"}
    if code or not output.exists():
        return {"failure": f"exit code {code}" if code else "it wrote no result"}
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return result | {"counts": json.loads(counts.read_text(encoding="utf-8"))}


def split_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first ``--``."""
    if "--" not in arguments:
        return arguments, []
    end = arguments.index("--")
    return arguments[:end], arguments[end + 1 :]


def runs(checkpoint: str, modes: list[str], peers: list[str]) -> dict[str, list[str]]:
    """Engine options of every run, by the name it has in the table; stock comes first."""
    named: dict[str, list[str]] = {"stock": []}
    for peer in peers:
        named[f"stock {peer}"] = ["--kv-cache-dtype", peer]
    for mode in modes:
        settings = {"echokv": {"checkpoint": checkpoint, "mode": mode}}
        named[f"echokv {mode}"] = [
            "--attention-backend", "echokv", "--additional-config", json.dumps(settings),
        ]  # fmt: skip
    return named


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line per run."""
    stock = results["stock"].get("tokens_per_second")
    lines = [
        f"{'run':<18} {'requests/s':>11} {'tokens/s':>11} {'of stock':>9} {'peak running':>13} "
        f"{'preemptions':>12} {'pages dropped':>14}"
    ]
    for name, result in results.items():
        if "failure" in result:
            lines.append(f"{name:<18} FAILED, {result['failure']}")
            continue
        speed, counts = result["tokens_per_second"], result["counts"]
        share = "-" if stock is None else f"{speed / stock:.2f}x"
        lines.append(
            f"{name:<18} {result['requests_per_second']:>11.3f} {speed:>11.1f} "
            f"{share:>9} {counts['running']:>13} {counts['preemptions']:>12} "
            f"{counts['pages_dropped']:>14}"
        )
    return "\n".join(lines)


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--checkpoint", required=True, help="EchoKV checkpoint of the model")
    parser.add_argument(
        "--modes", default="auto", type=lambda text: text.split(","), metavar="MODE[,MODE...]",
        help=f"EchoKV's runs: {', '.join(MODES)} (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--peers", default=[], type=lambda text: text.split(","), metavar="DTYPE[,DTYPE...]",
        help="further runs of stock vLLM with these KV cache dtypes, such as fp8",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all results there")
    args = parser.parse_args(arguments)
    if unknown := [mode for mode in args.modes if mode not in MODES]:
        parser.error(f"mode {unknown[0]!r} is none of {', '.join(MODES)}")
    return args


def main() -> int:
    # argparse gives a list of positionals nothing that follows an option, so `--` is split here.
    own, bench_options = split_options(sys.argv[1:])
    args = parse_args(own)
    results = {}
    for name, options in runs(args.checkpoint, args.modes, args.peers).items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = bench(args.model, [*bench_options, *options], Path(folder))
        if args.json:
            # After every run: what was measured survives a later failure.
            args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(results)}")
    return 1 if any("failure" in result for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
