"""Long-context tasks: RULER's thirteen, and the needle task of the tiny model.

Written from the description in the RULER paper (arXiv 2404.06654); the prompts keep its wording.
Differences: no worked example in front of `vt` and `cwe`, word lists of our own, fewer repetitions
in `cwe` where the length has no room for them, blanks and not line breaks between the sentences of
noise and of needle haystacks, and no chat template. The two QA tasks need data of their own.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from echokv_vllm import needle
from echokv_vllm.eval.tasks.haystack import Material
from echokv_vllm.eval.tasks.niah import NIAH_TASKS, niah_prompt
from echokv_vllm.eval.tasks.prompt import (
    TaskError,
    TaskPrompt,
    string_match_all,
    string_match_part,
    whole_words,
)
from echokv_vllm.eval.tasks.qa import QA_LOADERS, no_data_reason, qa_prompt
from echokv_vllm.eval.tasks.tracking import tracking_prompt
from echokv_vllm.eval.tasks.words import common_words_prompt, frequent_words_prompt

__all__ = [
    "QA_LOADERS",
    "QA_TASKS",
    "RULER_TASKS",
    "TASKS",
    "Material",
    "TaskError",
    "TaskPrompt",
    "make_niah_prompt",
    "make_prompts",
    "no_data_reason",
    "resolve_tasks",
    "string_match_all",
    "string_match_part",
    "whole_words",
]

_OTHER_RULER = {
    "vt": (30, tracking_prompt),
    "cwe": (120, common_words_prompt),
    "fwe": (50, frequent_words_prompt),
}
_NIAH_TOKENS = 128
_QA_TOKENS = 32
_NEEDLE_TOKENS = needle.MAX_VALUE_DIGITS + 5

RULER_TASKS: tuple[str, ...] = (*NIAH_TASKS, *_OTHER_RULER)
"""RULER's synthetic tasks."""
QA_TASKS: tuple[str, ...] = tuple(QA_LOADERS)
"""RULER's tasks on data: SQuAD and HotpotQA."""
TASKS: tuple[str, ...] = (*RULER_TASKS, "needle")
"""Every task without data. `needle` is what the tiny model in `examples/` has learned."""


def resolve_tasks(names: tuple[str, ...], qa_tasks: Collection[str] = ()) -> tuple[str, ...]:
    """Task names with `ruler` spelt out, each once.

    Args:
        names: What was asked for.
        qa_tasks: QA tasks whose data is there; `ruler` leaves the others out.

    Raises:
        TaskError: If a name is unknown, or a QA task is named whose data is not there.
    """
    found: list[str] = []
    for name in names:
        if name == "ruler":
            found += [*RULER_TASKS, *(task for task in QA_TASKS if task in qa_tasks)]
        elif name in TASKS or name in qa_tasks:
            found.append(name)
        elif name in QA_TASKS:
            raise TaskError(no_data_reason(name))
        else:
            allowed = ", ".join((*TASKS, *QA_TASKS))
            raise TaskError(
                f"unknown task {name!r}; allowed are {allowed}, and ruler for all of RULER's"
            )
    return tuple(dict.fromkeys(found))


def make_prompts(
    task: str, num_prompts: int, length: int, material: Material, seed: int = 0
) -> list[TaskPrompt]:
    """Seeded prompts of one task.

    Args:
        task: One of `TASKS`, or of `QA_TASKS` whose data the material holds.
        num_prompts: How many.
        length: Tokens of prompt and answer together, special tokens included; a prompt comes close
            to that and never exceeds it.
        material: Tokenizer and haystack text.
        seed: Same seed and arguments, same prompts.

    Raises:
        TaskError: If the length has no room for the task.
    """
    (task,) = resolve_tasks((task,), material.qa)
    if task in QA_TASKS:
        return _make_qa_prompts(task, num_prompts, length, material, seed)
    return [
        _make_prompt(task, random.Random(f"{task}-{length}-{seed}-{index}"), length, material)
        for index in range(num_prompts)
    ]


def _make_qa_prompts(
    task: str, num_prompts: int, length: int, material: Material, seed: int
) -> list[TaskPrompt]:
    data = material.qa[task]
    # The same questions at every length; they start over where there are too few.
    order = random.Random(f"{task}-{seed}").sample(data.questions, len(data.questions))
    prompts = []
    for index in range(num_prompts):
        text, answers = qa_prompt(
            task, data, order[index % len(order)],
            random.Random(f"{task}-{length}-{seed}-{index}"), length - _QA_TOKENS,
            material.count_tokens,
        )  # fmt: skip
        prompts.append(TaskPrompt(task, text, answers, _QA_TOKENS, string_match_part))
    return prompts


def make_niah_prompt(
    task: str, rng: random.Random, length: int, material: Material, depth: float | None = None
) -> TaskPrompt:
    """One needle prompt; `length` as in `make_prompts`, `depth` as in `niah_prompt`."""
    text, references = niah_prompt(task, rng, length - _NIAH_TOKENS, material, depth)
    return TaskPrompt(task, text, references, _NIAH_TOKENS)


def _make_prompt(task: str, rng: random.Random, length: int, material: Material) -> TaskPrompt:
    if task in NIAH_TASKS:
        return make_niah_prompt(task, rng, length, material)
    if task in _OTHER_RULER:
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
    metric = whole_words if task == "needle" else string_match_all
    return TaskPrompt(task, text, references, new_tokens, metric)
