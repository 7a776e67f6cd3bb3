"""Write calibration text for `echokv train`: needle documents with their answers.

    PYTHONPATH=. python examples/tiny_model/calibration.py --out calibration.txt

Documents are separated by the character U+001E. Least squares weighs every token alike, so the
text is dense in needles, and their values are numbers: digits are the hardest to copy. README.md
has what other texts gave. The seeds differ from those of the tests and the demo.
"""

import argparse
from pathlib import Path

from echokv_vllm import needle

FIRST_SEED = 9_000
LENGTHS = (500, 800, 1200, 1600)  # tokens
TOKENS_PER_NEEDLE = (22, 26, 30, 60)  # a needle takes about 14
VALUE_DIGITS = (6, 6, 5, 7)


def documents(num_documents: int) -> list[str]:
    """Prompts of all lengths and densities, each followed by its answer."""
    made = []
    for index in range(num_documents):
        length = LENGTHS[index % len(LENGTHS)]
        density = TOKENS_PER_NEEDLE[index // len(LENGTHS) % len(TOKENS_PER_NEEDLE)]
        (prompt,) = needle.make_prompts(
            1,
            length,
            num_needles=(length // density,),
            seed=FIRST_SEED + index,
            kind="number",
            value_digits=VALUE_DIGITS[index % len(VALUE_DIGITS)],
        )
        made.append(f"{prompt.text} {prompt.answer}{needle.ANSWER_END}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="text file to write")
    parser.add_argument("--documents", type=int, default=200)
    args = parser.parse_args()
    args.out.write_text("\x1e".join(documents(args.documents)), encoding="utf-8")


if __name__ == "__main__":
    main()
