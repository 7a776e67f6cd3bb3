"""Write calibration text for `echokv train`: needle documents with their answers.

    PYTHONPATH=. python examples/tiny_model/calibration.py --out calibration.txt

Documents are separated by the character U+001E. The seed differs from every seed the tests and
the demo use, so no document is one of their prompts.
"""

import argparse
from pathlib import Path

from echokv_vllm import needle

FIRST_SEED = 9_000


def documents(num_documents: int) -> list[str]:
    """Prompts of 300 to 2,000 tokens with 1 to 16 needles, each followed by its answer."""
    lengths = (300, 700, 1200, 2000)
    made = []
    for index in range(num_documents):
        length = lengths[index % len(lengths)]
        (prompt,) = needle.make_prompts(
            1, length, num_needles=((1, 4, 8)[index % 3] if length < 700 else 8 + index % 9,),
            seed=FIRST_SEED + index,
        )  # fmt: skip
        made.append(f"{prompt.text} {prompt.answer}{needle.ANSWER_END}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="text file to write")
    parser.add_argument("--documents", type=int, default=400)
    args = parser.parse_args()
    args.out.write_text("\x1e".join(documents(args.documents)), encoding="utf-8")


if __name__ == "__main__":
    main()
