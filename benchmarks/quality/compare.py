"""EchoKV plans against other ways to spend the same bytes: one model, one run, one report.

    python benchmarks/quality/compare.py MODEL --calibration FILE --heldout FILE --out FOLDER \
        [--only "TEXT;TEXT"] [--tasks] [--checkpoints FOLDER] [--jobs N] [--device cuda]

Rows are listed in rows.py. Checkpoints that are not in the checkpoint folder are trained first. The
report is FOLDER/quality.md and FOLDER/quality.json; it is written again after every part, so that a
run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from answers import measure_tasks
from bench import Bench, Bytes, Cache, describe, tokens_at
from report import markdown
from rows import Maps, Row, all_rows
from training import ensure

from echokv_vllm import __version__
from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.eval.attention import Window
from echokv_vllm.eval.divergence import measure_divergence
from echokv_vllm.eval.tasks import Material
from echokv_vllm.train.model import load_config, resolve_device
from echokv_vllm.train.report import git_commit

WINDOW = Window(sink_tokens=4, recent_tokens=128)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="to learn from")
    parser.add_argument("--heldout", required=True, metavar="FILE", help="to measure on")
    parser.add_argument("--essays", metavar="FILE", help="haystack of the essay tasks")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="default: in --out")
    parser.add_argument("--only", default="", metavar="TEXT;TEXT",
                        help="rows whose `table: name` holds one of these")  # fmt: skip
    parser.add_argument("--extend", type=Path, metavar="FILE",
                        help="take over the rows of an earlier quality.json with the same "
                        "sequences, and measure the others")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=128, help="sequences (default: 128)")
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--offset-max", type=int, default=131_072)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tasks", action="store_true", help="measure RULER's tasks too")
    parser.add_argument("--task-rows", default="", metavar="TEXT;TEXT",
                        help="of the rows with tasks, those whose `table: name` holds one "
                        "of these")  # fmt: skip
    parser.add_argument("--task-lengths", default="1024,2048", help="default: 1024,2048")
    parser.add_argument("--task-samples", type=int, default=100, help="per task and length")
    parser.add_argument("--num-tokens", type=int, default=500_000, help="of a training")
    parser.add_argument("--calibration-tokens", type=int, default=250_000, help="of the baselines")
    parser.add_argument("--stage2-steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--train-seconds", type=float, default=float("inf"), metavar="SECONDS",
                        help="trainings not finished by then are left out")  # fmt: skip
    parser.add_argument("--train-option", action="append", default=[], metavar="NAME=JSON",
                        help="an option of every training")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = load_config(args.model)
    every = all_rows(args.stage2_steps, config.num_hidden_layers, config.num_key_value_heads)
    rows = [row for row in every if _is_asked(row, args.only)]
    if args.list:
        print("\n".join(f"{row.table}: {row.name}" for row in rows))
        return
    device = resolve_device(args.device)
    folder = args.checkpoints or args.out / "checkpoints"
    start = time.monotonic()
    earlier = None
    if args.extend is not None:
        earlier = json.loads(args.extend.read_text(encoding="utf-8"))
        if args.tasks and earlier["tasks"]:
            _check_tasks(args, earlier["tasks"]["settings"])
    known = {entry["name"] for entry in earlier["rows"]} if earlier else set()
    asked = {
        row.name for row in rows if row.tasks and args.tasks and _is_asked(row, args.task_rows)
    }
    rows = [row for row in rows if row.name not in known or row.name in asked]
    failures = _train(args, rows, every, folder, device)
    print(f"trainings: {time.monotonic() - start:.0f} s", flush=True)
    bench = Bench(
        args.model, args.calibration, args.heldout, device, num_sequences=args.samples,
        length=args.length, offset_max=args.offset_max, window=WINDOW,
        calibration_tokens=args.calibration_tokens, seed=args.seed,
    )  # fmt: skip
    report = _head(args, bench, device)
    if earlier is not None:
        _extend(report, earlier)
    answered = report["tasks"]["rows"] if report["tasks"] else {}
    caches: dict[str, Cache] = {}
    for row in rows:
        reason = failures.get(row.maps.name) if row.maps else None
        if reason is not None:
            report["missing"][row.name] = reason
            continue
        checkpoint = EchoCheckpoint.load(folder / row.maps.name) if row.maps else None
        cache, size = bench.cache(row, checkpoint)
        caches[row.name] = cache
        if row.name in known:
            continue
        entry = _divergence(args, bench, row, cache, size)
        if checkpoint is not None:
            entry["maps"] = str(checkpoint.provenance.get("stage"))
            entry["plan"] = checkpoint.plan.to_dict()
        report["rows"].append(entry)
        print(f"  {row.name}: KL {entry['kl']['value']:.5f}", flush=True)
        _write(report, args.out)
    place = {row.name: index for index, row in enumerate(every)}
    report["rows"].sort(key=lambda entry: place[entry["name"]])
    report["seconds"] = round(time.monotonic() - start, 1)
    _write(report, args.out)
    print(f"divergence: {time.monotonic() - start:.0f} s", flush=True)
    if args.tasks:
        lengths = [int(length) for length in args.task_lengths.split(",")]
        for tasks in measure_tasks(
            bench, {name: cache for name, cache in caches.items() if name in asked},
            args.essays, lengths,
            args.task_samples, args.seed,
        ):  # fmt: skip
            report["tasks"] = {**tasks, "rows": answered | tasks["rows"]}
            report["seconds"] = round(time.monotonic() - start, 1)
            _write(report, args.out)
            print(f"tasks: {time.monotonic() - start:.0f} s", flush=True)
    print(markdown(report))


def _is_asked(row: Row, texts: str) -> bool:
    words = [word for word in texts.split(";") if word]
    return not words or any(word in f"{row.table}: {row.name}" for word in words)


def _extend(report: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Take over rows; what was measured must be the same."""
    for name in ("model", "exact tokens", "held-out text", "scored", "position offsets up to",
                 "seed"):  # fmt: skip
        now, then = report["settings"][name], earlier["settings"][name]
        if now != then:
            raise ValueError(
                f"the earlier report has {name} {then!r}, this run has {now!r}; extend a report "
                "with the same settings, or start anew"
            )
    report["rows"] = earlier["rows"]
    report["tasks"] = earlier["tasks"]
    origin = ("command", "date", "git_commit", "settings", "versions")
    report["extends"] = [
        *earlier.get("extends", []),
        {name: earlier[name] for name in origin},
    ]


