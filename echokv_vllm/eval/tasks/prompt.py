"""A prompt with its reference answers, how it is scored, and how it is made to fit a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from echokv_vllm.needle import contains_answer


class TaskError(ValueError):
    """A task that does not exist or does not fit the length."""


@dataclass(frozen=True)
class TaskPrompt:
    """One question.

    Attributes:
        task: Name of the task.
        text: The prompt, answer prefix included.
        references: Strings a right answer holds.
        max_new_tokens: Tokens the model may generate.
        whole_words: References count as whole words of the first answer line only
            (`needle.contains_answer`); else anywhere (`string_match_all`).
    """

    task: str
    text: str
    references: tuple[str, ...]
    max_new_tokens: int
    whole_words: bool = False

    def score(self, output: str) -> float:
        """Share of the references in a completion, 0 to 1."""
        if self.whole_words:
            found = [contains_answer(output, reference) for reference in self.references]
            return sum(found) / len(found)
        return string_match_all(output, self.references)

    def is_settled(self, output: str) -> bool:
        """Whether no continuation of `output` can change its score."""
        return not self.whole_words and self.score(output) == 1


def string_match_all(output: str, references: Sequence[str]) -> float:
    """Share of `references` that occur in `output`, case ignored (RULER's metric of that name)."""
    lowered = output.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


def largest_fit(
    build: Callable[[int], str],
    count_tokens: Callable[[str], int],
    limit: int,
    task: str,
    fewest: int = 0,
) -> str:
    """The longest of the texts `build(fewest)`, `build(fewest + 1)`, .. of at most `limit` tokens.

    Args:
        build: Text with so many units of filling; longer for more units.
        count_tokens: Tokens of a text.
        limit: Most tokens.
        task: For the error message.
        fewest: Least units.

    Raises:
        TaskError: If even the shortest is too long.
    """
    text = build(fewest)
    needed = count_tokens(text)
    if needed > limit:
        raise TaskError(
            f"task {task!r} needs at least {needed} prompt tokens, but its length leaves {limit}; "
            "raise the task length"
        )
    low, high = fewest, fewest + 1
    while count_tokens(longer := build(high)) <= limit:
        low, high, text = high, 2 * high, longer
    while high - low > 1:
        middle = (low + high) // 2
        candidate = build(middle)
        if count_tokens(candidate) <= limit:
            low, text = middle, candidate
        else:
            high = middle
    return text
