"""Needle in a haystack: facts "special magic value of a key" hidden in text, some asked for."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from echokv_vllm.eval.tasks.haystack import NOISE, Material, place
from echokv_vllm.eval.tasks.prompt import largest_fit
from echokv_vllm.needle import KEY_ADJECTIVES, KEY_NOUNS

_VALUE_DIGITS = 7


@dataclass(frozen=True)
class _Niah:
    """One variant.

    Attributes:
        hay: `noise`, `essay`, or `needles` (the hay itself is made of facts about other keys).
        keys: `words` (adjective-noun) or `uuids`.
        values: `numbers` or `uuids`.
        num_keys: Facts' keys in the text, `needles` hay not counted.
        num_values: Values per key.
        num_queries: Keys that are asked for.
    """

    hay: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NIAH_TASKS: dict[str, _Niah] = {
    "niah_single_1": _Niah("noise"),
    "niah_single_2": _Niah("essay"),
    "niah_single_3": _Niah("essay", values="uuids"),
    "niah_multikey_1": _Niah("essay", num_keys=4),
    "niah_multikey_2": _Niah("needles"),
    "niah_multikey_3": _Niah("needles", keys="uuids", values="uuids"),
    "niah_multivalue": _Niah("essay", num_values=4),
    "niah_multiquery": _Niah("essay", num_keys=4, num_queries=4),
}


def niah_prompt(
    task: str,
    rng: random.Random,
    limit: int,
    material: Material,
    depth: float | None = None,
) -> tuple[str, tuple[str, ...]]:
    """Prompt of at most `limit` tokens and the asked values.

    Args:
        task: One of `NIAH_TASKS`.
        rng: Draws everything else.
        limit: Most tokens.
        material: Tokenizer and haystack text.
        depth: Where all needles stand, 0 (start of the hay) to 1; None draws it for each.

    Raises:
        TaskError: If the limit has no room for it.
    """
    variant = NIAH_TASKS[task]
    draw_key = _distinct(_SOURCES[variant.keys], rng)
    draw_value = _distinct(_SOURCES[variant.values], rng)
    facts = [
        (key, [draw_value() for _ in range(variant.num_values)])
        for key in [draw_key() for _ in range(variant.num_keys)]
    ]
    needles = [_fact(variant.values, key, value) for key, values in facts for value in values]
    depths = [rng.random() if depth is None else depth for _ in needles]
    asked = rng.sample(facts, variant.num_queries)
    opening, question = _wording(variant, [key for key, _ in asked])
    hay_seed = rng.random()
    others: list[str] = []

    def hay(count: int) -> list[str]:
        if variant.hay == "noise":
            return [NOISE] * count
        if variant.hay == "essay":
            return material.essay_sentences(random.Random(hay_seed), count)
        while len(others) < count:
            others.append(_fact(variant.values, draw_key(), draw_value()))
        return others[:count]

    text = largest_fit(
        lambda count: opening + place(hay(count), needles, depths) + question,
        material.count_tokens, limit, task,
    )  # fmt: skip
    return text, tuple(value for _, values in asked for value in values)


def _fact(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _wording(variant: _Niah, keys: list[str]) -> tuple[str, str]:
    """Opening and question of RULER, in the singular where one value is asked for."""
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if variant.num_values * variant.num_queries == 1:
        kind, some, are, be = variant.values[:-1], "A", "is", "is"
    else:
        kind, some, are, be = variant.values, "Some", "are", "are all"
    opening = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {kind} afterwards.\n"
    )
    question = (
        f"\nWhat {be} the special magic {kind} for {names} mentioned in the provided text? "
        f"The special magic {kind} for {names} mentioned in the provided text {are}"
    )
    return opening, question


def _word_key(rng: random.Random) -> str:
    return f"{rng.choice(KEY_ADJECTIVES)}-{rng.choice(KEY_NOUNS)}"


def _long_word_key(rng: random.Random) -> str:
    return f"{rng.choice(KEY_ADJECTIVES)}-{_word_key(rng)}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (_VALUE_DIGITS - 1), 10**_VALUE_DIGITS))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


# A kind's makers; a later one is used where the earlier have run out of distinct strings.
_SOURCES: dict[str, tuple[Callable[[random.Random], str], ...]] = {
    "words": (_word_key, _long_word_key),
    "numbers": (_number,),
    "uuids": (_uuid,),
}


def _distinct(
    makers: tuple[Callable[[random.Random], str], ...], rng: random.Random
) -> Callable[[], str]:
    """Draws strings that never repeat."""
    used: set[str] = set()

    def draw() -> str:
        for maker in makers:
            for _ in range(20):
                made = maker(rng)
                if made not in used:
                    used.add(made)
                    return made
        raise AssertionError(f"{len(used)} strings drawn and no new one found")

    return draw
