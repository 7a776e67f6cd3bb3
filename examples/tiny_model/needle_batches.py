"""Tokenizer of the tiny model and its training sequences, assembled from pre-tokenised pieces.

A training sequence is one document of fixed length: introduction, haystack with needles, and clumps
of questions with answers, or of repeated facts. Each clump is about needles that stand before it;
the last one closes the document. Some sequences are random tokens that come back instead. The
wording comes from `echokv_vllm.needle`, so the questions of the demo look exactly like these.

No tokenizer runs while batches are made. Digits and words are pre-tokens of their own, so the
tokens of a text are the tokens of its pieces in a row; `SequenceMaker.check` proves that at the
start.
"""

import math
import multiprocessing.queues
import random
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from echokv_vllm import needle as nd

BOS, EOS = "<s>", "</s>"
# Loss classes. Keys and values of needles are random, so they get no weight at all.
UNPREDICTABLE, FILLER, KEY_COPY, ANSWER = range(4)
CLASS_WEIGHTS = (0.0, 0.05, 0.5, 2.0)
# One int32 per token: the token in the low 16 bits, its loss class above.
CLASS_SHIFT = 16
MAX_NEEDLES = 48
# Share of sequences that repeat random tokens. Without them training stalls at finding *a* value:
# looking one up by a key of several tokens needs attention that matches several tokens back, and
# random repeats are what makes such heads appear.
REPEAT_SHARES = (0.4, 0.15)  # in the first stage of the curriculum, and later
NUM_LEAD_TOKENS = 3  # tokens of a repeated segment after which it is known which one it is

Piece = tuple[list[int], list[int]]  # tokens and their loss classes, equally long


def train_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE over generated text: encodes any text, digits are always single tokens."""
    rng = random.Random(f"tokenizer-{seed}")
    texts = ["".join(nd.haystack_sentence(rng) for _ in range(50)) for _ in range(60)]
    # Every key and value word must be seen often enough to become one token.
    for i in range(60):
        needles = nd.make_needles(rng, 16, "mixed", 6)
        texts.append(nd.INTRO + "".join(n.sentence + n.question + f" {n.value}." for n in needles))
        texts.append("".join(f" {w}" for w in (*nd.VALUE_WORDS, *nd.KEY_ADJECTIVES)) + f" {i}")
        texts.append("-" + "-".join(nd.KEY_NOUNS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_len: int) -> None:
    """Write the Hugging Face tokenizer files; it adds the beginning token, as in training."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=max_len,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.save_pretrained(folder)


