"""Filling text of the tasks, and needles placed in it."""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from echokv_vllm.eval.tasks.prompt import TaskError
from echokv_vllm.eval.tasks.qa import QaData
from echokv_vllm.needle import haystack_sentence

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The sentences RULER's noise haystack repeats."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Material:
    """What prompts are made of.

    Attributes:
        count_tokens: Tokens of a text as the model's tokenizer encodes a prompt, special tokens
            included.
        essays: Sentences of the essay haystack; None generates sentences (`needle.py`).
        qa: Data of QA tasks by task name.
    """

    count_tokens: Callable[[str], int]
    essays: tuple[str, ...] | None = None
    qa: Mapping[str, QaData] = field(default_factory=dict)

    @property
    def haystack_name(self) -> str:
        """For the report."""
        return "generated sentences" if self.essays is None else "essays"

    def essay_sentences(self, rng: random.Random, count: int) -> list[str]:
        """`count` sentences in reading order from a random place on; starts over at the end."""
        if self.essays is None:
            return [haystack_sentence(rng).strip() for _ in range(count)]
        start = rng.randrange(len(self.essays))
        return [self.essays[(start + index) % len(self.essays)] for index in range(count)]


def load_essays(path: str) -> tuple[str, ...]:
    """Sentences of a text file.

    Raises:
        TaskError: If the file is missing or holds no text.
    """
    opener = lzma.open if path.endswith(".xz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            # The separator of documents (U+001E) ends a sentence like a blank.
            text = " ".join(file.read().replace("\x1e", " ").split())
    except FileNotFoundError as error:
        raise TaskError(
            f"essay file {path!r} does not exist; name a text file, or leave the option out to "
            "use generated sentences"
        ) from error
    except IsADirectoryError as error:
        raise TaskError(
            f"essay file {path!r} is a folder; name one text file (.txt or .txt.xz)"
        ) from error
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise TaskError(f"essay file {path!r} is not UTF-8 text or a sound .xz file") from error
    sentences = tuple(sentence for sentence in _SENTENCE_END.split(text) if sentence)
    if not sentences:
        raise TaskError(f"essay file {path!r} holds no text; give another")
    return sentences


def place(hay: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """Join sentences with the needles at their depths (0 = start, 1 = end of the hay), in order."""
    pieces: list[str] = []
    done = 0
    order = sorted(range(len(needles)), key=depths.__getitem__)
    for index in order:
        upto = round(depths[index] * len(hay))
        pieces += [*hay[done:upto], needles[index]]
        done = upto
    return " ".join([*pieces, *hay[done:]])
