"""Sampled queries of a few sequences, with how the model's prediction answers to each of them.

The sensitivity of a query is the gradient `g` of the whole sequence's log-likelihood with respect
to the query head's attention output, for labels drawn from the model itself. A small error `e` of
the output then moves the model's predictions by a KL divergence of `E[(g . e)^2] / 2`: the gradient
knows the output projection, the layers above and how much a layer matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from echokv_vllm.train.capture import captured_attention, check_scores

# Logits of so many tokens are held at once; a vocabulary of 128,000 makes them large.
_LOGIT_TOKENS = 256


@dataclass(frozen=True)
class LayerProbe:
    """What one layer's attention read and how much its outputs matter; dtype of the model.

    Attributes:
        query: [num_sequences, num_kv_heads, group, num_queries, head_dim], after RoPE.
        gradient: Likewise: sensitivity of the attention output of every query.
        key: [num_sequences, num_kv_heads, sequence_len, head_dim], after RoPE.
        value: Likewise.
    """

    query: torch.Tensor
    gradient: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Probe:
    """Sampled queries of every layer.

    Attributes:
        layers: One entry per layer.
        rebuilt: [num_sequences, num_queries, sequence_len] bool: the tokens a query sees rebuilt.
        seen: Likewise: all tokens it sees.
        offsets: [num_sequences] int64, assumed to be added to the positions.
    """

    layers: list[LayerProbe]
    rebuilt: torch.Tensor
    seen: torch.Tensor
    offsets: torch.Tensor


def take_probe(
    model: Any,
    sequences: torch.Tensor,
    offsets: torch.Tensor,
    num_queries: int,
    sink_tokens: int,
    recent_tokens: int,
    seed: int,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Probe:
    """Run the model forward and backward over some sequences.

    The exact windows are those given, but at most a sixteenth (sinks) and a quarter (recent) of the
    sequence: between them there must be something to rebuild.

    Args:
        model: Supported Hugging Face causal LM in eval mode.
        sequences: [num_sequences, sequence_len] token ids on the CPU.
        offsets: [num_sequences] int64 on the CPU.
        num_queries: Queries per sequence.
        sink_tokens: First tokens that stay exact.
        recent_tokens: Last tokens that stay exact.
        seed: Seed of the sampled queries and labels.
        progress: Wraps the iteration over sequences.

    Raises:
        ValueError: If sequences are too short to rebuild anything.
    """
    length = sequences.shape[1]
    if length < 4:
        raise ValueError(
            f"sequences of sequence_len={length} tokens are too short to search a plan; raise it"
        )
    sinks = min(sink_tokens, length // 16)
    recent = max(1, min(recent_tokens, length // 4))
    first = sinks + recent
    generator = torch.Generator().manual_seed(seed)
    label_generator = torch.Generator(model.device).manual_seed(seed)
    count = min(num_queries, length - first)
    positions = torch.stack(
        [
            torch.randperm(length - first, generator=generator)[:count].sort().values + first
            for _ in range(len(sequences))
        ]
    ).to(model.device)
    parts = [
        _run(model, sequences[index], positions[index], label_generator)
        for index in progress(range(len(sequences)))
    ]
    layers = [
        LayerProbe(*(torch.stack(tensors) for tensors in zip(*found, strict=True)))
        for found in zip(*parts, strict=True)
    ]
    token = torch.arange(length, device=model.device)
    seen = token <= positions[..., None]
    rebuilt = (token >= sinks) & (token <= positions[..., None] - recent)
    return Probe(layers, rebuilt, seen, offsets.to(model.device))


def _run(
    model: Any, sequence: torch.Tensor, positions: torch.Tensor, generator: torch.Generator
) -> list[tuple[torch.Tensor, ...]]:
    """Query, gradient, key and value of every layer for one sequence."""
    tensors: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def keep(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        chosen = query.detach()[0, :, positions].clone()
        tensors[layer] = chosen, key.detach()[0].clone(), value.detach()[0].clone()

    ids = sequence.to(model.device, torch.int64)[None]
    with torch.enable_grad(), frozen(model), _attention_outputs(model) as outputs:
        with captured_attention(model, keep):
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        slope = _likelihood_slope(model.get_output_embeddings(), hidden.detach(), generator)
        gradients = torch.autograd.grad(hidden, outputs, slope)
    found: list[tuple[torch.Tensor, ...]] = []
    for layer, gradient in enumerate(gradients):
        query, key, value = tensors[layer]
        per_head = gradient[0, positions].unflatten(-1, (len(query), -1)).transpose(0, 1)
        grouped = (len(key), -1)
        found.append((query.unflatten(0, grouped), per_head.unflatten(0, grouped), key, value))
    return found


def _likelihood_slope(head: Any, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of the log-likelihood of drawn labels with respect to the last hidden states."""
    slope = torch.empty_like(hidden)
    for start in range(0, hidden.shape[1], _LOGIT_TOKENS):
        part = hidden[:, start : start + _LOGIT_TOKENS].clone().requires_grad_()
        log_probability = head(part).float().log_softmax(-1)
        check_scores(log_probability, hidden.dtype)
        drawn = torch.multinomial(
            log_probability.detach()[0].exp(), 1, replacement=True, generator=generator
        )
        total = log_probability[0].gather(-1, drawn).sum()
        slope[:, start : start + _LOGIT_TOKENS] = torch.autograd.grad(total, part)[0]
    return slope


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No gradients of the weights while the context is open."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _attention_outputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the input of every layer's output projection, `[1, len, heads * head_dim]`."""
    outputs: list[torch.Tensor] = []

    def keep(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        output, *rest = inputs
        if not output.requires_grad:  # the first layer: nothing before it has a gradient
            output = output.detach().requires_grad_()
        outputs.append(output)
        return (output, *rest)

    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(keep)
        for layer in model.get_decoder().layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
