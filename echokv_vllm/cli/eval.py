"""`echokv eval`: what a checkpoint costs in quality against the full cache."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from typing import Any

from echokv_vllm.eval.options import DTYPES, ENDPOINT_MODES, EvalOptions


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "eval",
        help="measure what a checkpoint costs in quality against the full cache",
        description="Compares a model with compressed context to the same model with the full "
        "cache: next-token divergence on held-out text (--data), long-context tasks (--tasks), or "
        "both. Prints one table with 95 %% intervals.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder or repo id")
    _add_subject(parser)
    _add_measures(parser)
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
        help="EchoKV checkpoint folder or repo id; without it only the full cache is measured",
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
        help="tasks to answer; ruler = the eleven synthetic tasks of RULER",
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
    return tuple(int(word) for word in _words(text))


def run(arguments: argparse.Namespace) -> None:
    """Evaluate as asked, print the table and write the report."""
    options = EvalOptions(**{f.name: getattr(arguments, f.name) for f in fields(EvalOptions)})
    from echokv_vllm.eval import evaluate

    report = evaluate(options, command=shlex.join(["echokv", *sys.argv[1:]]))
    from echokv_vllm.eval.report import markdown, write

    print(markdown(report), end="")
    if arguments.out:
        json_file, markdown_file = write(report, arguments.out)
        print(f"report written to {json_file} and {markdown_file}")
