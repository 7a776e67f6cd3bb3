"""What is recorded beside the maps: provenance and the table of errors."""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from echokv_vllm import __version__
from echokv_vllm.plan import EchoPlan
from echokv_vllm.train.data import TokenData
from echokv_vllm.train.options import LayerErrors, TrainOptions


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


def provenance(
    options: TrainOptions,
    command: str | None,
    data: TokenData,
    max_position: int,
    errors: dict[int, LayerErrors],
) -> dict[str, Any]:
    """JSON-able record of a run: request, versions, data and errors."""
    import torch
    import transformers

    return {
        "command": command,
        "options": asdict(options),
        "stage": "I, closed form",
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
        "errors": {str(layer): asdict(layer_errors) for layer, layer_errors in errors.items()},
    }


def error_table(
    plan: EchoPlan,
    options: TrainOptions,
    max_position: int,
    errors: dict[int, LayerErrors],
    num_fit_tokens: int,
    num_heldout_tokens: int,
) -> str:
    """Markdown table of every layer's errors, with their means."""
    block = {0: "absolute", 1: "un-rotated keys"}.get(
        options.rotation_block, f"blocks of {options.rotation_block} tokens"
    )
    rows = [
        "# Reconstruction errors",
        "",
        f"Plan {plan.name} ({plan.ratio:.3f} of the bytes); key space: {block}; "
        f"positions in [0, {max_position}).",
        f"Fitted on {num_fit_tokens} tokens, measured on {num_heldout_tokens} held-out tokens.",
        "Relative squared error: sum of squared differences over sum of squares.",
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
    return "\n".join(rows) + "\n"


def _columns(errors: LayerErrors) -> str:
    values = (errors.key, errors.value, errors.key_fit, errors.value_fit)
    return " | ".join(f"{value:.4f}" for value in values)
