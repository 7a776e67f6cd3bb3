"""LongBench examples as prompts that fit a length."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from echokv_vllm.eval.longbench.data import Example, LongBenchError
from echokv_vllm.eval.longbench.metrics import classification, edit_similarity, rouge_l
from echokv_vllm.eval.longbench.tasks import LONGBENCH_TASKS, LongBenchTask
from echokv_vllm.eval.tasks.prompt import Metric, TaskPrompt


def longbench_prompts(
    task: str, examples: Sequence[Example], tokenizer: Any, length: int, chat_template: bool = True
) -> list[TaskPrompt]:
    """Prompts of one task.

    Args:
        task: One of `LONGBENCH_TASKS`.
        examples: Its examples.
        tokenizer: The model's.
        length: Tokens of prompt and answer together; what is too long loses its middle.
        chat_template: Use the tokenizer's chat template, if it has one, where the task allows it.

    Raises:
        LongBenchError: If the length leaves no room for a prompt, or a package is missing.
    """
    rules = LONGBENCH_TASKS[task]
    _check_scorer(task, rules)
    chat = chat_template and rules.chat and getattr(tokenizer, "chat_template", None) is not None
    limit = length - rules.max_new_tokens
    prompts = []
    for example in examples:
        # No str.format: the text may hold braces, and what it holds must not be filled in.
        before, rest = rules.template.split("{context}")
        text = before + example.context + rest.replace("{input}", example.input)
        metric = rules.metric or classification(example.classes)
        # The input of a code task is a file, and may be cut like the context.
        bare = before + rest.replace("{input}", "")
        fitted = _fitting(text, bare, tokenizer, limit, chat)
        if fitted is None:
            raise LongBenchError(
                f"LongBench task {task!r} has no room for its instructions in "
                f"{limit} prompt tokens; raise the length (--longbench-length)"
            )
        prompts.append(
            TaskPrompt(
                task=task,
                text=fitted,
                references=example.answers,
                max_new_tokens=rules.max_new_tokens,
                metric=metric,
                first_line=rules.first_line,
                special_tokens=not chat,
            )
        )
    return prompts


def _fitting(text: str, bare: str, tokenizer: Any, limit: int, chat: bool) -> str | None:
    """The prompt, its middle cut out if it has more than `limit` tokens.

    None if not even `bare`, the prompt without context and input, fits.
    """

    # A model that thinks first (Qwen3) would spend the few tokens of an answer on its thoughts.
    switch = "enable_thinking"
    without_thoughts = {switch: False} if chat and switch in str(tokenizer.chat_template) else {}

    def finished(part: str) -> str:
        if not chat:
            return part
        messages = [{"role": "user", "content": part}]
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **without_thoughts
            )
        )

    def count(part: str) -> int:
        ids = tokenizer(finished(part), add_special_tokens=not chat, verbose=False)["input_ids"]
        return len(ids)

    excess = count(text) - limit
    if excess <= 0:
        return finished(text)
    if count(bare) > limit:
        return None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = len(ids)
    cut = text
    # Tokens at the seam may join or split, so the count is checked and the rest cut off.
    while excess > 0:
        room -= excess
        half = room // 2
        cut = _decoded(tokenizer, ids[:half]) + _decoded(tokenizer, ids[-half:])
        excess = count(cut) - limit
    return finished(cut)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _check_scorer(task: str, rules: LongBenchTask) -> None:
    """Fail before the work, not after it."""
    packages: dict[Metric | None, str] = {rouge_l: "rouge", edit_similarity: "rapidfuzz"}
    needed = packages.get(rules.metric)
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise LongBenchError(
            f"LongBench task {task!r} is scored with the package {needed}; install it (pip install "
            f"{needed}), or leave the task out (--longbench-tasks)"
        )
