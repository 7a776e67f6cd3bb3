"""`echokv eval`: what a checkpoint costs in quality against the full cache."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from echokv_vllm.eval.options import (
    DTYPES,
    ENDPOINT_MODES,
    KV_CACHE_DTYPES,
    RESIDUAL_BITS,
    EvalOptions,
)


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "eval",
        help="measure what a checkpoint costs in quality against the full cache",
        description="Compares a model with compressed context to the same model with the full "
        "cache: next-token divergence on held-out text (--data), long-context tasks (--tasks), a "
        "needle heat map (--heatmap), LongBench (--longbench). Prints one table with "
        "95 % intervals.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder or repo id")
    _add_subject(parser)
    _add_measures(parser)
    _add_heatmap(parser)
    _add_longbench(parser)
    _add_endpoint(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto = float32")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", metavar="DIR", help="write eval.json and eval.md there")
    parser.add_argument("--quiet", dest="progress", action="store_false", help="no progress bars")
    parser.set_defaults(run=run)


def _add_subject(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="EchoKV checkpoint folder or repo id; without it the full cache is measured",
    )
    parser.add_argument(
        "--recent-tokens",
        type=int,
        metavar="TOKENS",
        help="recent tokens that stay exact (default: the checkpoint's)",
    )
    parser.add_argument(
        "--sink-tokens",
        type=int,
        default=4,
        metavar="TOKENS",
        help="first tokens that stay exact (default: 4; a server keeps its whole first page)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=KV_CACHE_DTYPES,
        help="simulate a cache of this format under the checkpoint, or in full without one "
        "(default: auto, not quantised)",
    )
    parser.add_argument(
        "--residual-bits",
        type=int,
        default=0,
        choices=RESIDUAL_BITS,
        help="simulate a coded copy of what the reconstruction gets wrong (default: 0, none)",
    )
    parser.add_argument(
        "--offset-max",
        type=int,
        default=0,
        metavar="TOKENS",
        help="shift the positions of a sample by a random offset up to this (default: 0)",
    )
    parser.add_argument(
        "--every-query",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compress the context of every query, prompts included (default: yes for the "
        "divergence, no for tasks)",
    )


def _add_measures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="FILE_OR_DATASET",
        help="held-out text for the divergence, in the forms `echokv train --data` takes",
    )
    parser.add_argument(
        "--tasks",
        default=(),
        type=_words,
        metavar="NAME,NAME",
        help="tasks to answer; ruler = RULER's eleven synthetic tasks, and its QA tasks where "
        "their data is named",
    )
    parser.add_argument(
        "--task-lengths",
        default=(1024,),
        type=_numbers,
        metavar="TOKENS,TOKENS",
        help="tokens of prompt and answer (default: 1024)",
    )
    parser.add_argument(
        "--essays",
        metavar="FILE",
        help="text for the essay haystacks (default: generated sentences)",
    )
    parser.add_argument(
        "--squad", metavar="FILE_OR_DATASET", help="data of qa_1: dev-v2.0.json, rajpurkar/squad_v2"
    )
    parser.add_argument(
        "--hotpotqa",
        metavar="FILE_OR_DATASET",
        help="data of qa_2: hotpot_dev_distractor_v1.json, hotpotqa/hotpot_qa:distractor",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=32,
        help="sequences, and prompts per task and length (default: 32)",
    )
    parser.add_argument(
        "--length", type=int, default=768, metavar="TOKENS", help="of a sequence (default: 768)"
    )
    parser.add_argument(
        "--skip-tokens",
        type=int,
        metavar="TOKENS",
        help="score predictions from this position on (default: 256 or half of the length)",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="sequences at once (default: 4)")


def _add_heatmap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--heatmap", action="store_true", help="score one needle over context lengths and depths"
    )
    parser.add_argument(
        "--heatmap-lengths",
        default=(),
        type=_numbers,
        metavar="TOKENS,TOKENS",
        help="default: eight, evenly up to the model's context",
    )
    parser.add_argument(
        "--heatmap-depths", type=int, default=11, metavar="N", help="places (default: 11)"
    )
    parser.add_argument(
        "--heatmap-samples", type=int, default=5, metavar="N", help="prompts per cell (default: 5)"
    )
    parser.add_argument(
        "--heatmap-png",
        action="store_true",
        help="also draw it, as heatmap.png in --out; needs matplotlib",
    )


def _add_longbench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--longbench",
        metavar="SOURCE",
        help="answer LongBench v1 from a folder, data.zip or a hub dataset (zai-org/LongBench)",
    )
    parser.add_argument(
        "--longbench-tasks",
        default=(),
        type=_words,
        metavar="NAME,NAME",
        help="default: the sixteen English and code tasks",
    )
    parser.add_argument(
        "--longbench-length",
        type=int,
        metavar="TOKENS",
        help="prompt and answer; a longer prompt loses its middle (default: the model's context)",
    )
    parser.add_argument(
        "--longbench-samples", type=int, metavar="N", help="first examples only (default: all)"
    )
    parser.add_argument(
        "--no-chat-template",
        dest="chat_template",
        action="store_false",
        help="never wrap a LongBench prompt in the tokenizer's chat template",
    )


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="let this OpenAI-compatible server answer the tasks, e.g. http://localhost:8000/v1",
    )
    parser.add_argument(
        "--endpoint-mode",
        default="compressed",
        choices=ENDPOINT_MODES,
        help="mode to compare with full (default: compressed); as-is sends no mode",
    )
    parser.add_argument(
        "--served-model", metavar="NAME", help="its name there (default: the first one listed)"
    )
    parser.add_argument("--concurrency", type=int, default=4, help="requests at once (default: 4)")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError as error:
        # argparse would name this function, not what is allowed.
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma list of whole numbers, such as 1024,2048"
        ) from error


def run(arguments: argparse.Namespace) -> None:
    """Evaluate as asked, print the table and write the report."""
    if arguments.heatmap_png and not arguments.out:
        raise ValueError("--heatmap-png writes a file; name a folder for it (--out DIR)")
    if arguments.out and Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        # Hours later the report would be lost.
        raise ValueError(f"--out {arguments.out} is a file; name a folder for the report")
    options = EvalOptions(**{f.name: getattr(arguments, f.name) for f in fields(EvalOptions)})
    from echokv_vllm.eval import evaluate

    report = evaluate(options, command=shlex.join(["echokv", *sys.argv[1:]]))
    from echokv_vllm.eval.report import markdown, write

    print(markdown(report), end="")
    if arguments.out:
        files = write(report, arguments.out)
        print(f"report written to {', '.join(map(str, files))}")
