"""The baselines of `benchmarks/quality` on a small random model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import write_model

from echokv_vllm.eval.attention import CONTEXT, Window, install, make_context
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.rope import rotary_from_config

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"
# The benchmarks are scripts that import each other from their own folder.
sys.path.insert(0, str(FOLDER))


WINDOW = Window(3, 16)


class Bench:
    """A random model, its moments on random tokens, and sequences to measure on."""

    def __init__(self, folder: Path) -> None:
        from moments import collect

        self.folder = write_model(folder / "model")
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32
        ).eval()
        install(self.model)
        self.rotary = rotary_from_config(self.model.config)
        self.fingerprint = ModelFingerprint.from_config(self.model.config, self.folder)
        generator = torch.Generator().manual_seed(21)
        self.calibration = torch.randint(256, (6, 64), generator=generator).int()
        self.sequences = torch.randint(256, (3, 96), generator=generator).int()
        self.moments = collect(self.model, self.calibration, batch_size=3)

    def logits(self, cache: Any, window: Window = WINDOW, first_query: int = 0) -> Any:
        """Logits [batch, len, vocabulary] of one pass over `sequences`; None = full cache."""
        extra = {}
        if cache is not None:
            offsets = torch.arange(len(self.sequences))
            extra[CONTEXT] = make_context(cache, window, offsets, first_query)
        with torch.inference_mode():
            return self.model(input_ids=self.sequences.long(), use_cache=False, **extra).logits

    def error(self, cache: Any, **options: Any) -> float:
        """Mean KL to the full cache, over all tokens."""
        full, other = self.logits(None).log_softmax(-1), self.logits(cache, **options)
        return (full.exp() * (full - other.log_softmax(-1))).sum(-1).mean().item()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("quality"))
