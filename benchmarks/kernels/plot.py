"""Draws decode time against context: python benchmarks/kernels/plot.py RESULTS.json OUT.png"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_REQS = 8  # the number of requests measured at many contexts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("image", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for stock in results["stock"]:
        if stock["num_reqs"] == NUM_REQS:
            curves["stock, all heads"].append((stock["context_len"], stock["us"]["median"]))
    for case in results["cases"]:
        if case["num_reqs"] == NUM_REQS:
            name = f"{case['preset']}, rotation block {case['rotation_block']}"
            curves[name].append((case["context_len"], case["us_with_exact_pages"]["median"]))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in curves.items():
        if len(points) > 1:
            lengths, times = zip(*sorted(points), strict=True)
            style = "k-o" if name.startswith("stock") else "-o"
            axes.plot(lengths, times, style, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(f"cached tokens of each of {NUM_REQS} requests")
    axes.set_ylabel("decode attention, us per layer")
    axes.set_title(f"{results['machine']['GPU']}, Llama-3.1-8B shape, bf16")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    args.image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.image, dpi=150)


if __name__ == "__main__":
    main()
