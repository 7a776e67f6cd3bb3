"""Tiny random models and texts for the training tests; nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

VOCAB_SIZE = 300


def _tiny_model(
    architecture: str = "Llama", num_layers: int = 3, num_kv_heads: int = 4, **config: Any
) -> Any:
    torch.manual_seed(5)
    values: dict[str, Any] = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=2 * num_kv_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=8,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=257,
        sliding_window=None,
    )
    if architecture == "Llama":
        del values["sliding_window"]
    values.update(config)
    model = getattr(transformers, f"{architecture}ForCausalLM")(
        getattr(transformers, f"{architecture}Config")(**values)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("proj.bias"):
                parameter.normal_(0, 0.3)
    return model.eval()


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab.update({"<s>": 256, "</s>": 257})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Builds a random model: `tiny_model("Qwen3", num_layers=2, ...)`."""
    return _tiny_model


@pytest.fixture(scope="session")
def save_model() -> Callable[[Any, Path], str]:
    """Writes a model with a byte-level tokenizer into a folder and returns its path."""

    def save(model: Any, folder: Path) -> str:
        model.save_pretrained(folder)
        _write_tokenizer(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token per byte; bos 256, eos 257."""
    folder = tmp_path_factory.mktemp("tokenizer")
    _write_tokenizer(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, save_model: Any) -> str:
    """A tiny Llama on disk."""
    return save_model(_tiny_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text file of 40 random documents, about 8,000 bytes."""
    rng = random.Random(11)
    documents = ["".join(chr(rng.randrange(33, 127)) for _ in range(200)) for _ in range(40)]
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("\x1e".join(documents), encoding="utf-8")
    return str(path)
