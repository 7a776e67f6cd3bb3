"""How far a compressed model's next-token distribution moves from the full cache's.

Teacher forcing: both runs read the same held-out text, so a difference at one token does not carry
over to the next. The most sensitive and the cheapest quality signal there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from echokv_vllm.eval.attention import (
    CONTEXT,
    AttentionContext,
    ContextMaker,
    Window,
    make_context,
)
from echokv_vllm.eval.interval import Estimate, bootstrap
from echokv_vllm.eval.rebuild import Rebuilder
from echokv_vllm.train.data import DataError, load_tokens

# Logits of so many tokens of a batch are held at once; a vocabulary of 128,000 makes them large.
_LOGIT_TOKENS = 256
# Sequences are drawn from so many times the tokens that are needed, to spread over documents.
_SPREAD = 64

_NLL_FULL, _NLL_ECHO, _AGREE, _KL = range(4)


@dataclass(frozen=True)
class Divergence:
    """Result over all scored tokens; shares are 0 to 1, KL in nats.

    Attributes:
        num_tokens: Scored predictions.
        perplexity_full: Of the full cache.
        perplexity: Of the compressed one; None like all below without a checkpoint.
        perplexity_increase: Relative: 0.01 is one per cent more.
        top1_agreement: Share of predictions with the same most probable token.
        kl: Mean KL(full || compressed).
    """

    num_tokens: int
    perplexity_full: Estimate
    perplexity: Estimate | None = None
    perplexity_increase: Estimate | None = None
    top1_agreement: Estimate | None = None
    kl: Estimate | None = None


def draw_sequences(
    source: str, tokenizer: Any, num_samples: int, length: int, seed: int
) -> torch.Tensor:
    """Sequences [num_samples, length] int32 from held-out text, drawn without repetition.

    Raises:
        ValueError: If the text is missing, unreadable or too short.
    """
    try:
        data = load_tokens(source, tokenizer, length, num_samples * length * _SPREAD)
    except DataError as error:
        raise ValueError(f"held-out text for the divergence: {error}") from error
    available = len(data.sequences)
    if available < num_samples:
        raise ValueError(
            f"held-out text {source!r} holds {available} sequences of length={length}, but "
            f"samples={num_samples}; give more text, or lower samples or length"
        )
    generator = torch.Generator().manual_seed(seed)
    return data.sequences[torch.randperm(available, generator=generator)[:num_samples]]


def measure_divergence(
    model: Any,
    cache: Rebuilder | ContextMaker | None,
    sequences: torch.Tensor,
    offsets: torch.Tensor,
    window: Window,
    *,
    skip_tokens: int,
    every_query: bool = True,
    batch_size: int = 4,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Divergence:
    """Run every sequence through the full and the compressed model.

    Args:
        model: Causal LM in eval mode with `attention.install`ed attention.
        cache: The compressed cache; None measures the full one only.
        sequences: [num_sequences, length] token ids on the CPU.
        offsets: [num_sequences] int64 position offsets.
        window: Tokens that stay exact.
        skip_tokens: First position whose prediction counts.
        every_query: Compress the context of all queries, else of those that count.
        batch_size: Sequences per forward pass.
        seed: Seed of the intervals.
        progress: Wraps the iteration over batch starts.

    Raises:
        ValueError: If the model's logits are not finite.
    """
    sums = []
    first_query = 0 if every_query else skip_tokens
    with torch.inference_mode():
        for start in progress(range(0, len(sequences), batch_size)):
            ids = sequences[start : start + batch_size].to(model.device, torch.int64)
            context = None
            if cache is not None:
                shift = offsets[start : start + batch_size].to(model.device)
                context = make_context(cache, window, shift, first_query)
            sums.append(_batch_sums(model, ids, context, skip_tokens))
    num_scored = sequences.shape[1] - 1 - skip_tokens
    means = torch.cat(sums) / num_scored
    if not bool(torch.isfinite(means).all()):
        raise ValueError(
            "the model's logits hold NaN or infinite numbers; try dtype float32, and if that does "
            "not help, check the model's weights and the checkpoint"
        )
    return _summary(means, num_scored * len(sequences), cache is not None, seed)


def _batch_sums(
    model: Any, ids: torch.Tensor, context: AttentionContext | None, skip_tokens: int
) -> torch.Tensor:
    """[batch, 4] float64 sums over the scored positions: NLL full, NLL echo, agreement, KL."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    full = decoder(input_ids=ids, use_cache=False).last_hidden_state
    echo = full
    if context is not None:
        echo = decoder(input_ids=ids, use_cache=False, **{CONTEXT: context}).last_hidden_state
    sums = torch.zeros(len(ids), 4, dtype=torch.float64, device=ids.device)
    for start in range(skip_tokens, ids.shape[1] - 1, _LOGIT_TOKENS):
        stop = min(start + _LOGIT_TOKENS, ids.shape[1] - 1)
        target = ids[:, start + 1 : stop + 1, None]
        log_full = head(full[:, start:stop]).float().log_softmax(-1)
        sums[:, _NLL_FULL] -= log_full.gather(-1, target).double().sum((1, 2))
        if context is None:
            continue
        log_echo = head(echo[:, start:stop]).float().log_softmax(-1)
        sums[:, _NLL_ECHO] -= log_echo.gather(-1, target).double().sum((1, 2))
        sums[:, _AGREE] += (log_full.argmax(-1) == log_echo.argmax(-1)).double().sum(1)
        sums[:, _KL] += (log_full.exp() * (log_full - log_echo)).double().sum((1, 2))
    return sums.cpu()


def _summary(means: torch.Tensor, num_tokens: int, compressed: bool, seed: int) -> Divergence:
    def column(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda columns: columns[:, index]

    def perplexity(index: int) -> Estimate:
        return bootstrap(means, lambda columns: columns[:, index].exp(), seed)

    if not compressed:
        return Divergence(num_tokens, perplexity(_NLL_FULL))
    return Divergence(
        num_tokens=num_tokens,
        perplexity_full=perplexity(_NLL_FULL),
        perplexity=perplexity(_NLL_ECHO),
        perplexity_increase=bootstrap(
            means, lambda columns: (columns[:, _NLL_ECHO] - columns[:, _NLL_FULL]).expm1(), seed
        ),
        top1_agreement=bootstrap(means, column(_AGREE), seed),
        kl=bootstrap(means, column(_KL), seed),
    )
