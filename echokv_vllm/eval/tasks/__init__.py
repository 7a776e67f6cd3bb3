"""Synthetic long-context tasks: RULER's eleven generators and the needle task of the tiny model.

Written from the description in the RULER paper (arXiv 2404.06654); the prompts keep its wording, so
that scores mean the same. Differences: no worked example in front of `vt` and `cwe`, word lists of
our own, and fewer repetitions in `cwe` where the length has no room for them.
"""

from __future__ import annotations

import random

from echokv_vllm import needle
from echokv_vllm.eval.tasks.haystack import Material
from echokv_vllm.eval.tasks.niah import NIAH_TASKS, niah_prompt
from echokv_vllm.eval.tasks.prompt import TaskError, TaskPrompt, string_match_all
from echokv_vllm.eval.tasks.tracking import tracking_prompt
from echokv_vllm.eval.tasks.words import common_words_prompt, frequent_words_prompt

__all__ = [
    "RULER_TASKS",
    "TASKS",
    "Material",
    "TaskError",
    "TaskPrompt",
    "make_prompts",
    "resolve_tasks",
    "string_match_all",
]

_OTHER_RULER = {
    "vt": (30, tracking_prompt),
    "cwe": (120, common_words_prompt),
    "fwe": (50, frequent_words_prompt),
}
_NIAH_TOKENS = 128
_NEEDLE_TOKENS = needle.MAX_VALUE_DIGITS + 5

RULER_TASKS: tuple[str, ...] = (*NIAH_TASKS, *_OTHER_RULER)
TASKS: tuple[str, ...] = (*RULER_TASKS, "needle")
"""Every task. `needle` is the retrieval task the tiny model in `examples/` has learned."""


def resolve_tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    """Task names with `ruler` spelt out, each once.

    Raises:
        TaskError: If a name is unknown.
    """
    found: list[str] = []
    for name in names:
        if name != "ruler" and name not in TASKS:
            raise TaskError(
                f"unknown task {name!r}; allowed are {', '.join(TASKS)}, and ruler for all of "
                "RULER's"
            )
        found += RULER_TASKS if name == "ruler" else (name,)
    return tuple(dict.fromkeys(found))


def make_prompts(
    task: str, num_prompts: int, length: int, material: Material, seed: int = 0
) -> list[TaskPrompt]:
    """Seeded prompts of one task.

    Args:
        task: One of `TASKS`.
        num_prompts: How many.
        length: Tokens of prompt and answer together, special tokens included; a prompt comes close
            to that and never exceeds it.
        material: Tokenizer and haystack text.
        seed: Same seed and arguments, same prompts.

    Raises:
        TaskError: If the length has no room for the task.
    """
    (task,) = resolve_tasks((task,))
    return [
        _make_prompt(task, random.Random(f"{task}-{length}-{seed}-{index}"), length, material)
        for index in range(num_prompts)
    ]


def _make_prompt(task: str, rng: random.Random, length: int, material: Material) -> TaskPrompt:
    if task in NIAH_TASKS:
        new_tokens = _NIAH_TOKENS
        text, references = niah_prompt(task, rng, length - new_tokens, material)
    elif task in _OTHER_RULER:
        new_tokens, build = _OTHER_RULER[task]
        text, references = build(rng, length - new_tokens, material)
    else:
        new_tokens = _NEEDLE_TOKENS
        try:
            prompt = needle.make_prompt(
                length - new_tokens - material.count_tokens(""), 4, rng.randrange(1 << 31),
                count_tokens=lambda text: material.count_tokens(text) - material.count_tokens(""),
            )  # fmt: skip
        except ValueError as error:
            raise TaskError(f"task 'needle': {error}") from error
        text, references = prompt.text, (prompt.answer,)
    return TaskPrompt(task, text, references, new_tokens, whole_words=task == "needle")
