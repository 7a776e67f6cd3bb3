"""Calibration text: documents from a file or a dataset, packed into token sequences.

Text is read and tokenised piece by piece; what stays in memory is 4 bytes per used token.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

DOCUMENT_SEPARATOR = "\x1e"
"""U+001E, the character between two documents of a text file."""

FILE_SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")

# A document longer than this is tokenised in parts, so that one huge file does not fill memory.
_MAX_PIECE_CHARS = 1 << 20


class DataError(ValueError):
    """Calibration data that is missing, unreadable or too short."""


@dataclass(frozen=True)
class Piece:
    """A whole document, or a part of a long one."""

    text: str
    is_first: bool = True
    is_last: bool = True


@dataclass(frozen=True)
class TokenData:
    """Packed calibration tokens.

    Attributes:
        sequences: [num_sequences, sequence_len] int32.
        source: What the user named.
        file_sha256: Digest of the local file, None for a dataset.
        tokens_sha256: Digest of the int32 little-endian tokens of `sequences`.
    """

    sequences: torch.Tensor
    source: str
    file_sha256: str | None
    tokens_sha256: str

    def split(self, heldout_fraction: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
        """The first sequences for the fit and the last ones (at least one) held out."""
        num_heldout = max(1, round(heldout_fraction * len(self.sequences)))
        return self.sequences[:-num_heldout], self.sequences[-num_heldout:]


def load_tokens(source: str, tokenizer: Any, sequence_len: int, num_tokens: int) -> TokenData:
    """Read, tokenise and pack calibration data.

    Every document becomes `bos, tokens, eos` (as far as the tokenizer has them); documents follow
    each other without padding, and a sequence may span several.

    Args:
        source: A local file with one of `FILE_SUFFIXES`, or `NAME[:CONFIG[:SPLIT]]` of a dataset.
        tokenizer: Hugging Face tokenizer.
        sequence_len: Tokens per sequence.
        num_tokens: Upper limit; rounded down to whole sequences.

    Raises:
        DataError: If the data is missing, unreadable, or gives fewer than two sequences.
    """
    max_sequences = num_tokens // sequence_len
    if max_sequences < 2:
        raise DataError(
            f"num_tokens={num_tokens} is less than two sequences of sequence_len={sequence_len} "
            "(one to fit, one held out); raise num_tokens or lower sequence_len"
        )
    tokens = array("i")
    for ids in _tokenize(_pieces(source), tokenizer):
        tokens.extend(ids)
        if len(tokens) >= max_sequences * sequence_len:
            break
    num_sequences = min(max_sequences, len(tokens) // sequence_len)
    if num_sequences < 2:
        raise DataError(
            f"data {source!r} has {len(tokens)} tokens, but at least two sequences of "
            f"sequence_len={sequence_len} are needed (one to fit, one held out); give more text or "
            "lower sequence_len"
        )
    packed = torch.tensor(tokens[: num_sequences * sequence_len], dtype=torch.int32)
    return TokenData(
        sequences=packed.view(num_sequences, sequence_len),
        source=source,
        file_sha256=_file_sha256(Path(source)) if Path(source).is_file() else None,
        tokens_sha256=hashlib.sha256(packed.numpy().astype("<i4").tobytes()).hexdigest(),
    )


def check_vocabulary(sequences: torch.Tensor, vocab_size: int) -> None:
    """Refuse tokens that the model has no embedding for; looking them up ends in no clear error.

    Raises:
        DataError: If the tokenizer is that of another model.
    """
    highest = int(sequences.max())
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {highest}, but the model's vocab_size is {vocab_size}; put "
            "the tokenizer that belongs to the model beside its weights"
        )


def _tokenize(pieces: Iterable[Piece], tokenizer: Any) -> Iterator[list[int]]:
    for piece in pieces:
        ids = tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
        if piece.is_first and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
        if piece.is_last and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        yield ids


def _pieces(source: str) -> Iterator[Piece]:
    path = Path(source)
    is_data_file = source.endswith(FILE_SUFFIXES)
    if not path.exists() and not is_data_file:
        yield from _dataset_pieces(source)
        return
    if not path.exists():
        raise DataError(f"data file {source!r} does not exist; name a file or a dataset")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise DataError(
            f"data {source!r} is {kind}; name one file with one of the endings "
            f"{', '.join(FILE_SUFFIXES)} (put the text of several files into one)"
        )
    if not is_data_file:
        raise DataError(
            f"data file {source!r} has an unknown ending; allowed are {', '.join(FILE_SUFFIXES)}"
        )
    num_pieces = 0
    try:
        with _open_text(path) as file:
            is_text = source.removesuffix(".xz").endswith(".txt")
            reader = _text_pieces if is_text else _jsonl_pieces
            for piece in reader(file, source):
                num_pieces += 1
                yield piece
    except UnicodeDecodeError as error:
        raise DataError(f"data file {source!r} is not UTF-8 text: {error}") from error
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"data file {source!r} is a damaged .xz file: {error}") from error
    if num_pieces == 0:
        raise DataError(f"data file {source!r} holds no text; give a file with documents")


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _text_pieces(file: IO[str], source: str) -> Iterator[Piece]:
    """Documents of a text file, cut at white space where they are longer than the limit."""
    rest, is_first = "", True
    while chunk := file.read(_MAX_PIECE_CHARS):
        *ended, rest = (rest + chunk).split(DOCUMENT_SEPARATOR)
        for text in ended:
            if text.strip() or not is_first:
                yield Piece(text, is_first)
            is_first = True
        if len(rest) > _MAX_PIECE_CHARS:
            cut = max(rest.rfind(" "), rest.rfind("\n"), 0) or len(rest)
            yield Piece(rest[:cut], is_first, is_last=False)
            rest, is_first = rest[cut:], False
    if rest.strip() or not is_first:
        yield Piece(rest, is_first)


def _jsonl_pieces(file: IO[str], source: str) -> Iterator[Piece]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f'data file {source!r}, line {number}: expected a JSON object with a "text" field'
            ) from error
        if not isinstance(text, str):
            raise DataError(f"data file {source!r}, line {number}: text is {text!r}, no string")
        _check_encodable(text, f"data file {source!r}, line {number}")
        if text.strip():
            yield Piece(text)


def _check_encodable(text: str, where: str) -> None:
    """JSON may hold half a character, as of a cut emoji, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: text has half of a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}; repair or remove the line"
        ) from error


def _dataset_pieces(source: str) -> Iterator[Piece]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source!r} is no local file, and reading it as a Hugging Face dataset needs the "
            "package `datasets`; install it (pip install datasets) or give a local file with one "
            f"of the endings {', '.join(FILE_SUFFIXES)}"
        ) from error
    name, config, split = [*source.split(":"), "", ""][:3]
    if source.count(":") > 2 or not name:
        raise DataError(f"dataset {source!r} is not of the form NAME[:CONFIG[:SPLIT]]")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise DataError(
                    f'dataset {source!r} has columns {sorted(row)}; a column "text" with strings '
                    "is needed"
                )
            if row["text"].strip():
                yield Piece(row["text"])
    except DataError:
        raise
    except (OSError, ValueError) as error:
        # Not found, no such config or split, or no connection.
        raise DataError(
            f"dataset {source!r} could not be read from the Hugging Face hub: {error}; check the "
            "name (NAME[:CONFIG[:SPLIT]]) and the connection, or give a local file"
        ) from error


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
