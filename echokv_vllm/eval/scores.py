"""Scores of groups of prompts, whichever back end answers them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, TypeVar

from echokv_vllm.eval.tasks import TaskPrompt

Key = TypeVar("Key", bound=Hashable)


class Backend(Protocol):
    """Answers prompts with one cache or several."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of the caches, the full one first if there are several."""

    def complete(self, prompts: Sequence[TaskPrompt]) -> dict[str, list[str]]:
        """Completions in the order of the prompts, by mode."""


def score_groups(
    backend: Backend, groups: Mapping[Key, Sequence[TaskPrompt]]
) -> dict[Key, dict[str, list[float]]]:
    """Answer all groups in one call, so that the offline back end decodes them side by side.

    Returns:
        Group to mode to scores, 0 to 1, in the order of its prompts.
    """
    answers = backend.complete([prompt for prompts in groups.values() for prompt in prompts])
    scores: dict[Key, dict[str, list[float]]] = {}
    first = 0
    for key, prompts in groups.items():
        stop = first + len(prompts)
        scores[key] = {
            mode: [p.score(text) for p, text in zip(prompts, texts[first:stop], strict=True)]
            for mode, texts in answers.items()
        }
        first = stop
    return scores
