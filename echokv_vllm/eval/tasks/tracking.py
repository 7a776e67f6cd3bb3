"""Variable tracking: a chain of assignments hidden in noise; which variables hold the value?"""

from __future__ import annotations

import random
import string
from itertools import pairwise

from echokv_vllm.eval.tasks.haystack import NOISE, Material, place
from echokv_vllm.eval.tasks.prompt import largest_fit

_NUM_HOPS = 4
_NAME_LETTERS = 5


def tracking_prompt(
    rng: random.Random, limit: int, material: Material
) -> tuple[str, tuple[str, ...]]:
    """Prompt of at most `limit` tokens and the five variables of the chain.

    Raises:
        TaskError: If the limit has no room for it.
    """
    names: list[str] = []
    while len(names) <= _NUM_HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=_NAME_LETTERS))
        if name not in names:
            names.append(name)
    value = rng.randrange(10_000, 100_000)
    links = [f"VAR {names[0]} = {value}."]
    links += [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
    # An assignment must come after the one it refers to.
    depths = sorted(rng.random() for _ in links)
    opening = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    )
    question = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    text = largest_fit(
        lambda count: opening + place([NOISE] * count, links, depths) + question,
        material.count_tokens, limit, "vt",
    )  # fmt: skip
    return text, tuple(names)
