"""Random models that behave unlike noise, and checkpoints for them; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from echokv_vllm.checkpoint import EchoCheckpoint, LayerMaps
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.plan import EchoPlan
from echokv_vllm.presets import load_plan

VOCAB = 260


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with 256 byte tokens and four special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab.update({"<s>": 256, "</s>": 257, "<pad>": 258, "<x>": 259})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_model(
    folder: Path,
    *,
    num_layers: int = 4,
    num_kv_heads: int = 4,
    max_len: int = 2048,
    seed: int = 1,
    architecture: str = "Llama",
    **config: Any,
) -> Path:
    """A random grouped-query model whose attention matters: logits are peaked and vary."""
    import transformers

    torch.manual_seed(seed)
    values = dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=num_layers,
        num_attention_heads=2 * num_kv_heads, num_key_value_heads=num_kv_heads, head_dim=32,
        vocab_size=VOCAB, max_position_embeddings=max_len, bos_token_id=256, eos_token_id=257,
        tie_word_embeddings=False,
    )  # fmt: skip
    values.update(config)
    config_class = getattr(transformers, f"{architecture}Config")
    model = getattr(transformers, f"{architecture}ForCausalLM")(config_class(**values))
    scales = {
        "embed": 1.0, "q_proj": 0.16, "k_proj": 0.16, "v_proj": 0.14, "o_proj": 0.14,
        "lm_head": 0.3,
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                known = [scale for part, scale in scales.items() if part in name]
                parameter.normal_(0, known[0] if known else 0.06)
    model.to(torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_checkpoint(
    folder: Path,
    model: Path,
    plan: str | EchoPlan = "local-0.5",
    *,
    rotation_block: int = 64,
    recent_tokens: int = 128,
    bias: bool = False,
    shards: int = 1,
    seed: int = 7,
) -> Path:
    """Random maps of a plan: they change the output a lot, which is what the tests need."""
    from transformers import AutoConfig

    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model), model)
    if isinstance(plan, str):
        plan = load_plan(plan, fingerprint.num_layers, fingerprint.num_kv_heads, shards)
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for layer in range(plan.num_layers):
        num_discarded = len(plan.discarded(layer))
        if not num_discarded:
            continue
        width = len(plan.source_heads(layer, 0)) * fingerprint.head_dim
        shape = (num_discarded, width, fingerprint.head_dim)

        def draw(*size: int, scale: float) -> torch.Tensor:
            return torch.randn(size, generator=generator) * scale

        biases = (
            [draw(num_discarded, fingerprint.head_dim, scale=0.5) for _ in range(2)] if bias else []
        )
        maps[layer] = LayerMaps(
            draw(*shape, scale=width**-0.5), draw(*shape, scale=width**-0.5), *biases
        )
    EchoCheckpoint(
        plan=plan,
        rotation_block=rotation_block,
        maps=maps,
        fingerprint=fingerprint,
        recent_tokens=recent_tokens,
        provenance={"command": "tests"},
    ).save(folder)
    return folder
