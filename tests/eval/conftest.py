"""Tiny random models with loaded maps for the evaluation tests; nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import write_checkpoint, write_model

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.eval.attention import CONTEXT, EchoContext, Window, install
from echokv_vllm.eval.rebuild import HeadRebuilder
from echokv_vllm.rope import rotary_from_config


class Subject:
    """A model on disk and in memory, with its checkpoint."""

    def __init__(self, folder: Path, model: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        self.model_folder = write_model(folder / "model", **model)
        self.checkpoint_folder = write_checkpoint(
            folder / "checkpoint", self.model_folder, **checkpoint
        )
        self.checkpoint = EchoCheckpoint.load(self.checkpoint_folder)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            self.model_folder, dtype=torch.float32
        ).eval()
        install(self.model)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.model_folder)
        self.rebuilder = self.rebuilder_of(self.checkpoint)

    def rebuilder_of(self, checkpoint: EchoCheckpoint) -> HeadRebuilder:
        return HeadRebuilder(checkpoint, rotary_from_config(self.model.config), "cpu")

    def compressed_logits(
        self, ids: torch.Tensor, offsets: torch.Tensor, window: Window, first_query: int = 0
    ) -> torch.Tensor:
        """Logits of one compressed pass over `ids` [batch, len]."""
        context = EchoContext(self.rebuilder, window, offsets, first_query)
        with torch.inference_mode():
            return self.model(input_ids=ids, use_cache=False, **{CONTEXT: context}).logits


@pytest.fixture
def make_subject(tmp_path: Path) -> Callable[..., Subject]:
    """Builds a subject: `make_subject(model={...}, checkpoint={...})`."""

    def make(model: dict[str, Any], checkpoint: dict[str, Any]) -> Subject:
        return Subject(tmp_path, model, checkpoint)

    return make


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A Llama with `local-0.5` maps in blocks of 8 tokens."""
    return Subject(
        tmp_path_factory.mktemp("subject"), {}, {"rotation_block": 8, "recent_tokens": 8}
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Held-out text: 30 random documents, 6,000 bytes."""
    rng = random.Random(12)
    documents = ["".join(chr(rng.randrange(33, 127)) for _ in range(200)) for _ in range(30)]
    path = tmp_path_factory.mktemp("data") / "heldout.txt"
    path.write_text("\x1e".join(documents), encoding="utf-8")
    return str(path)
