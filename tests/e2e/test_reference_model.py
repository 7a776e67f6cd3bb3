"""Needle accuracy of the shared reference model over HTTP: compressed against full.

The model retrieves in RULER's wording only. Its checkpoint is trained here, in closed form, on the
shared calibration text.
"""

import asyncio
import lzma
import random
from pathlib import Path

import pytest

from echokv_vllm.demo.scenario import ask
from echokv_vllm.demo.server import Server
from echokv_vllm.needle import KEY_ADJECTIVES, KEY_NOUNS, Needle, NeedlePrompt
from echokv_vllm.train import TrainOptions, train

pytestmark = pytest.mark.nightly

NUM_PROMPTS = 40
HAY_CHARACTERS = 3600  # about 1,000 tokens of essay text
OPENING = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)


def ruler_prompt(essays: str, seed: int) -> NeedlePrompt:
    """A RULER niah_multikey prompt with four keys in essay text."""
    source = random.Random(f"ruler-{seed}")
    pairs = source.sample(range(len(KEY_ADJECTIVES) * len(KEY_NOUNS)), 4)
    keys = [f"{KEY_ADJECTIVES[p // len(KEY_NOUNS)]}-{KEY_NOUNS[p % len(KEY_NOUNS)]}" for p in pairs]
    needles = [Needle("number", key, str(source.randrange(10**6, 10**7))) for key in keys]
    start = source.randrange(len(essays) - HAY_CHARACTERS)
    hay = essays[start : start + HAY_CHARACTERS].split(" ")
    for needle in needles:
        sentence = f"One of the special magic numbers for {needle.key} is: {needle.value}."
        hay.insert(source.randrange(len(hay)), sentence)
    asked = source.choice(needles)
    text = OPENING + " ".join(hay) + QUESTION.format(key=asked.key)
    return NeedlePrompt(text, asked.value, asked, tuple(needles), 0.0, 1000, seed)


@pytest.fixture(scope="module")
def checkpoint(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "checkpoint"
    train(
        TrainOptions(
            model=str(shared_dir / "ref_model"),
            plan="local-0.5",
            data=str(shared_dir / "data" / "calibration.txt.xz"),
            out=str(folder),
            num_tokens=300_000,
            progress=False,
        )
    )
    return folder


def test_compressed_answers_are_within_three_points_of_full(
    shared_dir: Path, checkpoint: Path, tmp_path: Path
) -> None:
    with lzma.open(shared_dir / "data" / "essays.txt.xz", "rt", encoding="utf-8") as file:
        essays = file.read()
    prompts = [ruler_prompt(" ".join(essays.split()), seed) for seed in range(NUM_PROMPTS)]
    with Server(
        str(shared_dir / "ref_model"), tmp_path / "server.log", str(checkpoint),
        max_model_len=2048, max_num_seqs=8, dtype="float32", enforce_eager=True,
    ) as server:  # fmt: skip
        full, compressed = (asyncio.run(ask(server, prompts, m)) for m in ("full", "compressed"))
    print(f"full {full}/{NUM_PROMPTS}, compressed {compressed}/{NUM_PROMPTS}")
    assert full >= 0.5 * NUM_PROMPTS, "the model must retrieve for the comparison to mean anything"
    assert compressed >= full - 0.03 * NUM_PROMPTS
