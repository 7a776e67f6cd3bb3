"""Train the tiny Llama that answers needle questions at up to 2k tokens (one GPU, a few minutes).

    PYTHONPATH=. python examples/tiny_model/train.py --minutes 5 --out /some/folder

Needs torch, transformers and tokenizers; no network and no data set. `--minutes` is wall-clock time
from the start of the program to the end of training; saving and the final evaluation come on top
(under a minute on a GPU). The learning rate and the sequence-length curriculum follow the clock.
"""

import argparse
import json
import math
import multiprocessing as mp
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

# Worker processes are forked; the tokenizer's own threads must not exist by then.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import needle_batches as nb
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from evaluate import EVAL_LENGTHS, evaluate, print_table
from transformers import LlamaConfig, LlamaForCausalLM

# A stage of the curriculum ends when the held-out accuracy reaches this, or at its share of time.
STAGE_DONE = 0.95
FIRST_STAGE_SHARE, LATER_STAGE_SHARE = 0.45, 0.15
WARMUP_STEPS = 100
DECAY_FROM, FINAL_LR_SHARE = 0.5, 0.02
LOG_SECONDS = 10.0
SAVE_SECONDS = 60.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="wall clock, start to end of training"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model (created)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument(
        "--lengths", default="256,1024,2304", help="sequence length of each stage, in tokens"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=131072, help="tokens per optimizer step"
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=448)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=896)
    parser.add_argument(
        "--pool-sentences", type=int, default=50_000, help="distinct haystack sentences"
    )
    parser.add_argument(
        "--eval-prompts", type=int, default=200, help="fresh prompts per evaluated length"
    )
    parser.add_argument("--eval-lengths", default=",".join(map(str, EVAL_LENGTHS)))
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    args = parser.parse_args()
    for name in ("lengths", "eval_lengths"):
        values = tuple(int(part) for part in getattr(args, name).split(","))
        if min(values) < 96:
            parser.error(
                f"--{name.replace('_', '-')}: {min(values)} is too short, use at least 96 tokens"
            )
        setattr(args, name, values)
    if args.batch_tokens < max(args.lengths):
        parser.error(
            f"--batch-tokens {args.batch_tokens} must hold a sequence of {max(args.lengths)}"
        )
    return args


