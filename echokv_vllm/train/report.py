"""What is recorded beside the maps: provenance and the table of errors."""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echokv_vllm import __version__
from echokv_vllm.plan import EchoPlan
from echokv_vllm.train.data import TokenData
from echokv_vllm.train.options import Descent, LayerErrors, TrainOptions

if TYPE_CHECKING:
    from echokv_vllm.train.stages import Trained


def git_commit() -> str | None:
    """Commit of this source tree, with `-dirty` when it was changed since.

    None when the package is installed rather than checked out, or git is not there.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # An installed package may lie inside some other repository; that commit says nothing.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def stage_name(options: TrainOptions, descents: tuple[Descent, ...]) -> str:
    """What was done, as a checkpoint records it."""
    names = ["I, closed form"] if options.stage1 == "closed-form" else []
    stages = ("II",) if names else ("I", "II")
    names += [
        f"{stage}, {descent.loss}, {descent.steps} steps"
        for stage, descent in zip(stages, descents, strict=False)
    ]
    return "; ".join(names)


def provenance(
    options: TrainOptions,
    command: str | None,
    data: TokenData,
    max_position: int,
    trained: Trained,
) -> dict[str, Any]:
    """JSON-able record of a run: request, versions, data, losses and errors."""
    import torch
    import transformers

    return {
        "command": command,
        "options": asdict(options),
        "stage": stage_name(options, trained.descents),
        "max_position": max_position,
        "versions": {
            "echokv_vllm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "git_commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data": {
            "source": data.source,
            "file_sha256": data.file_sha256,
            "tokens_sha256": data.tokens_sha256,
            "num_tokens": data.sequences.numel(),
        },
        "ridges": {str(layer): list(pair) for layer, pair in trained.ridges.items()},
        "descents": [asdict(descent) for descent in trained.descents],
        "errors": {str(layer): asdict(found) for layer, found in trained.errors.items()},
    }


def report_text(
    plan: EchoPlan,
    options: TrainOptions,
    max_position: int,
    trained: Trained,
    num_fit_tokens: int,
    num_heldout_tokens: int,
) -> str:
    """The Markdown report of a run: errors of every layer, then what gradient descent did."""
    errors = trained.errors
    block = {0: "absolute", 1: "un-rotated keys"}.get(
        options.rotation_block, f"blocks of {options.rotation_block} tokens"
    )
    rows = [
        "# Reconstruction errors",
        "",
        f"Plan {plan.name} ({plan.ratio:.3f} of the bytes kept, {plan.read_ratio:.3f} read by "
        f"compressed decode); key space: {block}; positions in [0, {max_position}).",
        f"Stages: {stage_name(options, trained.descents)}.",
        f"Fitted on {num_fit_tokens} tokens, measured on {num_heldout_tokens} held-out tokens.",
        "Relative squared error: sum of squared differences over sum of squares; `fit` is that of "
        "stage I.",
        "",
        "| layer | retained | sources | K held out | V held out | K fit | V fit |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer, found in errors.items():
        rows.append(
            f"| {layer} | {len(plan.layers[layer].retained)} of {plan.num_kv_heads} "
            f"| {len(plan.source_heads(layer))} | {_columns(found)} |"
        )
    count = len(errors)
    mean = LayerErrors(
        key=sum(e.key for e in errors.values()) / count,
        value=sum(e.value for e in errors.values()) / count,
        key_fit=sum(e.key_fit for e in errors.values()) / count,
        value_fit=sum(e.value_fit for e in errors.values()) / count,
    )
    rows.append(f"| mean | | | {_columns(mean)} |")
    for descent in trained.descents:
        rows += ["", *_descent_rows(descent)]
    return "\n".join(rows) + "\n"


def _descent_rows(descent: Descent) -> list[str]:
    """Held-out loss of every group before and after, with the step whose maps were kept."""
    rows = [
        f"# Held-out loss: {descent.loss}, {descent.steps} steps",
        "",
        "| maps | before | after | kept from step |",
        "|---|---|---|---|",
    ]
    for group, before in descent.initial.items():
        after, step = descent.final[group], descent.best_step[group]
        rows.append(f"| {group} | {before:.5f} | {after:.5f} | {step} |")
    if len(descent.initial) > 1:
        rows.append(f"| mean | {descent.mean_initial:.5f} | {descent.mean_final:.5f} | |")
    return rows


def _columns(errors: LayerErrors) -> str:
    values = (errors.key, errors.value, errors.key_fit, errors.value_fit)
    return " | ".join(f"{value:.4f}" for value in values)
