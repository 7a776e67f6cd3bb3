"""Aggregation: the ten most common words of a list, the three most frequent words of a code."""

from __future__ import annotations

import random
import string

from echokv_vllm.eval.tasks.haystack import Material
from echokv_vllm.eval.tasks.prompt import largest_fit
from echokv_vllm.needle import KEY_ADJECTIVES, KEY_NOUNS, VALUE_WORDS

_NUM_COMMON = 10
# (repetitions of a common word, of any other); RULER's are the first, a short length takes less.
_REPETITIONS = ((30, 3), (20, 2), (10, 1), (5, 1))
_NUM_SHORT = 2000  # of about 2,900 two-part words
# The common words may fill at most this share of the prompt.
_COMMON_SHARE = 0.75

_CODE_LETTERS = 6
_CODE_WORDS = 500
_ZETA_2 = 1.6449340668  # sum of 1/k^2
_FEWEST_DRAWS = 150  # from here on ranks 4 and 5 differ in count

_CWE_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words "
    "that appear most often in the list are:"
)
_FWE_OPENING = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. "
)
_FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded "
    "text above, the three most frequently appeared words are:"
)


def common_words_prompt(
    rng: random.Random, limit: int, material: Material
) -> tuple[str, tuple[str, ...]]:
    """`cwe`: prompt of at most `limit` tokens and the ten common words.

    Raises:
        TaskError: If the limit has no room for it.
    """
    seed = rng.random()
    words = _Compounds(rng)
    common = [words[index] for index in range(_NUM_COMMON)]

    def build(num_others: int, often: int, seldom: int) -> str:
        others = [words[_NUM_COMMON + index] for index in range(num_others)]
        entries = common * often + others * seldom
        random.Random(seed).shuffle(entries)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))
        return _CWE_OPENING + listed + _CWE_QUESTION

    for often, seldom in _REPETITIONS:
        if material.count_tokens(build(0, often, seldom)) <= _COMMON_SHARE * limit:
            break
    text = largest_fit(
        lambda count: build(count, often, seldom), material.count_tokens, limit, "cwe", fewest=1
    )
    return text, tuple(common)


def frequent_words_prompt(
    rng: random.Random, limit: int, material: Material
) -> tuple[str, tuple[str, ...]]:
    """`fwe`: prompt of at most `limit` tokens and the three most frequent coded words.

    The word of rank k occurs about `n / (zeta(2) k^2)` times; rank 1 is written as dots, which the
    question asks to ignore, so that the answers are ranks 2 to 4.

    Raises:
        TaskError: If the limit has no room for it.
    """
    seed = rng.random()
    coded: list[str] = []
    while len(coded) < _CODE_WORDS:
        word = "".join(rng.choices(string.ascii_lowercase, k=_CODE_LETTERS))
        if word not in coded:
            coded.append(word)

    def build(num_draws: int) -> str:
        entries: list[str] = []
        for rank, word in enumerate(["....", *coded], start=1):
            entries += [word] * round(num_draws / (_ZETA_2 * rank**2))
        random.Random(seed).shuffle(entries)
        return _FWE_OPENING + " ".join(entries) + _FWE_QUESTION

    text = largest_fit(build, material.count_tokens, limit, "fwe", fewest=_FEWEST_DRAWS)
    return text, tuple(coded[:3])


class _Compounds:
    """Endless list of distinct made-up words, such as `ambertiger`; none is a part of another."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._words: list[str] = []
        self._used: set[str] = set()

    def __getitem__(self, index: int) -> str:
        while len(self._words) <= index:
            choose = self._rng.choice
            if len(self._words) < _NUM_SHORT:
                word = choose(KEY_ADJECTIVES) + choose(KEY_NOUNS + VALUE_WORDS)
            else:
                # No adjective stands before a noun here, so no short word is inside.
                word = choose(KEY_NOUNS) + choose(VALUE_WORDS) + choose(KEY_ADJECTIVES)
            if word not in self._used:
                self._used.add(word)
                self._words.append(word)
        return self._words[index]