def build_model(
    args: argparse.Namespace, vocab_size: int, maker: nb.SequenceMaker
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=maker.bos,
        eos_token_id=maker.eos,
        pad_token_id=maker.eos,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    # Transformers' 0.02 is meant for wide models. Layers that write to the residual stream start
    # smaller.
    deviation = 0.5 / math.sqrt(args.hidden_size)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(
                weight, 0.0, deviation / (math.sqrt(2 * args.layers) if writes else 1.0)
            )
    return model


def token_losses(
    hidden: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy [num_tokens] fp32 and whether the greedy choice is right [num_tokens] bool."""
    logits = F.linear(hidden.flatten(0, 1), embedding.to(hidden.dtype)).float()
    flat = targets.flatten()
    return F.cross_entropy(logits, flat, reduction="none"), logits.argmax(-1) == flat


@dataclass
class Trainer:
    """The model with its fast forward pass (no padding, no cache, causal attention only)."""

    model: LlamaForCausalLM
    device: torch.device
    compiled: bool = False
    losses: Callable[..., tuple[torch.Tensor, torch.Tensor]] = token_losses
    weights: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.nn.Module.to(self.model, self.device)
        self.weights = torch.tensor(nb.CLASS_WEIGHTS, device=self.device)

    def autocast(self) -> AbstractContextManager:
        on_gpu = self.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Final states [num_sequences, length, hidden_size] of tokens [num_sequences, length]."""
        body = self.model.model
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cuda") else torch.float32
        hidden = body.embed_tokens(tokens).to(dtype)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rotary = body.rotary_emb(hidden, positions)
        for layer in body.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return body.norm(hidden).to(dtype)

    def forward(self, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weighted loss, mean answer loss (scalars) and greedy hits [num_sequences, length]."""
        packed = torch.from_numpy(batch)
        if self.device.type == "cuda":  # pageable memory would make each step wait for the last
            packed = packed.pin_memory()
        packed = packed.to(self.device, non_blocking=True)
        tokens = (packed & ((1 << nb.CLASS_SHIFT) - 1)).long()
        classes = (packed[:, 1:] >> nb.CLASS_SHIFT).long()
        with self.autocast():
            hidden = self.hidden_states(tokens[:, :-1])
            losses, hits = self.losses(hidden, self.model.model.embed_tokens.weight, tokens[:, 1:])
        weights = self.weights[classes].flatten()
        asked = (classes == nb.ANSWER).flatten()
        loss = (losses * weights).sum() / weights.sum()
        answer_loss = (losses.detach() * asked).sum() / asked.sum().clamp(min=1)
        return loss, answer_loss, hits.view_as(classes)

    def check_forward(self, batch: np.ndarray) -> None:
        """The fast pass must equal transformers' own forward, whose inner signatures may change."""
        tokens = (
            torch.from_numpy(batch[:2, :64] & ((1 << nb.CLASS_SHIFT) - 1)).long().to(self.device)
        )
        with torch.no_grad():
            ours = F.linear(self.hidden_states(tokens), self.model.model.embed_tokens.weight)
            theirs = self.model(input_ids=tokens, use_cache=False).logits
        # fp32 matrix products may run in TF32 (10 bits of mantissa).
        error, limit = (ours - theirs).abs().max().item(), 0.02 * theirs.abs().max().item()
        if error > limit:
            raise RuntimeError(
                f"the training forward pass differs from LlamaForCausalLM by {error:.3g} (allowed "
                f"{limit:.3g}); adapt Trainer.hidden_states to this version of transformers "
                f"({transformers.__version__})"
            )

    def compile(self, batches: list[np.ndarray]) -> None:
        """Compile the layers for the shapes of `batches`; on failure say so and go on without."""
        begin = time.time()
        try:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self.losses = torch.compile(token_losses, dynamic=False)
            for batch in batches:
                self.forward(batch)[0].backward()
            self.compiled = True
        except (
            RuntimeError,
            ImportError,
            OSError,
            AttributeError,
            TypeError,
            subprocess.SubprocessError,
        ) as error:
            print(
                "WARNING: torch.compile FAILED, training goes on UNCOMPILED (slower): "
                f"{error!r:.2000}",
                flush=True,
            )
            for layer in self.model.model.layers:
                layer._compiled_call_impl = None
            self.losses = token_losses
        self.model.zero_grad(set_to_none=True)
        print(f"compiled={self.compiled} in {time.time() - begin:.0f} s", flush=True)

    def exact_match(self, batch: np.ndarray) -> float:
        """Share of answers whose every token is the greedy choice, as generation would give.

        Gradients stay on: the same compiled graph as in training is used.
        """
        hits = self.forward(batch)[2].cpu().numpy()
        runs = list(nb.answer_runs(batch[:, 1:] >> nb.CLASS_SHIFT))
        return sum(bool(hits[row, start:stop].all()) for row, start, stop in runs) / max(
            1, len(runs)
        )


def save_model(model: LlamaForCausalLM, maker: nb.SequenceMaker, folder: Path) -> None:
    """bf16 weights, configuration and tokenizer in Hugging Face format."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict({name: value.detach().cpu() for name, value in model.state_dict().items()})
    torch.nn.Module.to(copy, torch.bfloat16)
    copy.save_pretrained(folder)
    nb.save_tokenizer(maker.tokenizer, folder, model.config.max_position_embeddings)


def learning_rate_share(step: int, elapsed_share: float) -> float:
    decay = 1.0
    if elapsed_share > DECAY_FROM:
        decay = 1.0 - (elapsed_share - DECAY_FROM) / (1.0 - DECAY_FROM) * (1.0 - FINAL_LR_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(FINAL_LR_SHARE, decay)


def build_optimizer(model: LlamaForCausalLM, lr: float, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, 0.98), eps=1e-9, fused=device.type == "cuda"
    )


def next_batch(queue: Any) -> np.ndarray:
    """A batch [num_sequences, length + 1] of any trained length.

    Raises:
        RuntimeError: no worker delivers any more.
    """
    try:
        return queue.get(timeout=60)
    except Empty as error:
        raise RuntimeError("no training batch within 60 s: the worker processes failed") from error


def train(
    trainer: Trainer,
    maker: nb.SequenceMaker,
    args: argparse.Namespace,
    deadline: float,
    queue: Any,
    stage: Any,
) -> dict:
    """Run until `deadline`; returns what the provenance file says about the training."""
    model, lengths = trainer.model, args.lengths
    held_out = []
    for length in lengths:
        rng = random.Random(f"held-out-{args.seed}-{length}")
        held_out.append(maker.batch(rng, max(1, args.batch_tokens // length), length + 1))
    trainer.check_forward(held_out[0])
    if not args.no_compile:
        trainer.compile(held_out)
    optimizer = build_optimizer(model, args.lr, trainer.device)
    begin = logged = saved = time.time()
    share = lambda: (time.time() - begin) / max(1e-9, deadline - begin)  # noqa: E731
    step = num_tokens = logged_tokens = 0
    while time.time() < deadline:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_share(step, share())
        batch = next_batch(queue)
        loss, answer_loss, _ = trainer.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        num_tokens += batch.shape[0] * (batch.shape[1] - 1)
        now = time.time()
        if now - logged < LOG_SECONDS:
            continue
        accuracy = trainer.exact_match(held_out[stage.value])
        longest = trainer.exact_match(held_out[-1])
        print(
            f"step {step} {now - begin:.0f}s len {lengths[stage.value]} "
            f"tokens {num_tokens / 1e6:.1f}M "
            f"{(num_tokens - logged_tokens) / (now - logged) / 1e3:.0f}k/s queue {queue.qsize()} "
            f"lr {optimizer.param_groups[0]['lr']:.1e} loss {loss.item():.3f} "
            f"answer loss {answer_loss.item():.3f} "
            f"held-out exact {accuracy:.3f} (at {lengths[-1]}: {longest:.3f})",
            flush=True,
        )
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}; lower --lr ({args.lr})")
        logged, logged_tokens = time.time(), num_tokens
        limit = FIRST_STAGE_SHARE + LATER_STAGE_SHARE * stage.value
        if stage.value + 1 < len(lengths) and (accuracy >= STAGE_DONE or share() > limit):
            stage.value += 1
            print(
                f"curriculum: sequences of {lengths[stage.value]} tokens from step {step}",
                flush=True,
            )
        if time.time() - saved > SAVE_SECONDS:
            save_model(model, maker, args.out)
            saved = time.time()
    minutes = (time.time() - begin) / 60
    return {
        "steps": step,
        "tokens": num_tokens,
        "minutes": round(minutes, 2),
        "compiled": trainer.compiled,
    }


def write_provenance(
    args: argparse.Namespace, trained: dict, rows: list[dict], device: torch.device
) -> None:
    command = [Path(sys.executable).name, *sys.argv]
    record = {
        "command": " ".join("OUT" if part == str(args.out) else part for part in command),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seed": args.seed,
        "lengths": args.lengths,
        "batch_tokens": args.batch_tokens,
        "learning_rate": args.lr,
        "training": trained,
        "exact_match": rows,
    }
    (args.out / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    deadline_from = time.time()
    args = parse_arguments()
    deadline = deadline_from + args.minutes * 60
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    maker = nb.SequenceMaker(
        nb.train_tokenizer(args.vocab_size, args.seed), args.pool_sentences, args.seed
    )
    maker.check(args.lengths, args.seed)

    # Fork before the GPU is touched: a forked process cannot use it.
    context = mp.get_context("fork")
    queue, stage = context.Queue(2 * args.workers), context.Value("i", 0)
    workers = []
    for i in range(args.workers):
        job = (maker, f"train-{args.seed}-{i}", args.lengths, args.batch_tokens, stage, queue)
        workers.append(context.Process(target=nb.produce, args=job, daemon=True))
        workers[-1].start()
    try:
        model = build_model(args, maker.tokenizer.get_vocab_size(), maker)
        num_parameters = sum(weight.numel() for weight in model.parameters())
        print(
            f"parameters {num_parameters / 1e6:.2f}M vocabulary {model.config.vocab_size} "
            f"device {device} "
            f"workers {args.workers} ready after {time.time() - deadline_from:.0f} s",
            flush=True,
        )
        trained = train(Trainer(model, device), maker, args, deadline, queue, stage)
    finally:
        for process in workers:
            process.kill()
    save_model(model, maker, args.out)
    print(f"trained {trained}; saved, evaluating", flush=True)
    rows = evaluate(args.out, args.eval_lengths, args.eval_prompts, device)
    write_provenance(args, trained, rows, device)
    print_table(rows)


if __name__ == "__main__":
    main()
