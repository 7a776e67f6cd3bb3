"""LongBench's metrics: 0 to 1, the best over all right answers.

ROUGE and edit distance come from the packages `rouge` (the one LongBench uses) and `rapidfuzz`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Marks of a fence or a comment: such a line is no code.
_NOT_CODE = ("`", "#", "//")


def qa_f1(output: str, references: Sequence[str]) -> float:
    """F1 of the bags of words, without case, punctuation and articles (as SQuAD measures it)."""
    return max(_f1(_words(output), _words(reference)) for reference in references)


def rouge_l(output: str, references: Sequence[str]) -> float:
    """F1 of ROUGE-L."""
    from rouge import Rouge

    def score(reference: str) -> float:
        try:
            return float(Rouge().get_scores(output, reference)[0]["rouge-l"]["f"])
        except (ValueError, RecursionError):
            # Nothing but white space or full stops, or a text of hundreds of words without a full
            # stop, where the package runs out of stack: LongBench gives both 0.
            return 0.0

    return max(map(score, references))


def edit_similarity(output: str, references: Sequence[str]) -> float:
    """Likeness, in whole per cent, of the first line of code to the right one."""
    from rapidfuzz import fuzz

    lines = output.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in _NOT_CODE)), "")
    return max(round(fuzz.ratio(code, reference)) / 100 for reference in references)


def count_share(output: str, references: Sequence[str]) -> float:
    """Share of the numbers given that are the right one."""
    return max(_share(output, reference) for reference in references)


def retrieval_share(output: str, references: Sequence[str]) -> float:
    """Share of the numbers given that are the number of the right paragraph."""
    numbers = [re.search(r"Paragraph (\d+)", reference) for reference in references]
    return max(_share(output, number.group(1)) if number else 0.0 for number in numbers)


def classification(classes: Sequence[str]) -> Callable[[str, Sequence[str]], float]:
    """Metric of a task with these labels: 1 over the labels named, if the right one is among them.

    Labels that are a part of the right one do not count as named.
    """

    def score(output: str, references: Sequence[str]) -> float:
        def one(reference: str) -> float:
            named = [
                label
                for label in classes
                if label in output and (label == reference or label not in reference)
            ]
            return 1 / len(named) if reference in named else 0.0

        return max(map(one, references))

    return score


def _share(output: str, number: str) -> float:
    numbers = re.findall(r"\d+", output)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(found: Sequence[str], right: Sequence[str]) -> float:
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right)) if common else 0.0
