"""Loss curves: a CSV file that grows with the run, and TensorBoard where it is asked for."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HEADER = ("stage", "loss", "step", "tokens", "group", "value", "learning_rate")


@dataclass(frozen=True)
class Point:
    """One loss.

    Attributes:
        stage: `I` or `II`.
        loss: Name of the loss.
        step: Steps taken before it was measured.
        tokens: `training` or `held-out`.
        group: The maps it belongs to, or `mean` over all of them.
        value: The loss.
        learning_rate: Of the step; 0 where none was taken.
    """

    stage: str
    loss: str
    step: int
    tokens: str
    group: str
    value: float
    learning_rate: float

    def row(self) -> tuple[Any, ...]:
        """The columns of `HEADER`."""
        return tuple(getattr(self, name) for name in HEADER)


def to_csv(points: Iterable[Point]) -> str:
    """A whole CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(point.row() for point in points)
    return text.getvalue()


class Curves:
    """All points of a run, written out as they come.

    Args:
        file: CSV file; None writes none. Its folder is made.
        tensorboard: Folder of event files; None writes none.

    Raises:
        ValueError: If TensorBoard is asked for and not installed.
        OSError: If the file cannot be written.
    """

    def __init__(self, file: str | None = None, tensorboard: str | None = None) -> None:
        self.points: list[Point] = []
        self._path = None if file is None else Path(file)
        self._file: IO[str] | None = None
        self._board = None if tensorboard is None else summary_writer(tensorboard)(tensorboard)
        if self._path is not None:
            self._open()

    def restore(self, rows: list[list[Any]]) -> None:
        """Take up the points of an interrupted run, in place of all others."""
        self.points = [Point(**dict(zip(HEADER, row, strict=True))) for row in rows]
        if self._path is not None:
            self.close()
            self._open()

    def add(self, point: Point) -> None:
        """Record one more point."""
        self.points.append(point)
        if self._file is not None:
            csv.writer(self._file, lineterminator="\n").writerow(point.row())
            self._file.flush()
        if self._board is not None:
            name = f"{point.loss}/{point.tokens}/{point.group}".replace(" ", "_")
            self._board.add_scalar(name, point.value, point.step)

    def close(self) -> None:
        """Close the files; the points stay."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.flush()

    def _open(self) -> None:
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Line by line, so that the file can be followed while it grows.
        self._file = self._path.open("w", encoding="utf-8", buffering=1)
        self._file.write(to_csv(self.points))
        self._file.flush()


def summary_writer(folder: str) -> Any:
    """TensorBoard's class of that name, which is to write to a folder.

    Raises:
        ValueError: If the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tensorboard={folder!r} needs the package tensorboard; install it (pip install "
            "tensorboard) or use curves, which writes a CSV file"
        ) from error
    return SummaryWriter
