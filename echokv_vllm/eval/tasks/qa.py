"""RULER's question answering: the documents that hold the answer, among others that do not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echokv_vllm.eval.tasks.prompt import TaskError, largest_fit

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


@dataclass(frozen=True)
class Question:
    """A question on some documents.

    Attributes:
        text: The question.
        answers: Right answers; one of them is enough.
        holding: Indices of the documents that a prompt must hold.
        near: Indices of documents on the same subject, the first to be added.
    """

    text: str
    answers: tuple[str, ...]
    holding: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class QaData:
    """Documents and questions on them."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


class _Documents:
    """Numbers distinct documents in the order they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def load_squad(source: str) -> QaData:
    """SQuAD 2.0: the answerable questions, each on one paragraph.

    Args:
        source: JSON file of the official release (`dev-v2.0.json`), or a hub dataset with columns
            title, context, question and answers, such as `rajpurkar/squad_v2`.

    Raises:
        TaskError: If it cannot be read.
    """
    return _load(source, "validation", _squad_file, _squad_rows)


def load_hotpotqa(source: str) -> QaData:
    """HotpotQA, distractor setting: questions on ten paragraphs, two of which hold the answer.

    Args:
        source: JSON file of the official release (`hotpot_dev_distractor_v1.json`), or a hub
            dataset `NAME:CONFIG`, such as `hotpotqa/hotpot_qa:distractor`.

    Raises:
        TaskError: If it cannot be read.
    """
    return _load(source, "validation", _hotpotqa_file, _hotpotqa_rows)


QA_LOADERS: dict[str, tuple[str, Callable[[str], QaData]]] = {
    "qa_1": ("squad", load_squad),
    "qa_2": ("hotpotqa", load_hotpotqa),
}
"""Task to the option that names its data, and the data's loader."""


def no_data_reason(task: str) -> str:
    """Why a QA task cannot run, and the way out."""
    option, _ = QA_LOADERS[task]
    example = {
        "squad": "dev-v2.0.json or the hub dataset rajpurkar/squad_v2",
        "hotpotqa": "hotpot_dev_distractor_v1.json or the hub dataset "
        "hotpotqa/hotpot_qa:distractor",
    }[option]
    return f"task {task!r} needs data that is not part of echokv: name {example} with --{option}"


def qa_prompt(
    task: str,
    data: QaData,
    question: Question,
    rng: random.Random,
    limit: int,
    count_tokens: Callable[[str], int],
) -> tuple[str, tuple[str, ...]]:
    """Prompt of at most `limit` tokens and the right answers.

    Raises:
        TaskError: If the limit has no room for the documents that hold the answer.
    """
    taken = {*question.holding, *question.near}
    near = rng.sample(question.near, len(question.near))
    others = [index for index in range(len(data.documents)) if index not in taken]
    rng.shuffle(others)
    fillers = [*near, *others]
    order_seed = rng.random()

    def build(count: int) -> str:
        chosen = [*question.holding, *fillers[:count]]
        random.Random(order_seed).shuffle(chosen)
        listed = "\n\n".join(
            f"Document {number}:\n{data.documents[index]}"
            for number, index in enumerate(chosen, start=1)
        )
        return (
            f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{listed}\n\n{_INSTRUCTION}"
            f"\n\nQuestion: {question.text} Answer:"
        )

    text = largest_fit(build, count_tokens, limit, task, most=len(fillers))
    return text, question.answers


def _load(
    source: str,
    split: str,
    read_file: Callable[[Any], QaData],
    read_rows: Callable[[Iterable[Mapping[str, Any]]], QaData],
) -> QaData:
    try:
        if Path(source).is_file():
            data = read_file(json.loads(Path(source).read_text(encoding="utf-8")))
        elif source.endswith(".json"):
            raise TaskError(
                f"QA file {source!r} does not exist; name a JSON file of the official release, or "
                "a dataset of the Hugging Face hub"
            )
        else:
            data = read_rows(_hub_rows(source, split))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise TaskError(
            f"QA data {source!r} is not in the form of the official release "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error
    if not data.questions:
        raise TaskError(f"QA data {source!r} holds no answerable question; give another")
    return data


def _hub_rows(source: str, split: str) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f"{source!r} is no local file, and reading it from the Hugging Face hub needs the "
            "package `datasets`; install it (pip install datasets) or give a JSON file"
        ) from error
    name, _, config = source.partition(":")
    try:
        yield from datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        raise TaskError(
            f"dataset {source!r} could not be read from the Hugging Face hub: {error}; check the "
            "name (NAME[:CONFIG]) and the connection, or give a JSON file"
        ) from error


def _squad_file(content: Any) -> QaData:
    documents, questions = _Documents(), []
    for article in content["data"]:
        near = [documents.number(paragraph["context"]) for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            held = documents.number(paragraph["context"])
            for entry in paragraph["qas"]:
                if not entry.get("is_impossible"):
                    answers = [answer["text"] for answer in entry["answers"]]
                    questions.append(_question(entry["question"], answers, (held,), near))
    return QaData(tuple(documents.numbers), tuple(questions))


def _squad_rows(rows: Iterable[Mapping[str, Any]]) -> QaData:
    documents, asked = _Documents(), []
    articles: dict[str, list[int]] = {}
    for row in rows:
        held = documents.number(row["context"])
        articles.setdefault(row["title"], []).append(held)
        if row["answers"]["text"]:
            asked.append((row["question"], row["answers"]["text"], held, row["title"]))
    questions = [
        _question(text, answers, (held,), articles[title]) for text, answers, held, title in asked
    ]
    return QaData(tuple(documents.numbers), tuple(questions))


def _hotpotqa_file(content: Any) -> QaData:
    rows = []
    for row in content:
        titles, paragraphs = zip(*row["context"], strict=True)
        rows.append({**row, "context": {"title": titles, "sentences": paragraphs}})
    return _hotpotqa_rows(rows)


def _hotpotqa_rows(rows: Iterable[Mapping[str, Any]]) -> QaData:
    documents, questions = _Documents(), []
    for row in rows:
        context = row["context"]
        held = tuple(
            documents.number(f"{title}\n{''.join(sentences)}")
            for title, sentences in zip(context["title"], context["sentences"], strict=True)
        )
        questions.append(_question(row["question"], [row["answer"]], held, ()))
    return QaData(tuple(documents.numbers), tuple(questions))


def _question(
    text: str, answers: Iterable[str], holding: tuple[int, ...], near: Iterable[int]
) -> Question:
    return Question(
        text,
        tuple(dict.fromkeys(answers)),
        tuple(dict.fromkeys(holding)),
        tuple(dict.fromkeys(index for index in near if index not in holding)),
    )
