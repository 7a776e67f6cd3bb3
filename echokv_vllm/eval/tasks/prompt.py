"""A prompt with its reference answers, how it is scored, and how it is made to fit a length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from echokv_vllm.needle import contains_answer

_FIRST_PROBE = 16  # units
_STRAIGHT_PROBES = 12
_LEAST_RATE = 0.1  # tokens per unit


class TaskError(ValueError):
    """A task that does not exist or does not fit the length."""


Metric = Callable[[str, Sequence[str]], float]
"""Score of a completion beside its references, 0 to 1."""


def string_match_all(output: str, references: Sequence[str]) -> float:
    """Share of `references` that occur in `output`, case ignored (RULER's metric of that name)."""
    lowered = output.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


def string_match_part(output: str, references: Sequence[str]) -> float:
    """Whether any of `references` occurs in `output`, case ignored (RULER's for its QA tasks)."""
    lowered = output.lower()
    return float(any(reference.lower() in lowered for reference in references))


def whole_words(output: str, references: Sequence[str]) -> float:
    """Share of `references` that stand as whole words in the first line of an answer."""
    return sum(contains_answer(output, reference) for reference in references) / len(references)


@dataclass(frozen=True)
class TaskPrompt:
    """One question.

    Attributes:
        task: Name of the task.
        text: The prompt, answer prefix included.
        references: Right answers, or parts of one.
        max_new_tokens: Tokens the model may generate.
        metric: Compares a completion to the references.
        first_line: Only the first line of a completion counts.
        special_tokens: Whether the tokenizer adds its special tokens; a chat template has them.
    """

    task: str
    text: str
    references: tuple[str, ...]
    max_new_tokens: int
    metric: Metric = string_match_all
    first_line: bool = False
    special_tokens: bool = True

    def score(self, output: str) -> float:
        """Score of a completion, 0 to 1."""
        if self.first_line:
            output = output.lstrip("\n").split("\n", 1)[0]
        return self.metric(output, self.references)

    def is_settled(self, output: str) -> bool:
        """Whether no continuation of `output` can change its score."""
        if self.first_line and "\n" in output.lstrip("\n"):
            return True
        return self.metric in (string_match_all, string_match_part) and self.score(output) == 1


def largest_fit(
    build: Callable[[int], str],
    count_tokens: Callable[[str], int],
    limit: int,
    task: str,
    fewest: int = 0,
    most: int | None = None,
) -> str:
    """The longest of the texts `build(fewest)`, `build(fewest + 1)`, .. of at most `limit` tokens.

    Args:
        build: Text with so many units of filling; longer for more units.
        count_tokens: Tokens of a text.
        limit: Most tokens.
        task: For the error message.
        fewest: Least units.
        most: Most units there are; None has no end.

    Raises:
        TaskError: If even the shortest is too long.
    """
    low, text = fewest, build(fewest)
    low_tokens = needed = count_tokens(text)
    if needed > limit:
        raise TaskError(
            f"task {task!r} needs at least {needed} prompt tokens, but its length leaves {limit}; "
            "raise the task length"
        )
    high, high_tokens = None, 0
    last = sys.maxsize if most is None else most
    guess = min(low + _FIRST_PROBE, last)
    # Counting is slow, and the tokens of a unit vary little: go where a straight line says, and
    # halve the rest should it mislead.
    num_probes = 0
    while low < last and (high is None or high - low > 1):
        num_probes += 1
        candidate = build(guess)
        tokens = count_tokens(candidate)
        if tokens <= limit:
            low, low_tokens, text = guess, tokens, candidate
        else:
            high, high_tokens = guess, tokens
        if high is None:
            rate = max((low_tokens - needed) / (low - fewest), _LEAST_RATE)
            guess = min(low + max(1, int((limit - low_tokens) / rate)), last)
        elif num_probes < _STRAIGHT_PROBES:
            share = (limit - low_tokens) / (high_tokens - low_tokens)
            guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        else:
            guess = (low + high) // 2
    return text
