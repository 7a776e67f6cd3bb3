"""Models and checkpoints of the engine tests, each written once per session."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines  # noqa: F401  sets vLLM's environment, so it must come before vLLM
import pytest
from tiny_models import write_checkpoint, write_model


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model_of(**options)`` is the folder of the random model with these options."""
    made: dict[str, Path] = {}

    def folder_of(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp("model") / "m", **options)
        return made[key]

    return folder_of


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint_of(model, plan, **options)`` is the folder of a random checkpoint."""
    made: dict[str, Path] = {}

    def folder_of(model: Path, plan: Any = "local-0.5", **options: Any) -> Path:
        key = repr((model, plan, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / "c"
            made[key] = write_checkpoint(folder, model, plan, **options)
        return made[key]

    return folder_of


@pytest.fixture(scope="session")
def prompt_of() -> Callable[[int, int], list[int]]:
    """``prompt_of(length, seed)``: random bytes, the same on every call."""

    def tokens_of(length: int, seed: int = 0) -> list[int]:
        source = random.Random(f"{seed}/{length}")
        return [source.randrange(255) for _ in range(length)]

    return tokens_of
