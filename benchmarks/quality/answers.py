"""RULER's tasks for several caches side by side, and their means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from bench import Bench, Cache
from evicting_backend import EvictingBackend
from eviction import EvictingCache

from echokv_vllm.eval.interval import bootstrap, mean_estimate
from echokv_vllm.eval.offline import FULL, OfflineBackend
from echokv_vllm.eval.tasks import RULER_TASKS, Material, TaskPrompt, make_prompts
from echokv_vllm.eval.tasks.haystack import load_essays

_GROUP_SIZE = 3


def measure_tasks(
    bench: Bench,
    caches: Mapping[str, Cache],
    essays: str | None,
    lengths: Sequence[int],
    num_samples: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Scores of every cache, with an exact prefill and compressed decoding.

    Caches are asked a few at a time, and what there is by then is yielded.

    Args:
        bench: The model.
        caches: By row name; rebuilders, and evicting caches.
        essays: Text file of the essay haystack.
        lengths: Tokens of prompt and answer together.
        num_samples: Prompts per task and length.
        seed: Of the prompts, offsets and intervals.

    Yields:
        `settings`, and `rows`: row name (and `full`) to its mean with interval, the difference to
        the full cache prompt by prompt, and the mean of every task and length.
    """

    def count_tokens(text: str) -> int:
        return len(bench.tokenizer(text, verbose=False)["input_ids"])

    material = Material(count_tokens, None if essays is None else load_essays(essays))
    prompts = [
        prompt
        for length in lengths
        for task in RULER_TASKS
        for prompt in make_prompts(task, num_samples, length, material, seed)
    ]
    evicting = {name: cache for name, cache in caches.items() if isinstance(cache, EvictingCache)}
    rebuilders = {name: cache for name, cache in caches.items() if name not in evicting}
    settings: dict[str, Any] = dict(offset_max=int(bench.offsets.max()), seed=seed)
    arguments = bench.model, bench.tokenizer
    answers: dict[str, list[str]] = {}
    for make, group in [
        *((OfflineBackend, names) for names in _groups(rebuilders)),
        *((EvictingBackend, names) for names in _groups(evicting)),
    ]:
        members = {name: caches[name] for name in group}
        backend = make(*arguments, members, bench.window, **settings)
        modes = group if FULL in answers else [FULL, *group]
        answers |= backend.complete(prompts, modes)
        yield _result(prompts, answers, lengths, num_samples, material, seed)


def _groups(names: Iterable[str]) -> list[list[str]]:
    """A prefill is shared within a group."""
    ordered = list(names)
    return [ordered[start : start + _GROUP_SIZE] for start in range(0, len(ordered), _GROUP_SIZE)]


def _result(
    prompts: Sequence[TaskPrompt],
    answers: Mapping[str, Sequence[str]],
    lengths: Sequence[int],
    num_samples: int,
    material: Material,
    seed: int,
) -> dict[str, Any]:
    scores = {
        name: torch.tensor(
            [prompt.score(text) for prompt, text in zip(prompts, texts, strict=True)],
            dtype=torch.float64,
        ).view(-1, num_samples)
        for name, texts in answers.items()
    }
    columns = [f"{task} {length}" for length in lengths for task in RULER_TASKS]
    return {
        "settings": {
            "tasks": list(RULER_TASKS), "lengths": list(lengths), "prompts of each": num_samples,
            "essay haystack": material.haystack_name,
        },
        "rows": {
            name: _summary(score, scores[FULL], columns, seed) for name, score in scores.items()
        },
    }  # fmt: skip


def _summary(
    scores: torch.Tensor, full: torch.Tensor, columns: list[str], seed: int
) -> dict[str, Any]:
    """Of [tasks and lengths, samples]; the samples of every task are drawn again together."""

    def mean(columns: torch.Tensor) -> torch.Tensor:
        return columns.mean(1)

    difference = scores - full
    return {
        "mean": asdict(bootstrap(scores.T, mean, seed)),
        "difference": asdict(mean_estimate(difference.mean(0), seed)),
        "share_of_full": (scores.mean() / full.mean()).item() if full.any() else None,
        "tasks": dict(zip(columns, scores.mean(1).tolist(), strict=True)),
    }
