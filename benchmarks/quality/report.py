"""The comparison as Markdown."""

from __future__ import annotations

from typing import Any

_DIVERGENCE_HEAD = (
    "| cache | ratio | ratio at d = 128 | bytes/token | top-1 agreement | KL | perplexity |\n"
    "|---|---|---|---|---|---|---|"
)


def markdown(report: dict[str, Any]) -> str:
    """All tables of a report."""
    lines = ["# Quality against bytes", ""]
    if report["rows"]:
        first = report["rows"][0]
        full = first["perplexity_full"]
        lines += [
            f"Full cache: {first['full_bytes_per_token']:,} bytes per token in 16 bits, perplexity "
            f"{full['value']:.3f} [{full['low']:.3f}, {full['high']:.3f}]. Ratio: bytes of a token "
            "outside the window over those. Brackets hold 95 % intervals over sequences. KL in "
            f"nats, over {first['num_tokens']:,} predictions.",
            "",
        ]
    for table in dict.fromkeys(row["table"] for row in report["rows"]):
        lines += [f"## {table}", "", _DIVERGENCE_HEAD]
        lines += [_divergence_line(row) for row in report["rows"] if row["table"] == table]
        lines.append("")
    if report["tasks"]:
        lines += _task_lines(report)
    if report["missing"]:
        lines += ["Not measured:", ""]
        lines += [f"- {name}: {reason}" for name, reason in report["missing"].items()]
        lines.append("")
    lines += [f"- {name}: {value}" for name, value in report["settings"].items()]
    lines += [f"- {name}: {value}" for name, value in report["versions"].items()]
    lines += [f"- {name}: {report[name]}" for name in ("git_commit", "date", "seconds", "command")
              if name in report]  # fmt: skip
    for earlier in report.get("extends", []):
        lines += [
            f"- rows of an earlier run: {earlier['date']}, {earlier['git_commit']}, tokens per "
            f"training {earlier['settings']['tokens per training']}, `{earlier['command']}`"
        ]
    return "\n".join(lines) + "\n"


def _divergence_line(row: dict[str, Any]) -> str:
    columns = (
        row["name"],
        f"{row['ratio']:.3f}",
        f"{row['ratio_d128']:.3f}",
        f"{row['bytes_per_token']:,.0f}",
        _interval(row["top1_agreement"], 100, 2, " %"),
        _interval(row["kl"], 1, 5),
        _interval(row["perplexity"], 1, 3)
        + f", {100 * row['perplexity_increase']['value']:+.2f} %",
    )
    return "| " + " | ".join(columns) + " |"


def _task_lines(report: dict[str, Any]) -> list[str]:
    tasks = report["tasks"]
    ratios = {row["name"]: f"{row['ratio']:.3f}" for row in report["rows"]}
    lengths = tasks["settings"]["lengths"]
    lines = [
        "## RULER's tasks",
        "",
        f"Mean over {len(tasks['settings']['tasks'])} tasks and the lengths {lengths}, "
        f"{tasks['settings']['prompts of each']} prompts of each; essay haystack: "
        f"{tasks['settings']['essay haystack']}; exact prefill, compressed decoding. Difference: "
        "prompt by prompt.",
        "",
        "| cache | ratio | mean | difference to full | of full | "
        + " | ".join(f"mean at {length}" for length in lengths)
        + " |",
        "|---" * (5 + len(lengths)) + "|",
    ]
    for name, row in tasks["rows"].items():
        by_length = []
        for length in lengths:
            scores = [value for key, value in row["tasks"].items() if key.endswith(f" {length}")]
            by_length.append(f"{100 * sum(scores) / len(scores):.1f}")
        columns = (
            name,
            ratios.get(name, "1.000"),
            _interval(row["mean"], 100, 2),
            _interval(row["difference"], 100, 2),
            "–" if row["share_of_full"] is None else f"{100 * row['share_of_full']:.1f} %",
            *by_length,
        )
        lines.append("| " + " | ".join(columns) + " |")
    return [*lines, ""]


def _interval(estimate: dict[str, float], factor: float, digits: int, unit: str = "") -> str:
    value, low, high = (
        f"{factor * estimate[part]:.{digits}f}" for part in ("value", "low", "high")
    )
    return f"{value}{unit} [{low}, {high}]"
