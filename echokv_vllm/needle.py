"""Seeded needle-in-a-haystack prompts: text, expected answer and scoring.

A prompt is an introduction, a haystack of generated sentences with `key -> value` needles between
them, and one question whose last words invite the value:

    Remember the secrets hidden in this text. The old farmer carried the lamp to the harbor. ...
    The secret number of amber-falcon is 481273. ... In the evening the tall nurse ...
    Question: What is the secret number of amber-falcon?
    Answer: The secret number of amber-falcon is                     -> " 481273"

Value words and key words never occur in the haystack, and haystack numbers have at most two digits,
so the answer stands in the context exactly once. Only the standard library is used: the demo, the
tests and the trainer of the tiny model (`examples/tiny_model/train.py`) all build their text from
the templates here.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

INTRO = "Remember the secrets hidden in this text."
NEEDLE_TEMPLATE = " The secret {kind} of {key} is {value}."
QUESTION_TEMPLATE = "\nQuestion: What is the secret {kind} of {key}?"
ANSWER_TEMPLATE = "\nAnswer: The secret {kind} of {key} is"
# What follows the value in a well-formed answer; the tiny model then emits its end token.
ANSWER_END = "."

KINDS = ("number", "word")
MIN_VALUE_DIGITS, MAX_VALUE_DIGITS = 4, 7

KEY_ADJECTIVES = tuple(
    "amber bold calm dark eager faint gentle hollow icy jolly keen lucky misty noble odd "
    "pale quick rapid silent tame urban vivid warm young zesty brave crisp dusty early "
    "fancy golden humble".split()
)
KEY_NOUNS = tuple(
    "falcon river castle tiger engine mirror bridge candle dragon island jacket kitten "
    "lemon needle orange pencil rocket temple violin wagon zebra anchor basket carpet "
    "desert eagle guitar hammer jungle kettle ladder magnet".split()
)
VALUE_WORDS = tuple(
    "apple balloon camel diamond elbow feather garlic helmet insect jaguar koala lizard "
    "mango napkin oyster parrot quartz rabbit saddle tunnel unicorn velvet walnut xylem "
    "yogurt zipper acorn beaver cactus dolphin espresso fossil glacier honey ivory jasmine "
    "ketchup lotus marble nectar olive pepper quiver ribbon spider tulip uncle vulture "
    "willow yarn".split()
)

_PERSONS = (
    "farmer sailor nurse baker teacher painter pilot doctor miner singer driver clerk".split()
)
_QUALITIES = "old tall quiet tired happy clever lonely busy small heavy broken green".split()
_VERBS = (
    "carried found sold cleaned moved borrowed lost repaired watched painted hid washed".split()
)
_OBJECTS = "lamp table boat letter clock bottle chair coat drum map rope wheel".split()
_PLACES = (
    "to the harbor,near the mill,in the garden,behind the school,at the market,"
    "on the hill,by the lake,under the roof,across the road,in the kitchen,"
    "along the fence,at the station"
).split(",")
_TIMES = (
    "In the evening,At noon,After the storm,Before winter,On Monday,During the feast,"
    "Late at night,In the spring,Every week,Last summer"
).split(",")
_SENTENCES = (
    " The {quality} {person} {verb} the {object} {place}.",
    " {time} the {person} {verb} {count} things {place}.",
    " A {quality} {object} was left {place} by the {person}.",
    " {time} a {person} met {count} people {place}.",
    " Nobody knew why the {person} {verb} the {quality} {object}.",
    " The {person} and the {other} {verb} a {object} {place}.",
    " {time} the {object} stood {place}, {quality} and {second}.",
    " The {person} said that the {object} was {quality}.",
)


def haystack_sentence(rng: random.Random) -> str:
    """One filler sentence, with its leading space; holds no key word, value word or long number."""
    choose = rng.choice
    return choose(_SENTENCES).format(
        quality=choose(_QUALITIES),
        second=choose(_QUALITIES),
        person=choose(_PERSONS),
        other=choose(_PERSONS),
        verb=choose(_VERBS),
        object=choose(_OBJECTS),
        place=choose(_PLACES),
        time=choose(_TIMES),
        count=rng.randrange(2, 100),
    )


@dataclass(frozen=True)
class Needle:
    """One fact: `kind` is one of `KINDS`, `key` is `adjective-noun`, `value` digits or one word."""

    kind: str
    key: str
    value: str

    @property
    def sentence(self) -> str:
        """The fact as it stands in the haystack, with its leading space."""
        return NEEDLE_TEMPLATE.format(kind=self.kind, key=self.key, value=self.value)

    @property
    def question(self) -> str:
        """Question and answer prefix; the model is to go on with a space and the value."""
        return (QUESTION_TEMPLATE + ANSWER_TEMPLATE).format(kind=self.kind, key=self.key)


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt and what a model that retrieves must answer.

    Attributes:
        text: the whole prompt; ends with " is", so generation starts with a space.
        answer: the value to be found, without the leading space.
        needle: the fact that is asked for.
        needles: all facts of the haystack, in the order in which they stand in it.
        depth: where the asked fact stands, 0 (start of the haystack) to 1 (before the question).
        target_len: tokens (or estimated tokens) asked for.
        seed: the seed that made the prompt.
    """

    text: str
    answer: str
    needle: Needle
    needles: tuple[Needle, ...]
    depth: float
    target_len: int
    seed: int

    def is_correct(self, output: str) -> bool:
        """Whether the generated `output` (without the prompt) holds the answer."""
        return contains_answer(output, self.answer)


