"""The comparison as Markdown: one row per scenario, one column per configuration.

python benchmarks/engine/table.py FOLDER/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# What a plan that keeps half of the heads is held to, on the 8B shape and one H200: kind of
# scenario, configuration, the scenario or None for all of the kind, and the ratio to stock.
BARS = (
    ("decode", "full", None, "<=", 1.02),
    ("prefill", "full", None, ">=", 0.98),
    ("decode", "compressed", "decode:32x8192", "<=", 0.80),
    ("prefill", "compressed", None, ">=", 0.90),
)


def _value(kind: str, result: dict[str, Any]) -> float:
    return float(result["step_ms"] if kind == "decode" else result["tokens_per_s"])


def _ratio(results: dict[str, Any], name: str, scenario: str) -> float | None:
    """Step time or throughput of a run as a multiple of the first stock run's."""
    values = []
    for run in (name, "stock"):
        found = results["runs"].get(run, {}).get("scenarios", {}).get(scenario)
        if found is None:
            return None
        values.append(_value(scenario.split(":")[0], found))
    return values[0] / values[1]


def _cell(results: dict[str, Any], name: str, scenario: str) -> str:
    """Median, spread and ratio, or a dash for what was not measured."""
    result = results["runs"][name]["scenarios"].get(scenario)
    if result is None:
        return "failed" if results["runs"][name]["failure"] else "-"
    if scenario.startswith("decode"):
        text = f"{result['step_ms']:.2f} [{result['p20_ms']:.2f}, {result['p80_ms']:.2f}]"
    else:
        rates = (result["tokens_per_s"], result["min_tokens_per_s"], result["max_tokens_per_s"])
        text = "{:.0f} [{:.0f}, {:.0f}]".format(*rates)
    ratio = _ratio(results, name, scenario)
    # Three digits after the point: the bars for full mode are 2 % away from stock.
    return text if ratio is None or name == "stock" else f"{text} **{ratio:.3f}x**"


def _row(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def _engine_rows(runs: dict[str, Any]) -> list[str]:
    def facts(run: dict[str, Any]) -> dict[str, str]:
        engine = run.get("engine")
        if engine is None:
            return {}
        tokens = [engine[key] for key in ("kv_tokens", "kv_tokens_compressed") if engine.get(key)]
        flash = engine["flash_attention"]
        return {
            "attention": engine["attention"] + (f" (FA{flash})" if flash else ""),
            "runner, scheduling": f"{engine['runner']}, "
            + ("async" if engine["async_scheduling"] else "sync"),
            "compile, graphs": f"{engine['compile_mode']}, {engine['cudagraph_mode']}",
            "KV tokens (full / compressed)": " / ".join(f"{count:,}" for count in tokens),
            "engine start, s": str(engine["start_s"]),
        }

    columns = [facts(run) for run in runs.values()]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    return [_row(label, [column.get(label, "-") for column in columns]) for label in labels]


def _verdicts(results: dict[str, Any], scenarios: list[str]) -> list[str]:
    """The bars that this run can judge."""
    if results["shape"] == "tiny":
        return ["Tiny shape: the figures say nothing about the bars."]
    lines = []
    for kind, config, only, relation, bar in BARS:
        for scenario in scenarios:
            if not scenario.startswith(kind) or only not in (None, scenario):
                continue
            ratio = _ratio(results, config, scenario)
            if ratio is None:
                continue
            met = ratio <= bar if relation == "<=" else ratio >= bar
            lines.append(
                f"- {config}, {scenario}: {ratio:.3f}x, bar {relation} {bar:.2f}x: "
                f"{'met' if met else 'MISSED'}"
            )
    return lines or ["No bar could be judged."]


def render(results: dict[str, Any]) -> str:
    """Markdown of what compare.py collected so far."""
    runs = results["runs"]
    scenarios = results["scenarios"]
    machine: dict[str, Any] = next(
        (run["machine"] for run in runs.values() if "machine" in run), {}
    )
    versions = ", ".join(
        f"{name} {machine.get(name)}" for name in ("driver", "torch", "triton", "vllm")
    )
    lines = [
        f"{results['shape']} shape, dummy weights, {results['plan']}, rotation block "
        f"{results['rotation_block']}, vocabulary {results['vocab_size']}; "
        f"{machine.get('gpu') or 'CPU'}, {versions}; commit {results['commit']}; "
        f"{results['date']}.",
        "Decode: ms per step, median [p20, p80]. Prefill: prompt tokens/s, median [min, max]. "
        "Bold: multiple of stock.",
        "",
        _row("", list(runs)),
        "|" + "---|" * (len(runs) + 1),
        *[_row(name, [_cell(results, run, name) for run in runs]) for name in scenarios],
        *_engine_rows(runs),
        "",
        *_verdicts(results, scenarios),
    ]
    for name, run in runs.items():
        if run["failure"]:
            lines += ["", f"{name} failed:", "", "```", run["failure"], "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
