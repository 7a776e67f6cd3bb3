"""LongBench's examples, from a folder, an archive or the Hugging Face hub."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHIVE = "data.zip"
"""The benchmark's own release, one `data/TASK.jsonl` per task."""


class LongBenchError(ValueError):
    """LongBench data that is missing or unreadable, or a task that does not exist."""


@dataclass(frozen=True)
class Example:
    """One row of a task.

    Attributes:
        input: Question, instruction or last few-shot input; may be empty.
        context: The long text.
        answers: Right answers, of which the best match counts.
        classes: All labels of a classification task.
    """

    input: str
    context: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()


def load_longbench(source: str, task: str) -> tuple[Example, ...]:
    """Examples of one task.

    Args:
        source: A folder with `TASK.jsonl` files (in it or in its subfolder `data`) or with
            `data.zip`; the archive itself; or a dataset of the hub, which either holds `data.zip`,
            as `zai-org/LongBench` does, or one configuration per task.
        task: One of `LONGBENCH_TASKS`.

    Raises:
        LongBenchError: If the data cannot be found or read.
    """
    path = Path(source)
    try:
        if path.is_dir():
            rows = _folder_rows(path, task)
        elif path.is_file():
            rows = _archive_rows(path, task)
        elif path.suffix == ".zip":
            raise LongBenchError(f"LongBench archive {source!r} does not exist; correct the path")
        else:
            rows = _hub_rows(source, task)
        examples = tuple(_example(row) for row in rows)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise LongBenchError(
            f"LongBench data {source!r}, task {task!r}, is not in the form of the release "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error
    if not examples:
        raise LongBenchError(f"LongBench data {source!r} holds no example of task {task!r}")
    return examples


def _example(row: Mapping[str, Any]) -> Example:
    # Mirrors on the hub call the input a question.
    text = row["input"] if "input" in row else row["question"]
    return Example(text, row["context"], tuple(row["answers"]), tuple(row.get("all_classes") or ()))


def _folder_rows(folder: Path, task: str) -> Iterable[Mapping[str, Any]]:
    for file in (folder / f"{task}.jsonl", folder / "data" / f"{task}.jsonl"):
        if file.is_file():
            return _lines(file.read_text(encoding="utf-8"))
    if (folder / ARCHIVE).is_file():
        return _archive_rows(folder / ARCHIVE, task)
    raise LongBenchError(
        f"folder {str(folder)!r} holds neither {task}.jsonl nor {ARCHIVE}; put the files of the "
        "release there, or name a dataset of the Hugging Face hub such as zai-org/LongBench"
    )


def _archive_rows(archive: Path, task: str) -> Iterable[Mapping[str, Any]]:
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if Path(name).name == f"{task}.jsonl":
                    return _lines(opened.read(name).decode("utf-8"))
    except zipfile.BadZipFile as error:
        raise LongBenchError(
            f"LongBench archive {str(archive)!r} is damaged ({error}); fetch it again"
        ) from error
    raise LongBenchError(f"LongBench archive {str(archive)!r} holds no {task}.jsonl")


def _hub_rows(repo_id: str, task: str) -> Iterable[Mapping[str, Any]]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        archive = hf_hub_download(repo_id, ARCHIVE, repo_type="dataset")
    except LocalEntryNotFoundError as error:  # no connection, and nothing in the local cache
        raise _unreachable(repo_id, error) from error
    except EntryNotFoundError:
        return _dataset_rows(repo_id, task)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise _unreachable(repo_id, error) from error
    return _archive_rows(Path(archive), task)


def _dataset_rows(repo_id: str, task: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise LongBenchError(
            f"dataset {repo_id!r} holds no {ARCHIVE}, and reading its tables needs the package "
            "`datasets`; install it (pip install datasets) or use zai-org/LongBench"
        ) from error
    try:
        return list(datasets.load_dataset(repo_id, task, split="test"))
    except (OSError, ValueError) as error:
        raise _unreachable(repo_id, error) from error


def _unreachable(repo_id: str, error: BaseException) -> LongBenchError:
    said = " ".join(str(error).split())[:300]
    return LongBenchError(
        f"LongBench data {repo_id!r} is no local folder or archive and could not be read from the "
        f"Hugging Face hub ({said}); check the name and the connection, or fetch {ARCHIVE} of the "
        "dataset zai-org/LongBench by other means and name the file"
    )


def _lines(text: str) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in io.StringIO(text) if line.strip()]