class SequenceMaker:
    """Assembles training sequences from a pool of pre-tokenised haystack sentences."""

    def __init__(self, tokenizer: Tokenizer, pool_sentences: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self.bos: int = tokenizer.encode(BOS, add_special_tokens=False).ids[0]
        self.eos: int = tokenizer.encode(EOS, add_special_tokens=False).ids[0]
        self.fragments: dict[str, list[int]] = {}
        rng = random.Random(f"pool-{seed}")
        sentences = [nd.haystack_sentence(rng) for _ in range(pool_sentences)]
        encoded = [e.ids for e in tokenizer.encode_batch(sentences, add_special_tokens=False)]
        self.starts = np.cumsum([0] + [len(ids) for ids in encoded])
        self.pool = np.array([token for ids in encoded for token in ids], dtype=np.int32)
        self.pool |= FILLER << CLASS_SHIFT

    def fragment(self, text: str) -> list[int]:
        """Tokens of a piece of text that starts and ends at a word boundary; cached."""
        tokens = self.fragments.get(text)
        if tokens is None:
            tokens = self.fragments[text] = self.tokenizer.encode(
                text, add_special_tokens=False
            ).ids
        return tokens

    def fill(self, template: str, classes: dict[str, int], **slots: str) -> list[int]:
        """Tokens with loss classes of a template; a slot's words carry the class of that slot."""
        packed: list[int] = []
        space = ""
        for literal, field, _, _ in Formatter().parse(template):
            # A space belongs to the word after it (a digit's space is a token of its own).
            text = space + literal
            space = ""
            if field is not None and text.endswith(" "):
                text, space = text[:-1], " "
            if text:
                packed += [token | FILLER << CLASS_SHIFT for token in self.fragment(text)]
            if field is not None:
                mark = classes.get(field, FILLER) << CLASS_SHIFT
                packed += [token | mark for token in self.slot(space + slots[field])]
                space = ""
        return packed

    def slot(self, text: str) -> list[int]:
        """Tokens of a slot value with its leading space: kind, word, `adjective-noun` or digits."""
        if text[-1].isdigit():
            return self.fragment(" ") + [self.fragment(digit)[0] for digit in text[1:]]
        first, hyphen, second = text.partition("-")
        return self.fragment(first) + (self.fragment("-") + self.fragment(second) if hyphen else [])

    def statement(self, needle: nd.Needle, value_class: int = UNPREDICTABLE) -> list[int]:
        """The fact as it stands in the haystack; `value_class` is ANSWER where it is repeated."""
        marks = {"kind": UNPREDICTABLE, "key": UNPREDICTABLE, "value": value_class}
        return self.fill(
            nd.NEEDLE_TEMPLATE, marks, kind=needle.kind, key=needle.key, value=needle.value
        )

    def question(self, needle: nd.Needle) -> list[int]:
        """Question, answer prefix, value, full stop and end token."""
        slots = {"kind": needle.kind, "key": needle.key}
        asked = self.fill(
            nd.QUESTION_TEMPLATE, {"kind": UNPREDICTABLE, "key": UNPREDICTABLE}, **slots
        )
        copied = self.fill(nd.ANSWER_TEMPLATE, {"kind": KEY_COPY, "key": KEY_COPY}, **slots)
        answer = [*self.slot(" " + needle.value), *self.fragment(nd.ANSWER_END), self.eos]
        return asked + copied + [token | ANSWER << CLASS_SHIFT for token in answer]

    def draw_needles(self, rng: random.Random, num_needles: int) -> list[nd.Needle]:
        """Facts with distinct keys; many share an adjective or a noun, so both must be matched."""
        side = math.isqrt(num_needles - 1) + 2 if rng.random() < 0.15 else len(nd.KEY_ADJECTIVES)
        side = min(side, len(nd.KEY_ADJECTIVES), len(nd.KEY_NOUNS))
        adjectives, nouns = rng.sample(nd.KEY_ADJECTIVES, side), rng.sample(nd.KEY_NOUNS, side)
        word_share = rng.choice((0.0, 0.2, 0.2, 0.5, 1.0))
        digits = rng.randint(nd.MIN_VALUE_DIGITS, nd.MAX_VALUE_DIGITS)
        needles = []
        for pair in rng.sample(range(side * side), num_needles):
            key = f"{adjectives[pair // side]}-{nouns[pair % side]}"
            if rng.random() < word_share:
                needles.append(nd.Needle("word", key, rng.choice(nd.VALUE_WORDS)))
            else:
                value = rng.randrange(10 ** (digits - 1), 10**digits)
                needles.append(nd.Needle("number", key, str(value)))
        return needles

    def draw_events(self, rng: random.Random, room: int) -> list[tuple[float, list[int]]]:
        """Needles and questions in at most `room` tokens, sorted by their places in 0..1."""
        # Half of the sequences restate facts, some of them several times, instead of asking: the
        # same prefix has to be continued with the same value, but in a third of the tokens.
        restate = rng.random() < 0.5
        most = max(1, min(MAX_NEEDLES, room // (24 if restate else 44)))
        if rng.random() < 0.4:
            num_needles = int(math.exp(rng.uniform(0, math.log(most + 1))))
        else:  # dense: more answers to learn from per sequence
            num_needles = rng.randint((most + 1) // 2, most)
        num_asked = num_needles
        if rng.random() < 0.2:
            num_asked = int(math.exp(rng.uniform(0, math.log(num_needles + 1))))
        clumps = [rng.random() for _ in range(rng.choice((0, 0, 1, 2, 4)))]
        events: list[tuple[float, list[int]]] = []
        for i, needle in enumerate(self.draw_needles(rng, num_needles)):
            place = rng.random()
            pieces = [(place, self.statement(needle))]
            if i < num_asked:
                asked = self.statement(needle, ANSWER) if restate else self.question(needle)
                later = [clump for clump in clumps if clump > place]
                for _ in range(rng.choice((1, 1, 2, 3)) if restate else 1):
                    at_end = not later or rng.random() < 0.5
                    pieces.append((1.0 if at_end else rng.choice(later), asked))
            for piece in pieces:
                if len(piece[1]) > room:
                    break
                room -= len(piece[1])
                events.append(piece)
        # The order inside the last clump must not give away the order of the needles.
        rng.shuffle(events)
        events.sort(key=lambda event: event[0])
        return events

    def write_repeats(self, rng: random.Random, row: np.ndarray) -> None:
        """Fill `row` with a few segments of random tokens, each of which comes back again."""
        draw = np.random.default_rng(rng.getrandbits(64))
        length = len(row)
        # A small alphabet makes short matches ambiguous, as digits and shared key words do.
        alphabet = draw.choice(
            np.arange(self.eos + 1, self.tokenizer.get_vocab_size()),
            rng.choice((16, 64, 256, 512)),
            replace=False,
        )
        size = int(math.exp(rng.uniform(math.log(8), math.log(min(128, length // 3)))))
        num_segments = rng.randint(1, max(1, length // (2 * size)))
        segments = draw.choice(alphabet, (num_segments, size)).astype(np.int32)
        num_repeats = -(-length // size) - num_segments
        repeated = segments | KEY_COPY << CLASS_SHIFT
        repeated[:, :NUM_LEAD_TOKENS] = segments[:, :NUM_LEAD_TOKENS]
        again = repeated[draw.integers(0, num_segments, num_repeats)]
        row[0] = self.bos
        row[1:] = np.concatenate([segments, again]).ravel()[: length - 1]

    def write(self, rng: random.Random, row: np.ndarray) -> None:
        """Fill `row` [length] int32 with one packed sequence (token | class << CLASS_SHIFT)."""
        length = len(row)
        head = [self.bos, *(t | FILLER << CLASS_SHIFT for t in self.fragment(nd.INTRO))]
        row[: len(head)] = head
        at = len(head)
        events = self.draw_events(rng, length - at)
        room = length - at - sum(len(tokens) for _, tokens in events)
        assert room >= 0, f"needles and questions overrun the sequence by {-room} tokens"
        num_sentences = len(self.starts) - 1
        first = rng.randrange(num_sentences - length)  # a sentence has at least one token
        last = int(np.searchsorted(self.starts, self.starts[first] + room, side="right")) - 1
        done = first
        for place, tokens in events:
            upto = max(done, first + int(place * (last - first) + 0.5))
            at = self._copy(row, at, done, upto)
            done = upto
            row[at : at + len(tokens)] = tokens
            at += len(tokens)
        at = self._copy(row, at, done, last)
        # What is left is shorter than a sentence: the cut beginning of the next one, without loss.
        start = int(self.starts[last])
        row[at:] = self.pool[start : start + length - at] & ((1 << CLASS_SHIFT) - 1)

    def _copy(self, row: np.ndarray, at: int, done: int, upto: int) -> int:
        start, stop = self.starts[done], self.starts[upto]
        row[at : at + stop - start] = self.pool[start:stop]
        return int(at + stop - start)

    def batch(
        self, rng: random.Random, num_sequences: int, length: int, repeat_share: float = 0.0
    ) -> np.ndarray:
        """[num_sequences, length] int32, packed; pass length + 1 to get inputs and targets."""
        rows = np.empty((num_sequences, length), dtype=np.int32)
        for row in rows:
            if rng.random() < repeat_share:
                self.write_repeats(rng, row)
            else:
                self.write(rng, row)
        return rows

    def check(self, lengths: tuple[int, ...], seed: int) -> None:
        """Prove that assembled tokens are what the tokenizer makes of the same text.

        Raises:
            ValueError: the vocabulary merges across pieces or splits digits badly.
        """
        rng = random.Random(f"check-{seed}")
        full_stop = self.fragment(nd.ANSWER_END)[0]
        for length in lengths:
            for row in self.batch(rng, 8, length) & ((1 << CLASS_SHIFT) - 1):
                tokens = row.tolist()
                cut = len(tokens) - tokens[::-1].index(full_stop)  # the tail may end inside a word
                text = self.tokenizer.decode(tokens[1:cut], skip_special_tokens=False)
                again = self.tokenizer.encode(text, add_special_tokens=False).ids
                if again != tokens[1:cut]:
                    raise ValueError(
                        f"assembled tokens differ from the tokenizer's for: {text[:300]!r}"
                    )


def produce(
    maker: SequenceMaker,
    seed: str,
    lengths: tuple[int, ...],
    batch_tokens: int,
    stage: Any,
    queue: multiprocessing.queues.Queue,
) -> None:
    """Worker process: batches of the current stage's length; a fifth is of earlier stages."""
    rng = random.Random(seed)
    while True:
        current = stage.value
        if current and rng.random() < 0.2:
            current = rng.randrange(current)
        length = lengths[current]
        repeat_share = REPEAT_SHARES[min(current, 1)]
        queue.put(maker.batch(rng, max(1, batch_tokens // length), length + 1, repeat_share))


def answer_runs(classes: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of each answer in classes [num_sequences, length]."""
    padded = np.pad(classes == ANSWER, ((0, 0), (1, 1))).astype(np.int8)
    edges = np.diff(padded, axis=1)
    for row in range(len(classes)):
        starts, stops = np.flatnonzero(edges[row] == 1), np.flatnonzero(edges[row] == -1)
        for start, stop in zip(starts, stops, strict=True):
            yield row, int(start), int(stop)