def _check_tasks(args: argparse.Namespace, then: dict[str, Any]) -> None:
    """Scores stand in one table with the earlier ones: the prompts must be the same."""
    now = {
        "lengths": [int(length) for length in args.task_lengths.split(",")],
        "prompts of each": args.task_samples,
        "essay haystack": Material(len, None if args.essays is None else ("",)).haystack_name,
    }
    for name, value in now.items():
        if then[name] != value:
            raise ValueError(
                f"the tasks of the earlier report have {name} {then[name]!r}, this run has "
                f"{value!r}; extend a report with the same tasks, or leave out --tasks"
            )


def _train(
    args: argparse.Namespace,
    rows: list[Row],
    every: list[Row],
    folder: Path,
    device: torch.device,
) -> dict[str, str]:
    by_name = {maps.name: maps for row in every if (maps := row.maps)}
    wanted: dict[str, Maps] = {}
    for row in rows:
        if row.maps is None:
            continue
        if row.maps.plan_of is not None:
            wanted[row.maps.plan_of] = by_name[row.maps.plan_of]
        wanted[row.maps.name] = row.maps
    common = {
        "model": args.model, "data": args.calibration, "num_tokens": args.num_tokens,
        "max_position": max(args.offset_max, 4096), "device": str(device), "dtype": "float32",
        "batch_size": args.batch_size, "seed": args.seed,
        "recent_tokens": WINDOW.recent_tokens, "sink_tokens": WINDOW.sink_tokens,
    }  # fmt: skip
    for option in args.train_option:
        name, value = option.split("=", 1)
        common[name] = json.loads(value)
    # What is wanted of several stages shares the cheap one, so closed forms come first.
    order = sorted(wanted.values(), key=lambda maps: maps.options["stage2"] != "none")
    return ensure(order, folder, common, args.jobs, args.train_seconds)


def _head(args: argparse.Namespace, bench: Bench, device: torch.device) -> dict[str, Any]:
    return {
        "format": "echokv-quality",
        "settings": {
            # Names without folders: a report is extended on other machines.
            "model": Path(args.model).name,
            "exact tokens": f"{WINDOW.sink_tokens} sink, {WINDOW.recent_tokens} recent",
            "held-out text": f"{Path(args.heldout).name}, {args.samples} sequences of "
            f"{args.length} tokens",
            "scored": f"from token {bench.skip_tokens} on, every query compressed",
            "position offsets up to": args.offset_max,
            "calibration text": Path(args.calibration).name,
            "tokens per training": args.num_tokens,
            "tokens for the baselines": args.calibration_tokens,
            "steps of stage II": args.stage2_steps,
            "seed": args.seed,
        },
        "versions": {**describe(device), "echokv_vllm": __version__},
        "git_commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "rows": [],
        "missing": {},
        "tasks": None,
    }


def _divergence(
    args: argparse.Namespace, bench: Bench, row: Row, cache: Cache, size: Bytes
) -> dict[str, Any]:
    start = time.monotonic()
    result = measure_divergence(
        bench.model, cache, bench.sequences, bench.offsets, WINDOW, skip_tokens=bench.skip_tokens,
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip
    head_dim = bench.fingerprint.head_dim
    entry = asdict(replace(row, maps=None))
    measured = {name: value for name, value in asdict(result).items() if value is not None}
    return {
        **entry,
        **measured,
        "ratio": size.ratio(head_dim),
        "ratio_d128": size.ratio(128),
        "bytes_per_token": size.per_token(head_dim),
        "full_bytes_per_token": 2 * bench.full_size,
        "ratio_at_4096": tokens_at(size.ratio(head_dim), 4096, WINDOW),
        "seconds": round(time.monotonic() - start, 2),
    }


def _write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "quality.md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
