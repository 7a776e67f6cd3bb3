"""Tokenizers that transformers hands out in other forms."""

from __future__ import annotations

import shutil
from pathlib import Path

import mistral_common
import pytest
from transformers import AutoTokenizer, MistralConfig

from echokv_vllm.train.data import load_tokens
from echokv_vllm.train.model import load_tokenizer

_TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"


@pytest.mark.slow
@pytest.mark.parametrize("with_hugging_face_files", [False, True])
def test_chat_format_of_a_mistral_is_special_tokens(tmp_path, with_hugging_face_files):
    """vLLM installs mistral-common, whose tokenizer reads `[INST]` in a text as plain letters."""
    folder = tmp_path / "model"
    MistralConfig(architectures=["MistralForCausalLM"]).save_pretrained(folder)
    shutil.copy(_TEKKEN, folder / "tekken.json")
    native = AutoTokenizer.from_pretrained(folder)
    assert type(native).__name__ == "MistralCommonBackend", "load_tokenizer can do without"
    if with_hugging_face_files:
        load_tokenizer(str(folder), parse_special=True).save_pretrained(folder)
    path = tmp_path / "chat.txt"
    path.write_text("[INST]hello you[/INST]")
    tokenizer = load_tokenizer(str(folder), parse_special=True)
    found = load_tokens(str(path), tokenizer, 3, 6).sequences.flatten().tolist()
    # bos, [INST], two words, [/INST], eos
    assert [found[0], found[1], found[4], found[5]] == [1, 3, 4, 2]