def contains_answer(output: str, answer: str) -> bool:
    """Whether `answer` stands in the first answer line of `output` as a whole word or number.

    Text after the first line break is ignored: a model that goes on with further questions of its
    own must not score by naming many values. A longer number that holds the digits does not count.
    """
    line = output.lstrip().split("\n", 1)[0]
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", line) is not None


def accuracy(outputs: Sequence[str], prompts: Sequence[NeedlePrompt]) -> float:
    """Share of correct outputs, 0 to 1.

    Raises:
        ValueError: the two lists differ in length or are empty.
    """
    if len(outputs) != len(prompts) or not prompts:
        raise ValueError(
            "accuracy needs one output per prompt and at least one prompt, "
            f"got {len(outputs)} outputs and {len(prompts)} prompts"
        )
    return sum(p.is_correct(o) for o, p in zip(outputs, prompts, strict=True)) / len(prompts)


def estimate_tokens(text: str) -> int:
    """Tokens of `text` without a tokenizer: one per word, punctuation mark, digit and line break.

    Exact for the tokenizer of the tiny model; others usually need a little less (they join digits).
    """
    numbers = len(re.findall(r" \d", text))  # a space before a digit is a token of its own
    return numbers + len(re.findall(r"[^\W\d]+|\d|[^\w\s]|\n", text))


def make_needles(
    rng: random.Random, num_needles: int, kind: str, value_digits: int
) -> list[Needle]:
    """`num_needles` facts with distinct keys and values; `kind` may also be "mixed"."""
    num_pairs = len(KEY_ADJECTIVES) * len(KEY_NOUNS)
    pairs = rng.sample(range(num_pairs), num_needles)
    words = rng.sample(VALUE_WORDS, len(VALUE_WORDS))
    numbers = rng.sample(range(10 ** (value_digits - 1), 10**value_digits), num_needles)
    needles = []
    for pair, number in zip(pairs, numbers, strict=True):
        key = f"{KEY_ADJECTIVES[pair // len(KEY_NOUNS)]}-{KEY_NOUNS[pair % len(KEY_NOUNS)]}"
        this_kind = rng.choice(KINDS) if kind == "mixed" and words else kind
        if this_kind == "mixed":
            this_kind = "number"
        needles.append(Needle(this_kind, key, words.pop() if this_kind == "word" else str(number)))
    return needles


