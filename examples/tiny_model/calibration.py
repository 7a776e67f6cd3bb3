"""Write calibration text for `echokv train`: needle documents with their answers.

    PYTHONPATH=. python examples/tiny_model/calibration.py --out calibration.txt

Documents are separated by the character U+001E. Least squares weighs every token alike, so the
text is dense in needles: with the sparse prompts of the demo (one needle in a hundred tokens) the
maps fit the haystack and 44 of 48 compressed answers were right instead of 48.
The seeds differ from those of the tests and the demo, so no document is one of their prompts.
"""

import argparse
from pathlib import Path

from echokv_vllm import needle

FIRST_SEED = 9_000
LENGTHS = (500, 800, 1200, 1600)  # tokens
TOKENS_PER_NEEDLE = (22, 30, 60, 200)  # a needle takes about 14


def documents(num_documents: int) -> list[str]:
    """Prompts of all lengths and densities, each followed by its answer."""
    made = []
    for index in range(num_documents):
        length = LENGTHS[index % len(LENGTHS)]
        density = TOKENS_PER_NEEDLE[index // len(LENGTHS) % len(TOKENS_PER_NEEDLE)]
        (prompt,) = needle.make_prompts(
            1, length, num_needles=(length // density,), seed=FIRST_SEED + index
        )
        made.append(f"{prompt.text} {prompt.answer}{needle.ANSWER_END}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="text file to write")
    parser.add_argument("--documents", type=int, default=160)
    args = parser.parse_args()
    args.out.write_text("\x1e".join(documents(args.documents)), encoding="utf-8")


if __name__ == "__main__":
    main()
