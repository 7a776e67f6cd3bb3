"""Exact match of a saved model on fresh needle prompts, by greedy generation.

PYTHONPATH=. python examples/tiny_model/evaluate.py --model examples/tiny_model
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from echokv_vllm import needle as nd

EVAL_LENGTHS = (1024, 2048)
EVAL_NEEDLES = (1, 4, 8, 16)
BATCH_SIZE = 50


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[nd.NeedlePrompt]) -> list[str]:
    """What the model goes on with; left-padded batches, so lengths may differ."""
    outputs: list[str] = []
    for first in range(0, len(prompts), BATCH_SIZE):
        texts = [prompt.text for prompt in prompts[first : first + BATCH_SIZE]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        inputs = inputs.to(model.device)
        # A space, the digits, the full stop and the end token.
        made = model.generate(**inputs, max_new_tokens=nd.MAX_VALUE_DIGITS + 3, do_sample=False)
        prompt_len = inputs["input_ids"].shape[1]
        outputs += tokenizer.batch_decode(made[:, prompt_len:], skip_special_tokens=True)
    return outputs


def evaluate(
    folder: Path, lengths: tuple[int, ...], num_prompts: int, device: torch.device
) -> list[dict]:
    """One row per length and needle count, and one per length over all (`num_prompts` prompts)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device).eval()

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    rows = []
    for length in lengths:
        counts = [count for count in EVAL_NEEDLES if count * 15 + 40 < length]
        all_scored: list[tuple[float, bool]] = []
        for count in counts:
            prompts = nd.make_prompts(
                max(1, num_prompts // len(counts)),
                length,
                (count,),
                seed=900_000 + length + count,  # far from the seeds of tests and demo
                count_tokens=count_tokens,
            )
            outputs = generate(model, tokenizer, prompts)
            scored = [(p.depth, p.is_correct(o)) for p, o in zip(prompts, outputs, strict=True)]
            all_scored += scored
            rows.append(_row(length, count, scored))
            for prompt, output in zip(prompts, outputs, strict=True):
                if not prompt.is_correct(output):
                    print(f"a miss: {prompt.needle} depth {prompt.depth:.2f} output {output!r}")
                    break
        rows.append(_row(length, "all", all_scored))
    return rows


def _row(length: int, needles: int | str, scored: list[tuple[float, bool]]) -> dict:
    thirds = []
    for third in range(3):
        inside = [hit for depth, hit in scored if third == min(2, int(depth * 3))]
        thirds.append(round(sum(inside) / len(inside), 4) if inside else None)
    return {
        "length": length,
        "needles": needles,
        "prompts": len(scored),
        "exact": round(sum(hit for _, hit in scored) / len(scored), 4),
        "thirds": thirds,
    }


def print_table(rows: list[dict]) -> None:
    print("length  needles  prompts  exact match  by depth (first, middle, last third)")
    for row in rows:
        thirds = "  ".join("-" if value is None else f"{value:.3f}" for value in row["thirds"])
        print(
            f"{row['length']:6}  {row['needles']!s:>7}  {row['prompts']:7}  {row['exact']:11.3f}"
            f"  {thirds}"
        )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200, help="per length")
    parser.add_argument("--lengths", default=",".join(map(str, EVAL_LENGTHS)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    lengths = tuple(int(part) for part in args.lengths.split(","))
    print_table(evaluate(args.model, lengths, args.prompts, torch.device(args.device)))


if __name__ == "__main__":
    main()