def make_prompt(
    target_len: int,
    num_needles: int = 4,
    seed: int = 0,
    *,
    kind: str = "mixed",
    depth: float | None = None,
    value_digits: int = 6,
    count_tokens: Callable[[str], int] = estimate_tokens,
) -> NeedlePrompt:
    """Build one prompt of at most, and close to, `target_len` tokens.

    Args:
        target_len: tokens of the prompt, counted by `count_tokens`; a beginning-of-sequence token
            that the tokenizer adds is not included.
        num_needles: facts in the haystack, the asked one included.
        seed: same seed and arguments, same prompt.
        kind: "number", "word" or "mixed" (each fact draws its own).
        depth: place of the asked fact, 0 to 1; None draws it uniformly.
        value_digits: digits of number values.
        count_tokens: tokens of a piece of text; for an exact length pass
            `lambda s: len(tok.encode(s, add_special_tokens=False))`. Called once per sentence, so
            the sum is off by tokens that merge across sentences (none with the tiny model).

    Raises:
        ValueError: a parameter is out of range, or the needles do not fit into `target_len`.
    """
    _check_arguments(num_needles, kind, depth, value_digits)
    rng = random.Random(f"needle-{seed}")
    needles = make_needles(rng, num_needles, kind, value_digits)
    asked = needles[0]
    room = target_len - count_tokens(INTRO) - count_tokens(asked.question)
    room -= sum(count_tokens(needle.sentence) for needle in needles)
    if room < 0:
        raise ValueError(
            f"target_len={target_len} is too short for {num_needles} needles: {-room} more tokens "
            "are needed; raise target_len or lower num_needles"
        )
    hay: list[str] = []
    while True:
        sentence = haystack_sentence(rng)
        room -= count_tokens(sentence)
        if room < 0:
            break
        hay.append(sentence)

    asked_at = rng.randrange(len(hay) + 1) if depth is None else round(depth * len(hay))
    # Sorting by place alone is stable, so the asked needle comes first among equals. At depth 1 it
    # must be the last one instead: half a step moves it behind the needles of the same place.
    places = [(asked_at + (0.5 if depth == 1 else 0.0), asked)]
    places += [(float(rng.randrange(len(hay) + 1)), needle) for needle in needles[1:]]
    places.sort(key=lambda item: item[0])
    text = INTRO + _insert(hay, places) + asked.question
    return NeedlePrompt(
        text=text,
        answer=asked.value,
        needle=asked,
        needles=tuple(needle for _, needle in places),
        depth=asked_at / max(1, len(hay)),
        target_len=target_len,
        seed=seed,
    )


def make_prompts(
    num_prompts: int,
    target_len: int,
    num_needles: Iterable[int] = (1, 4, 8, 16),
    seed: int = 0,
    **options: Any,
) -> list[NeedlePrompt]:
    """`num_prompts` prompts that cycle through the needle counts; `options` go to `make_prompt`.

    Prompt i has the seed `seed * 1_000_000 + i`, so different seeds give disjoint sets.
    """
    counts = tuple(num_needles)
    if not counts:
        raise ValueError("num_needles is empty; give at least one needle count, for example (1, 4)")
    first = seed * 1_000_000
    return [
        make_prompt(target_len, counts[i % len(counts)], first + i, **options)
        for i in range(num_prompts)
    ]


def _insert(hay: Sequence[str], places: Sequence[tuple[float, Needle]]) -> str:
    """Join the sentences; a needle with place p stands right before sentence `int(p)`."""
    pieces: list[str] = []
    done = 0
    for place, needle in places:
        upto = min(len(hay), int(place))
        pieces += hay[done:upto]
        pieces.append(needle.sentence)
        done = upto
    return "".join(pieces) + "".join(hay[done:])


def _check_arguments(num_needles: int, kind: str, depth: float | None, value_digits: int) -> None:
    if kind not in (*KINDS, "mixed"):
        raise ValueError(f"kind={kind!r} is not known; use one of {(*KINDS, 'mixed')}")
    most = len(VALUE_WORDS) if kind == "word" else len(KEY_ADJECTIVES) * len(KEY_NOUNS)
    if not 1 <= num_needles <= most:
        raise ValueError(f"num_needles={num_needles} must be 1 to {most} for kind={kind!r}")
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth={depth} must be between 0 and 1, or None for a random place")
    if not MIN_VALUE_DIGITS <= value_digits <= MAX_VALUE_DIGITS:
        raise ValueError(
            f"value_digits={value_digits} must be {MIN_VALUE_DIGITS} to {MAX_VALUE_DIGITS}: "
            "shorter ones could stand in the haystack, the tiny model has not learned longer ones"
        )
