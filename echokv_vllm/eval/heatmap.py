"""Needle in a haystack over lengths and depths: where in the context does retrieval fail?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echokv_vllm.eval.tasks import Material, TaskPrompt, make_niah_prompt

TASK = "niah_single_2"
"""One number in essays, the classic needle test."""
MEASURE = "needle heat map"
PICTURE_FILE = "heatmap.png"

Cell = tuple[int, int]
"""Index of a length and of a depth."""


@dataclass(frozen=True)
class Grid:
    """Cells of a heat map.

    Attributes:
        lengths: Tokens of prompt and answer together, ascending.
        num_depths: Places of the needle, evenly from the start of the hay to its end.
        samples: Prompts per cell.
    """

    lengths: tuple[int, ...]
    num_depths: int
    samples: int

    @property
    def depths(self) -> tuple[float, ...]:
        """0 = start of the hay, 1 = its end."""
        return tuple(index / (self.num_depths - 1) for index in range(self.num_depths))

    def prompts(self, material: Material, seed: int) -> dict[Cell, list[TaskPrompt]]:
        """Seeded prompts of every cell; the cells of a column share their hay and needle.

        Raises:
            TaskError: If a length is too short.
        """
        return {
            (row, column): [
                make_niah_prompt(
                    TASK, random.Random(f"heatmap-{length}-{seed}-{index}"), length, material, depth
                )
                for index in range(self.samples)
            ]
            for row, length in enumerate(self.lengths)
            for column, depth in enumerate(self.depths)
        }

    def matrices(self, scores: dict[Cell, dict[str, list[float]]]) -> dict[str, list[list[float]]]:
        """Mean score by mode, [lengths][depths]."""
        modes = next(iter(scores.values()))
        return {
            mode: [
                [_mean(scores[row, column][mode]) for column in range(self.num_depths)]
                for row in range(len(self.lengths))
            ]
            for mode in modes
        }


def even_lengths(longest: int, count: int = 8) -> tuple[int, ...]:
    """`count` lengths up to `longest`, evenly spaced, in whole multiples of 64 where they fit."""
    lengths = [longest * (index + 1) // count // 64 * 64 or 64 for index in range(count)]
    return tuple(dict.fromkeys((*lengths[:-1], longest)))


def heatmap_data(
    grid: Grid, scores: dict[Cell, dict[str, list[float]]], title: str
) -> dict[str, Any]:
    """Part `heatmap` of a report."""
    return {
        "task": TASK,
        "title": title,
        "lengths": list(grid.lengths),
        "depths": list(grid.depths),
        "samples": grid.samples,
        "scores": grid.matrices(scores),
    }


def heatmap_markdown(heatmap: dict[str, Any]) -> list[str]:
    """Lines of one table per mode."""
    lines = []
    for mode, matrix in heatmap["scores"].items():
        mean = _mean([value for row in matrix for value in row])
        lines += [
            "",
            f"## Needle heat map, {mode}: mean {100 * mean:.2f} %",
            "",
            f"{heatmap['title']}; {heatmap['samples']} prompts of {heatmap['task']} per cell, in "
            "per cent. Depth 0 is the start of the haystack.",
            "",
            "| length \\ depth | " + " | ".join(f"{d:.2f}" for d in heatmap["depths"]) + " |",
            "|---|" + "---|" * len(heatmap["depths"]),
        ]
        for length, row in zip(heatmap["lengths"], matrix, strict=True):
            lines.append(f"| {length} | " + " | ".join(f"{100 * v:.0f}" for v in row) + " |")
    return lines


def check_matplotlib() -> None:
    """Fail before the work, not after it.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the picture of the heat map needs the package matplotlib; install it (pip install "
            "matplotlib), or leave --heatmap-png out: the table and the JSON file hold all scores"
        ) from error


def draw(heatmap: dict[str, Any], path: Path) -> None:
    """Write the picture, one panel per mode.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = heatmap["scores"]
    lengths, depths = heatmap["lengths"], heatmap["depths"]
    # Figure and canvas by hand: pyplot would choose a display and keep global state.
    figure = Figure(figsize=(1.2 + 4.6 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (mode, matrix) in zip(axes, panels.items(), strict=True):
        columns = [list(column) for column in zip(*matrix, strict=True)]  # depth down, length right
        image = axis.imshow(columns, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axis.set_xlabel("length (tokens)")
        axis.set_ylabel("depth of the needle")
        mean = _mean([value for row in matrix for value in row])
        axis.set_title(f"{mode}: {100 * mean:.1f} %")
    figure.colorbar(image, ax=list(axes), label="score")
    figure.suptitle(heatmap["title"])
    figure.savefig(path, dpi=150)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
