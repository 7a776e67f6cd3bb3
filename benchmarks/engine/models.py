"""The benchmark's model: a Llama folder without weights, and a random EchoKV checkpoint for it.

    python benchmarks/engine/models.py FOLDER [--shape 70b] [--shards 4] [--plan local-0.5]
        [--rotation-block 64]

writes FOLDER/model (config and byte tokenizer, for `load_format="dummy"`) and FOLDER/echokv. Speed
depends on shapes alone, so nothing is downloaded. Maps are random and small.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from echokv_vllm.checkpoint import EchoCheckpoint, LayerMaps
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.presets import load_plan

# The tokenizer's 256 bytes and 4 special tokens. Both backends share the output projection and the
# sampler; leaving a large one out makes differences of the attention show more clearly.
VOCAB_SIZE = 260

# Llama-3.1-8B, whose vocabulary would be 128256.
LLAMA_8B: dict[str, Any] = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
# Llama-3.1-70B; of four tensor-parallel ranks, each has 16 query heads and two KV heads.
LLAMA_70B: dict[str, Any] = dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
TINY: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32,
)  # fmt: skip

SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B, "tiny": TINY}


def write_model(folder: Path, shape: dict[str, Any], vocab_size: int = VOCAB_SIZE) -> Path:
    """Writes the config and the tokenizer of a Llama of ``shape``; no weights.

    Args:
        folder: Created when missing.
        shape: One of ``SHAPES`` or other arguments of ``LlamaConfig``.
        vocab_size: Rows of the embedding and the output projection, at least 260.

    Raises:
        ValueError: The vocabulary is smaller than the tokenizer's.
    """
    if vocab_size < VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} must be at least {VOCAB_SIZE}, the tokenizer's")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab.update({"<s>": 256, "</s>": 257, "<pad>": 258, "<x>": 259})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    rope = dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=8192,
    )  # fmt: skip
    config = LlamaConfig(
        **shape, rope_parameters=rope, vocab_size=vocab_size, max_position_embeddings=131072,
        bos_token_id=256, eos_token_id=257, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def write_checkpoint(
    folder: Path, model: Path, plan_name: str, rotation_block: int, shards: int = 1, seed: int = 0
) -> Path:
    """Writes random bfloat16 maps of a preset.

    Args:
        folder: Must not hold a checkpoint yet.
        model: Model folder; it has no weights, so the fingerprint's weight hash is None.
        plan_name: Preset name or plan file.
        rotation_block: Tokens per rotation block, 1 for un-rotated keys.
        shards: Tensor-parallel ranks that the plan can be served with.
        seed: Seed of the maps.
    """
    from transformers import AutoConfig

    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model), model)
    plan = load_plan(plan_name, fingerprint.num_layers, fingerprint.num_kv_heads, shards)
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for layer in range(plan.num_layers):
        num_discarded = len(plan.discarded(layer))
        if not num_discarded:
            continue
        feature_size = len(plan.source_heads(layer, 0)) * fingerprint.head_dim
        shape = (2, num_discarded, feature_size, fingerprint.head_dim)
        # Rebuilt heads as large as retained ones, as with trained maps.
        key, value = (torch.randn(shape, generator=generator) * feature_size**-0.5).bfloat16()
        maps[layer] = LayerMaps(key, value)
    EchoCheckpoint(
        plan=plan,
        rotation_block=rotation_block,
        maps=maps,
        fingerprint=fingerprint,
        provenance={"command": "benchmarks/engine/models.py"},
    ).save(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="tiny is for a CPU")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--shards", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--plan", default="local-0.5", help="preset name or plan file")
    parser.add_argument("--rotation-block", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    args = parser.parse_args()
    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    model = write_model(args.folder / "model", shape, args.vocab_size)
    checkpoint = write_checkpoint(
        args.folder / "echokv", model, args.plan, args.rotation_block, args.shards
    )
    print(json.dumps({"model": str(model), "checkpoint": str(checkpoint)}))


if __name__ == "__main__":
    main()
