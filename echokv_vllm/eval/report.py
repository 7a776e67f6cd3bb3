"""The report of an evaluation: JSON-able data, and a Markdown table drawn from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from echokv_vllm.eval.divergence import Divergence
from echokv_vllm.eval.footprint import Footprint
from echokv_vllm.eval.heatmap import PICTURE_FILE, draw, heatmap_markdown
from echokv_vllm.eval.interval import grouped_mean, share_estimate

JSON_FILE = "eval.json"
MARKDOWN_FILE = "eval.md"


def key_space(rotation_block: int) -> str:
    """Name of the space the key maps live in."""
    return {0: "absolute", 1: "un-rotated"}.get(rotation_block, f"B = {rotation_block}")


def row_head(
    model: str, plan: str, space: str, ratio: float | None, size: Footprint | None, length: int
) -> dict[str, Any]:
    """What every row says about the cache it measured."""
    return {
        "model": model,
        "plan": plan,
        "key_space": space,
        "ratio": ratio,
        "length": length,
        "bytes_per_token": size.at_length if size else None,
        "retained_bytes_per_token": size.retained if size else None,
        "full_bytes_per_token": size.full if size else None,
        "map_bytes": size.maps if size else None,
    }


def divergence_rows(head: dict[str, Any], result: Divergence, samples: int) -> list[dict[str, Any]]:
    """Rows of the divergence; what compares has the full cache's own value beside it."""
    if result.perplexity is None:
        return [
            {**head, "measure": "perplexity", "samples": samples}
            | {"score": asdict(result.perplexity_full), "full": None}
        ]
    measures = (
        ("perplexity", result.perplexity, asdict(result.perplexity_full)),
        ("perplexity increase", result.perplexity_increase, None),
        ("top-1 agreement", result.top1_agreement, None),
        ("KL(full, echo)", result.kl, None),
    )
    return [
        {**head, "measure": name, "samples": samples, "full": full}
        | {"score": asdict(estimate) if estimate else None}
        for name, estimate, full in measures
    ]


def task_row(
    head: dict[str, Any],
    task: str,
    scores: Sequence[float],
    full_scores: Sequence[float] | None,
    seed: int,
) -> dict[str, Any]:
    """Row of one task and length; scores are shares of references found, 0 to 1."""
    mine = torch.tensor(scores, dtype=torch.float64)
    row = {
        **head,
        "measure": task,
        "samples": len(scores),
        "score": asdict(grouped_mean([mine], seed)),
        "full": None,
        "scores": list(scores),
    }
    if full_scores is not None:
        full = torch.tensor(full_scores, dtype=torch.float64)
        row["full"] = asdict(grouped_mean([full], seed))
        row["difference"] = asdict(grouped_mean([mine - full], seed, least=-1.0))
        row["full_scores"] = list(full_scores)
    return row


def mean_row(
    head: dict[str, Any],
    measure: str,
    groups: Sequence[Sequence[float]],
    full_groups: Sequence[Sequence[float]] | None,
    seed: int,
) -> dict[str, Any]:
    """Row of the mean over groups of scores (tasks, or cells of a heat map) of equal weight.

    Args:
        head: See `row_head`.
        measure: Name of the mean.
        groups: Scores of each group, 0 to 1.
        full_groups: The same prompts with the full cache.
        seed: Seed of the intervals.
    """
    mine = [torch.tensor(group, dtype=torch.float64) for group in groups]
    row = {
        **head,
        "measure": measure,
        "samples": sum(map(len, groups)),
        "score": asdict(grouped_mean(mine, seed)),
        "full": None,
    }
    if full_groups is not None:
        full = [torch.tensor(group, dtype=torch.float64) for group in full_groups]
        pairs = list(zip(mine, full, strict=True))
        row["full"] = asdict(grouped_mean(full, seed))
        row["difference"] = asdict(
            grouped_mean([score - whole for score, whole in pairs], seed, least=-1.0)
        )
        share = share_estimate([torch.stack(pair, 1) for pair in pairs], seed)
        if share is not None:
            row["share_of_full"] = asdict(share)
    return row


def markdown(report: dict[str, Any]) -> str:
    """Table of a report, with a line on how it was made."""
    lines = [
        "# EchoKV evaluation",
        "",
        "Brackets hold 95 % intervals. Task scores are in per cent (RULER: of reference strings "
        "found; LongBench: of its metrics). KL is in nats.",
        "",
        "| model | plan | key space | ratio | bytes/token (full) | length | measure | samples "
        "| score | full cache, same run |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_table_row(row) for row in report["rows"]),
        *(heatmap_markdown(report["heatmap"]) if report.get("heatmap") else ()),
        "",
        *(f"- skipped {task}: {reason}" for task, reason in report.get("skipped", {}).items()),
        *(f"- {name}: {value}" for name, value in report["settings"].items()),
        *(f"- {name}: {value}" for name, value in report["versions"].items()),
        f"- commit: {report['git_commit']}",
        f"- date: {report['date']}",
        f"- command: `{report['command']}`",
    ]
    return "\n".join(lines) + "\n"


def _table_row(row: dict[str, Any]) -> str:
    size = "–"
    if row["bytes_per_token"] is not None:
        size = f"{row['bytes_per_token']:,.0f} ({row['full_bytes_per_token']:,})"
    ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
    columns = (
        Path(row["model"]).name, row["plan"], row["key_space"], ratio, size, row["length"],
        row["measure"], row["samples"], _shown(row["measure"], row["score"]),
        _full_shown(row),
    )  # fmt: skip
    return "| " + " | ".join(str(column) for column in columns) + " |"


def _full_shown(row: dict[str, Any]) -> str:
    if row["full"] is None:
        return "–"
    shown = _shown(row["measure"], row["full"])
    if "share_of_full" in row:
        shown += f"; score is {_shown('share', row['share_of_full'])} of it"
    return shown


def _shown(measure: str, estimate: dict[str, float]) -> str:
    numbers = [estimate[name] for name in ("value", "low", "high")]
    if measure == "perplexity":
        value, low, high = (f"{number:.3f}" for number in numbers)
    elif measure.startswith("KL"):
        value, low, high = (f"{number:.5f}" for number in numbers)
    else:
        value, low, high = (f"{100 * number:.2f}" for number in numbers)
        value += " %"
    return f"{value} [{low}, {high}]"


def write(report: dict[str, Any], folder: str) -> tuple[Path, ...]:
    """Write the files into `folder`, which is made if need be.

    Returns:
        The JSON and the Markdown file, and the picture of the heat map if it was asked for.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    json_file, markdown_file = target / JSON_FILE, target / MARKDOWN_FILE
    json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    markdown_file.write_text(markdown(report), encoding="utf-8")
    if not report.get("options", {}).get("heatmap_png"):
        return json_file, markdown_file
    draw(report["heatmap"], target / PICTURE_FILE)
    return json_file, markdown_file, target / PICTURE_FILE
