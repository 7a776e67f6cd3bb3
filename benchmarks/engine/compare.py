"""Whole-engine speed of EchoKV against stock vLLM on a model without weights, in one run.

    python benchmarks/engine/compare.py --out FOLDER [--tiny] [--configs stock,full,...] \
        [-- OPTIONS OF run_one.py]

Every configuration is a process of its own. The table comes last, on stdout and in
FOLDER/table.md; FOLDER/results.json has everything, FOLDER/NAME.log each process's output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scenarios import Scenario
from table import render

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIGS = ("stock", "full", "auto", "compressed")
SCENARIOS = "decode:1x8192,decode:32x8192,decode:256x512,prefill:64x1024,prefill:4x16384"
TINY_SCENARIOS = "decode:1x256,decode:8x256,prefill:8x128,prefill:2x1024"
# A CPU has no graphs, and a tiny model needs neither many steps nor large ones.
TINY_OPTIONS = ["--eager", "--max-num-batched-tokens", "512", "--steps", "16"]


def parse_args() -> argparse.Namespace:
    # argparse gives a list of positionals nothing that follows an option, so `--` is split here.
    arguments, run_options = sys.argv[1:], []
    if "--" in arguments:
        end = arguments.index("--")
        arguments, run_options = arguments[:end], arguments[end + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="What follows -- goes to every run_one.py (see its --help).",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and short prompts")
    parser.add_argument(
        "--configs", default=",".join(CONFIGS),
        help=f"comma list of {', '.join(CONFIGS)}; a name may come again to see the noise",
    )  # fmt: skip
    parser.add_argument("--scenarios", help=f"comma list; default {SCENARIOS}")
    parser.add_argument("--stock-backend", default="FLASH_ATTN")
    parser.add_argument("--plan", default="local-0.5", help="preset name or plan file")
    parser.add_argument("--rotation-block", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=260, help="Llama-3.1 has 128256")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per configuration")
    parser.add_argument(
        "--deadline", type=float, default=float("inf"),
        help="seconds for the whole comparison; what does not fit is reported as failed",
    )  # fmt: skip
    parser.add_argument("--commit", default=os.environ.get("ECHOKV_COMMIT"))
    args = parser.parse_args(arguments)
    args.configs = args.configs.split(",")
    unknown = sorted(set(args.configs) - set(CONFIGS))
    if unknown:
        parser.error(f"unknown configuration {unknown[0]!r}; allowed are {', '.join(CONFIGS)}")
    default = TINY_SCENARIOS if args.tiny else SCENARIOS
    try:
        args.scenarios = [Scenario.parse(text) for text in (args.scenarios or default).split(",")]
    except ValueError as error:
        parser.error(str(error))
    args.run_options = [*(TINY_OPTIONS if args.tiny else []), *run_options]
    return args


def commit_of_checkout() -> str:
    """HEAD, marked when files differ from it; "unknown" where the repository did not travel."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return f"{head} with changes" if git("status", "--porcelain") else head


def environment(work: Path) -> dict[str, str]:
    """The children's environment, in which this checkout's two packages can be imported.

    Links in a folder of their own, because the repository's root on the path would make its folder
    `kernels` pass for the Hugging Face package of that name.
    """
    site = work / "site"
    site.mkdir()
    (site / "echokv_vllm").symlink_to(ROOT / "echokv_vllm")
    (site / "echokv_kernels").symlink_to(ROOT / "kernels" / "echokv_kernels")
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(site), *([inherited] if inherited else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def command_of(config: str, args: argparse.Namespace, work: Path, out: Path) -> list[str]:
    """The run_one.py command of a configuration."""
    command = [sys.executable, str(HERE / "run_one.py"), "--model", str(work / "bench" / "model")]
    if config == "stock":
        command += ["--backend", args.stock_backend]
    else:
        checkpoint = str(work / "bench" / "echokv")
        command += ["--backend", "echokv", "--checkpoint", checkpoint, "--mode", config]
    for scenario in args.scenarios:
        command += ["--scenario", str(scenario)]
    return [*command, "--out", str(out), *args.run_options]


def run_process(command: list[str], env: dict[str, str], log: Path, timeout: float) -> str | None:
    """Runs a command with its output in a file.

    Returns:
        None, or why it failed, ending in the last lines of the log.
    """
    reason = None
    with log.open("w", encoding="utf-8") as file:
        # A session of its own, so that a time-out ends the engine's processes too.
        process = subprocess.Popen(
            command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout)
            if code:
                reason = f"exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"ran longer than {timeout:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if reason is None:
        return None
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return "\n".join([reason, *(line[:300] for line in tail)])


def measure(
    name: str, config: str, args: argparse.Namespace, work: Path, env: dict[str, str], end: float
) -> dict[str, Any]:
    """Runs one configuration; a failed one keeps the scenarios it finished."""
    begin = time.monotonic()
    out = work / f"{name}.json"
    timeout = min(args.timeout, end - begin)
    command = command_of(config, args, work, out)
    failure: str | None = "no time was left before --deadline"
    if timeout > 0:
        failure = run_process(command, env, args.out / f"{name}.log", timeout)
    report: dict[str, Any] = {"config": config, "scenarios": {}}
    if out.exists():
        report |= json.loads(out.read_text(encoding="utf-8"))
    report |= {"command": command, "failure": failure, "wall_s": time.monotonic() - begin}
    state = "done" if failure is None else f"FAILED, {failure.splitlines()[0]}"
    print(f"{name}: {state} ({report['wall_s']:.0f} s)", flush=True)
    return report


def main() -> int:
    args = parse_args()
    end = time.monotonic() + args.deadline
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": sys.argv,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": args.commit or commit_of_checkout(),
        "shape": "tiny" if args.tiny else "Llama-3.1-8B",
        "plan": args.plan,
        "rotation_block": args.rotation_block,
        "vocab_size": args.vocab_size,
        "scenarios": [str(scenario) for scenario in args.scenarios],
        "runs": {},
    }
    with tempfile.TemporaryDirectory(prefix="echokv-engine-") as folder:
        work = Path(folder)
        env = environment(work)
        models = [
            sys.executable, str(HERE / "models.py"), str(work / "bench"), "--plan", args.plan,
            "--rotation-block", str(args.rotation_block), "--vocab-size", str(args.vocab_size),
            *(["--shape", "tiny"] if args.tiny else []),
        ]  # fmt: skip
        subprocess.run(models, env=env, check=True, stdout=subprocess.DEVNULL)
        for index, config in enumerate(args.configs):
            count = args.configs[: index + 1].count(config)
            name = config if count == 1 else f"{config}-{count}"
            results["runs"][name] = measure(name, config, args, work, env, end)
            # After every configuration: an outer time limit must not take what is there.
            text = json.dumps(results, indent=1) + "\n"
            (args.out / "results.json").write_text(text, encoding="utf-8")
            (args.out / "table.md").write_text(render(results), encoding="utf-8")
    print(f"\n{render(results)}", end="", flush=True)
    return 1 if any(run["failure"] for run in results["runs"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
