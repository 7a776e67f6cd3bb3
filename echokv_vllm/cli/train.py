"""`echokv train`: fit the maps of an echo plan to a model."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from echokv_vllm.presets import PRESETS
from echokv_vllm.train.options import (
    CACHE_DTYPES,
    DTYPES,
    RESIDUAL_BITS,
    SEARCHED_PLAN,
    STAGES_ONE,
    STAGES_TWO,
    TrainOptions,
)

_PLANS = {
    **PRESETS,
    SEARCHED_PLAN: "searched for --ratio: retains the heads that the predictions depend on most",
}
_EPILOG = "plans:\n" + "\n".join(f"  {name:<10} {text}" for name, text in _PLANS.items())


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    defaults = {field.name: field.default for field in fields(TrainOptions)}
    parser = subparsers.add_parser(
        "train",
        help="fit the maps of an echo plan to a model and write a checkpoint",
        description="Fit the maps of an echo plan to a model, by least squares and then on the "
        "model's own output; write a checkpoint.",
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
            action = argparse.BooleanOptionalAction if default else "store_true"
            settings.setdefault("action", action)
            settings.setdefault("default", default)
        else:
            shown = settings.pop("absent", "none") if default is None else default
            text = f"{text} (default: {shown})"
            settings.setdefault("default", default)
        also = settings.pop("also", None)
        parser.add_argument(flag, *([also] if also else []), help=text, **settings)

    _add_plan(option)
    _add_stages(option)
    _add_data(option)
    _add_run(option)
    parser.add_argument(
        "--quiet", dest="progress", action="store_false", help="no progress bar, no table"
    )
    parser.set_defaults(run=run)


_Option = Callable[..., None]


def _add_plan(option: _Option) -> None:
    option(
        "--plan",
        "auto: search which heads to retain; or a preset, or a JSON file",
        metavar="PLAN",
    )
    option("--ratio", "auto: share of the cache's bytes that stays", type=float, absent="0.5")
    option(
        "--uniform",
        "auto: every layer retains equally many heads, which decodes fastest",
        action=argparse.BooleanOptionalAction,
        absent="yes",
    )
    option(
        "--neighbours",
        "auto: also look for source heads in so many earlier layers",
        type=int,
        metavar="N",
    )
    option(
        "--max-sources",
        "auto with --neighbours: source heads of a layer at most, which decode reads",
        type=int,
        metavar="HEADS",
        absent="as many as KV heads",
    )
    option(
        "--rotation-block",
        "rebuild keys rotated by position mod this; 1 = un-rotated, 0 = absolute",
        type=int,
        metavar="TOKENS",
    )
    option(
        "--shards",
        "tensor-parallel ranks the plan must divide into",
        also="--tp",
        type=int,
        metavar="N",
    )
    option("--recent-tokens", "recent tokens the server keeps exact", type=int, metavar="TOKENS")
    option("--sink-tokens", "first tokens that stay exact in stage II", type=int, metavar="TOKENS")
    option("--kv-cache-dtype", "cache format the maps are to work on", choices=CACHE_DTYPES)
    option(
        "--residual-bits",
        "bits of the coded residual the maps are to work with",
        type=int,
        choices=RESIDUAL_BITS,
    )


def _add_stages(option: _Option) -> None:
    option("--stage1", "how stage I fits rebuilt to true heads", choices=STAGES_ONE)
    option("--stage1-steps", "steps of --stage1 sgd", type=int, metavar="STEPS")
    option(
        "--ridge",
        "ridge relative to the mean squared feature",
        type=float,
        absent="chosen on held-out tokens",
    )
    option("--bias", "fit a constant per rebuilt number as well")
    option(
        "--stage2",
        "what stage II descends on; auto = kl on CUDA, none on a CPU, where it takes long",
        choices=STAGES_TWO,
    )
    option("--stage2-steps", "steps of stage II", type=int, metavar="STEPS")
    option("--learning-rate", "highest learning rate of both stages", type=float)
    option("--step-size", "sequences per training step", type=int, metavar="SEQUENCES")
    option("--whiten", "descend in coordinates in which the features are uncorrelated")
    option("--num-queries", "queries per sequence for o-mse and qk-kl", type=int)
    option("--checkpoint-activations", "kl: recompute model layers to save memory")


def _add_data(option: _Option) -> None:
    option("--sequence-len", "length of a sequence", type=int, metavar="TOKENS")
    option("--batch-size", "sequences per forward pass", type=int, metavar="SEQUENCES")
    option("--num-tokens", "use at most so many tokens of the data", type=int, metavar="TOKENS")
    option(
        "--max-position",
        "spread positions over [0, this)",
        type=int,
        absent="the model's context",
        metavar="TOKENS",
    )


def _add_run(option: _Option) -> None:
    option("--device", "auto, cpu, cuda or cuda:N")
    option("--dtype", "of the model; auto = float32 on the CPU", choices=DTYPES)
    option("--seed", "seed of everything random", type=int)
    option("--overwrite", "replace a checkpoint that is already in DIR")
    option("--resume", "continue an interrupted run with the same --out")
    option("--save-every", "steps between two saves of the training state", type=int)
    option("--curves", "write the losses there while the run goes on", metavar="CSV_FILE")
    option("--tensorboard", "write TensorBoard event files there", metavar="DIR")


def run(arguments: argparse.Namespace) -> None:
    """Train as asked and print the errors."""
    options = TrainOptions(**{f.name: getattr(arguments, f.name) for f in fields(TrainOptions)})
    from echokv_vllm.train import train
    from echokv_vllm.train.model import resolve_device
    from echokv_vllm.train.run import resolve_stage2

    # Here and not in `train`: programs that train many plans share options among them.
    options.check_used(resolve_stage2(options, resolve_device(options.device)))
    result = train(options, command=shlex.join(["echokv", *sys.argv[1:]]))
    if options.progress:
        print(result.report)
    print(
        f"checkpoint written to {result.folder} "
        f"(mean relative error: K {result.mean_key_error:.4f}, V {result.mean_value_error:.4f})"
    )
