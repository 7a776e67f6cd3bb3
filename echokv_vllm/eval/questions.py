"""Everything a model is asked in one evaluation: RULER, the needle heat map, LongBench."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from echokv_vllm.eval import report as reports
from echokv_vllm.eval.heatmap import MEASURE, Cell, Grid, even_lengths, heatmap_data
from echokv_vllm.eval.longbench import load_longbench, longbench_prompts, resolve_longbench
from echokv_vllm.eval.options import EvalOptions
from echokv_vllm.eval.scores import Backend, score_groups
from echokv_vllm.eval.tasks import (
    QA_LOADERS,
    QA_TASKS,
    Material,
    TaskPrompt,
    make_prompts,
    no_data_reason,
)
from echokv_vllm.eval.tasks.haystack import load_essays

RowHead = Callable[[int, str], dict[str, Any]]
"""Head of a report row from the length and the mode measured."""

Scores = dict[str, list[float]]
"""Mode to the scores of one group of prompts."""


@dataclass
class Answered:
    """Parts of the report that come from answers."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    heatmap: dict[str, Any] | None = None


@dataclass(frozen=True)
class Questions:
    """Prompts of one evaluation.

    Attributes:
        tasks: By length, then by task.
        grid: Cells of the heat map, if there is one.
        cells: Its prompts.
        longbench: By task.
        longbench_length: Tokens that a LongBench prompt and its answer may have.
    """

    tasks: dict[int, dict[str, list[TaskPrompt]]]
    grid: Grid | None
    cells: dict[Cell, list[TaskPrompt]]
    longbench: dict[str, list[TaskPrompt]]
    longbench_length: int

    def __bool__(self) -> bool:
        return bool(self.tasks or self.cells or self.longbench)

    def answer(self, backend: Backend, row_head: RowHead, seed: int) -> Answered:
        """Let `backend` answer and score it all."""
        made = Answered()
        scored = {length: score_groups(backend, asked) for length, asked in self.tasks.items()}
        for length, scores in scored.items():
            made.rows += _task_rows(scores, row_head, length, seed)
        if len(scored) > 1:
            groups = [group for scores in scored.values() for group in scores.values()]
            name = f"mean of {len(groups)} tasks and lengths"
            made.rows.append(_mean_row(name, groups, row_head, max(scored), seed))
        if self.grid is not None:
            cells = score_groups(backend, self.cells)
            lengths = range(len(self.grid.lengths))
            # A cell has too few prompts to be resampled by itself.
            groups = [
                _pool([scores for (row, _), scores in cells.items() if row == index])
                for index in lengths
            ]
            longest = max(self.grid.lengths)
            made.rows.append(_mean_row(MEASURE, groups, row_head, longest, seed))
            made.heatmap = heatmap_data(self.grid, cells, made.rows[-1]["plan"])
        if self.longbench:
            scores = score_groups(backend, self.longbench)
            made.rows += _task_rows(scores, row_head, self.longbench_length, seed, "LongBench ")
        return made


def make_questions(
    options: EvalOptions, tasks: Sequence[str], tokenizer: Any, context_len: int
) -> tuple[Questions, Material]:
    """All prompts, before any model is loaded: what does not fit must show at once.

    Raises:
        ValueError: If data is missing or a length has no room for its task.
    """
    material = _material(options, tasks, tokenizer)
    by_length = {
        length: {
            task: make_prompts(task, options.samples, length, material, options.seed)
            for task in tasks
        }
        for length in (options.task_lengths if tasks else ())
    }
    grid, cells = None, {}
    if options.heatmap:
        lengths = options.heatmap_lengths or even_lengths(context_len)
        grid = Grid(tuple(sorted(lengths)), options.heatmap_depths, options.heatmap_samples)
        cells = grid.prompts(material, options.seed)
    longbench = {}
    longbench_length = options.longbench_length or context_len
    if options.longbench is not None:
        for task in resolve_longbench(options.longbench_tasks):
            examples = load_longbench(options.longbench, task)[: options.longbench_samples]
            longbench[task] = longbench_prompts(
                task, examples, tokenizer, longbench_length, options.chat_template
            )
    return Questions(by_length, grid, cells, longbench, longbench_length), material


def available_qa(options: EvalOptions) -> tuple[str, ...]:
    """QA tasks whose data is named."""
    return tuple(task for task in QA_TASKS if getattr(options, QA_LOADERS[task][0]) is not None)


def skipped_tasks(options: EvalOptions) -> dict[str, str]:
    """Tasks of `ruler` that are left out, with the reason."""
    if "ruler" not in options.tasks:
        return {}
    there = available_qa(options)
    return {task: no_data_reason(task) for task in QA_TASKS if task not in there}


def _material(options: EvalOptions, tasks: Sequence[str], tokenizer: Any) -> Material:
    def count_tokens(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    data = {}
    for task in tasks:
        if task in QA_TASKS:
            option, load = QA_LOADERS[task]
            data[task] = load(getattr(options, option))
    essays = None if options.essays is None else load_essays(options.essays)
    return Material(count_tokens, essays, data)


def _task_rows(
    scores: dict[str, Scores], row_head: RowHead, length: int, seed: int, prefix: str = ""
) -> Iterator[dict[str, Any]]:
    """One row per task, and their mean."""
    for task, task_scores in scores.items():
        yield _row(prefix + task, task_scores, row_head, length, seed)
    if len(scores) > 1:
        name = f"{prefix}mean of {len(scores)} tasks"
        yield _mean_row(name, list(scores.values()), row_head, length, seed)


def _row(measure: str, scores: Scores, row_head: RowHead, length: int, seed: int) -> dict[str, Any]:
    mode = _measured(scores)
    full = scores["full"] if len(scores) > 1 else None
    return reports.task_row(row_head(length, mode), measure, scores[mode], full, seed)


def _mean_row(
    measure: str, groups: Sequence[Scores], row_head: RowHead, length: int, seed: int
) -> dict[str, Any]:
    mode = _measured(groups[0])
    full = [scores["full"] for scores in groups] if len(groups[0]) > 1 else None
    mine = [scores[mode] for scores in groups]
    return reports.mean_row(row_head(length, mode), measure, mine, full, seed)


def _measured(scores: Scores) -> str:
    """The mode a row is about: the last one, beside the full cache."""
    return list(scores)[-1]


def _pool(groups: Sequence[Scores]) -> Scores:
    return {mode: [score for scores in groups for score in scores[mode]] for mode in groups[0]}
