"""`echokv train`: fit the maps of an echo plan to a model."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from typing import Any

from echokv_vllm.plan import PRESETS
from echokv_vllm.train.options import DTYPES, TrainOptions

_EPILOG = "plans:\n" + "\n".join(f"  {name:<10} {text}" for name, text in PRESETS.items())


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    defaults = {field.name: field.default for field in fields(TrainOptions)}
    parser = subparsers.add_parser(
        "train",
        help="fit the maps of an echo plan to a model and write a checkpoint",
        description="Fit the maps of an echo plan to a model by least squares; write a checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder or repo id")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE_OR_DATASET",
        help="calibration text: a .txt, .txt.xz (documents separated by U+001E) or .jsonl "
        '(field "text") file, or a dataset NAME[:CONFIG[:SPLIT]]',
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the checkpoint")

    def option(flag: str, text: str, **settings: Any) -> None:
        default = defaults[flag.removeprefix("--").replace("-", "_")]
        if isinstance(default, bool):
            settings.setdefault("action", "store_true")
        else:
            shown = "the model's context" if default is None else default
            text = f"{text} (default: {shown})"
            settings.setdefault("default", default)
        parser.add_argument(flag, help=text, **settings)

    option("--plan", "preset or JSON file", metavar="PRESET_OR_JSON_FILE")
    option(
        "--rotation-block",
        "rebuild keys rotated by position mod this; 1 = un-rotated, 0 = absolute",
        type=int,
        metavar="TOKENS",
    )
    option("--ridge", "ridge relative to the mean squared feature", type=float)
    option("--bias", "fit a constant per rebuilt number as well")
    option("--sequence-len", "length of a sequence", type=int, metavar="TOKENS")
    option("--batch-size", "sequences per forward pass", type=int, metavar="SEQUENCES")
    option("--num-tokens", "use at most so many tokens of the data", type=int, metavar="TOKENS")
    option(
        "--max-position",
        "spread positions over [0, this)",
        type=int,
        default=None,
        metavar="TOKENS",
    )
    option("--recent-tokens", "recent tokens the server keeps exact", type=int, metavar="TOKENS")
    option("--shards", "tensor-parallel ranks the plan must divide into", type=int, metavar="N")
    option("--device", "auto, cpu, cuda or cuda:N")
    option("--dtype", "of the model; auto = float32 on the CPU", choices=DTYPES)
    option("--seed", "seed of the position offsets", type=int)
    option("--overwrite", "replace a checkpoint that is already in DIR")
    parser.add_argument(
        "--quiet", dest="progress", action="store_false", help="no progress bar, no table"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train as asked and print the errors."""
    options = TrainOptions(**{f.name: getattr(arguments, f.name) for f in fields(TrainOptions)})
    from echokv_vllm.train import train

    result = train(options, command=shlex.join(["echokv", *sys.argv[1:]]))
    if options.progress:
        print(result.report)
    print(
        f"checkpoint written to {result.folder} "
        f"(mean relative error: K {result.mean_key_error:.4f}, V {result.mean_value_error:.4f})"
    )
