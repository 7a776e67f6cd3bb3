"""The demo's result as text and JSON."""

from __future__ import annotations

import dataclasses
import json

from echokv_vllm.demo.scenario import DemoResult


def render(result: DemoResult) -> str:
    """A short plain-text table."""
    modes: list[tuple[str, ...]] = [("mode", "correct answers", "KV bytes per token")]
    modes += [
        (m.mode, f"{m.num_correct}/{m.num_prompts}", f"{m.kv_bytes_per_token:,}")
        for m in result.modes
    ]
    bursts: list[tuple[str, ...]] = [
        ("burst", "completed", "peak running", "preemptions", "pages dropped", "seconds")
    ]
    bursts += [
        (
            b.server,
            str(b.num_completed),
            str(b.peak_running),
            str(b.num_preemptions),
            str(b.num_pages_dropped),
            f"{b.seconds:.1f}",
        )
        for b in result.bursts
    ]
    return "\n".join(
        [
            f"plan {result.plan}, ratio {result.ratio:.3f}, KV pool {result.pool_bytes:,} bytes",
            "",
            *_columns(modes),
            "",
            *_columns(bursts),
        ]
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def to_json(result: DemoResult) -> str:
    """Everything measured, for scripts."""
    return json.dumps(dataclasses.asdict(result), indent=2)
