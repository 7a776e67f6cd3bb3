"""Calibration data: documents, packing, limits, and a message for everything unusable."""

import hashlib
import json
import lzma
import sys
import types

import pytest

from echokv_vllm.train import data
from echokv_vllm.train.data import DataError, load_tokens

BOS, EOS = 256, 257


def _bytes(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_documents_are_packed_with_bos_and_eos(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("abc\x1e \n\x1edéf\x1e", encoding="utf-8")
    loaded = load_tokens(str(path), tokenizer, sequence_len=5, num_tokens=1000)
    stream = [BOS, *_bytes(tokenizer, "abc"), EOS, BOS, *_bytes(tokenizer, "déf"), EOS]
    assert len(stream) == 11
    assert loaded.sequences.tolist() == [stream[:5], stream[5:10]]
    assert loaded.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_all_file_kinds_give_the_same_tokens(tmp_path, tokenizer):
    documents = ["first document", "second\none", "third"]
    (tmp_path / "a.txt").write_text("\x1e".join(documents))
    with lzma.open(tmp_path / "b.txt.xz", "wt") as file:
        file.write("\x1e".join(documents))
    lines = "\n\n".join(json.dumps({"text": text, "id": 1}) for text in documents)
    (tmp_path / "c.jsonl").write_text(lines)
    # The last ending says what a file is.
    (tmp_path / "d.jsonl.txt").write_text("\x1e".join(documents))
    with lzma.open(tmp_path / "e.txt.jsonl.xz", "wt") as file:
        file.write(lines)
    found = [load_tokens(str(path), tokenizer, 8, 1000) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 5
    assert all(item.sequences.equal(found[0].sequences) for item in found)
    assert len({item.tokens_sha256 for item in found}) == 1
    assert len({item.file_sha256 for item in found}) == 4


def test_token_limit_rounds_down_to_whole_sequences(corpus, tokenizer):
    loaded = load_tokens(corpus, tokenizer, sequence_len=64, num_tokens=1000)
    assert loaded.sequences.shape == (15, 64)
    longer = load_tokens(corpus, tokenizer, sequence_len=64, num_tokens=10**9)
    assert longer.sequences[:15].equal(loaded.sequences)
    assert len(longer.sequences) == 40 * 202 // 64


def test_split_holds_out_the_last_tenth(corpus, tokenizer):
    loaded = load_tokens(corpus, tokenizer, 64, 64 * 40)
    fit, heldout = loaded.split()
    assert len(fit) == 36 and heldout.equal(loaded.sequences[36:])
    fit, heldout = load_tokens(corpus, tokenizer, 64, 128).split()
    assert len(fit) == len(heldout) == 1


@pytest.mark.parametrize("limit", [3, 7, 16])
def test_long_documents_are_read_in_parts(tmp_path, tokenizer, monkeypatch, limit):
    text = "the quick brown fox\x1ejumps-over-the-lazy-dog again\x1e\x1eend"
    path = tmp_path / "text.txt"
    path.write_text(text)
    whole = load_tokens(str(path), tokenizer, 4, 10**6)
    monkeypatch.setattr(data, "_MAX_PIECE_CHARS", limit)
    pieces = list(data._pieces(str(path)))
    assert len(pieces) > 3 and max(len(piece.text) for piece in pieces) <= 2 * limit
    # A byte-level tokenizer does not care where a document is cut.
    assert load_tokens(str(path), tokenizer, 4, 10**6).sequences.equal(whole.sequences)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["holds no text"]),
        ("blank.txt", b" \n\x1e\n", ["holds no text"]),
        ("short.txt", b"0123456789", ["12 tokens", "at least two", "sequence_len=8", "lower"]),
        ("latin.txt", "caf\xe9".encode("latin-1") * 99, ["not UTF-8"]),
        ("broken.txt.xz", b"no xz data", ["damaged .xz"]),
        ("cut.txt.xz", lzma.compress(b"abc " * 5000)[:-20], ["damaged .xz"]),
        ("bad.jsonl", b'{"text": "ok"}\n{"body": 1}\n', ["line 2", '"text"']),
        ("number.jsonl", b'{"text": 5}\n', ["line 1", "no string"]),
        ("half.jsonl", b'{"text": "ok"}\n{"text": "cut \\ud83d"}\n', ["line 2", "surrogate", "4"]),
        ("not.jsonl", b"plain words\n", ["line 1", "JSON"]),
        ("words.docx", b"abc", ["unknown ending", ".txt.xz"]),
    ],
)
def test_unusable_files(tmp_path, tokenizer, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokens(str(path), tokenizer, sequence_len=8, num_tokens=1000)
    for word in [name, *words]:
        assert word in str(caught.value)


def test_absent_file_and_folder(tmp_path, tokenizer):
    with pytest.raises(DataError, match="does not exist"):
        load_tokens(str(tmp_path / "absent.txt"), tokenizer, 8, 1000)
    with pytest.raises(DataError, match=r"is a folder; name one file .*\.jsonl"):
        load_tokens(str(tmp_path), tokenizer, 8, 1000)


def test_limit_below_two_sequences(corpus, tokenizer):
    with pytest.raises(DataError, match=r"num_tokens=100 .* sequence_len=64 .*raise num_tokens"):
        load_tokens(corpus, tokenizer, sequence_len=64, num_tokens=100)


def _fake_datasets(monkeypatch, load):
    """A stand-in for the `datasets` package, which the test environment does not need."""
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_dataset_names_are_streamed(monkeypatch, tokenizer, tmp_path):
    calls = []

    def load(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "abcdef"}, {"text": " "}, {"text": "ghij"}] * 1000)

    _fake_datasets(monkeypatch, load)
    monkeypatch.chdir(tmp_path)
    loaded = load_tokens("owner/books", tokenizer, 7, 14)
    assert loaded.sequences.tolist() == [
        [BOS, *_bytes(tokenizer, "abcdef")],
        [EOS, BOS, *_bytes(tokenizer, "ghij"), EOS],
    ]
    assert loaded.file_sha256 is None
    load_tokens("books:en:test", tokenizer, 7, 14)
    assert calls == [("owner/books", None, "train", True), ("books", "en", "test", True)]


def test_unusable_datasets(monkeypatch, tokenizer, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"'owner/books' is no local file.*install"):
        load_tokens("owner/books", tokenizer, 8, 1000)

    def offline(*_, **__):
        raise ConnectionError("no route to the hub")

    _fake_datasets(monkeypatch, offline)
    with pytest.raises(DataError, match=r"owner/books.*no route to the hub.*connection"):
        load_tokens("owner/books", tokenizer, 8, 1000)
    _fake_datasets(monkeypatch, lambda *_, **__: iter([{"body": "abc"}]))
    with pytest.raises(DataError, match=r"columns \['body'\]"):
        load_tokens("owner/books", tokenizer, 8, 1000)
    with pytest.raises(DataError, match=r"NAME\[:CONFIG\[:SPLIT\]\]"):
        load_tokens("a:b:c:d", tokenizer, 8, 1000)
