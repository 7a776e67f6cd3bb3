"""A training run from options to checkpoint; cheap checks come before expensive work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm

from echokv_vllm.checkpoint import EchoCheckpoint, LayerMaps, check_destination
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.plan import EchoPlan, load_plan
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.capture import check_rotary, check_supported
from echokv_vllm.train.data import load_tokens
from echokv_vllm.train.model import (
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from echokv_vllm.train.options import LayerErrors, TrainOptions, TrainResult
from echokv_vllm.train.report import error_table, provenance
from echokv_vllm.train.stage1 import Fit, HeldOutErrors, LayerStream, stream


def run_training(options: TrainOptions, command: str | None = None) -> TrainResult:
    """See `echokv_vllm.train.train`."""
    check_destination(options.out, options.overwrite)
    device = resolve_device(options.device)
    config = load_config(options.model)
    check_supported(config)
    fingerprint = ModelFingerprint.from_config(config, options.model)
    plan = load_plan(options.plan, fingerprint.num_layers, fingerprint.num_kv_heads, options.shards)
    max_position = _check_lengths(options, config.max_position_embeddings)
    data = load_tokens(
        options.data, load_tokenizer(options.model), options.sequence_len, options.num_tokens
    )
    fit_sequences, heldout_sequences = data.split()
    _check_enough_tokens(plan, fingerprint.head_dim, fit_sequences.numel())

    model = load_model(options.model, device, resolve_dtype(options.dtype, device, config))
    check_rotary(model, rotary_from_config(config))
    try:
        maps, errors = fit_and_measure(
            model, plan, fit_sequences, heldout_sequences, options, max_position
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{device} ran out of memory with batch_size={options.batch_size} and "
            f"sequence_len={options.sequence_len}; lower them or use device=cpu"
        ) from error

    checkpoint = EchoCheckpoint(
        plan=plan,
        rotation_block=options.rotation_block,
        maps=maps,
        fingerprint=fingerprint,
        recent_tokens=options.recent_tokens,
        provenance=provenance(options, command, data, max_position, errors),
    )
    num_fit, num_heldout = fit_sequences.numel(), heldout_sequences.numel()
    report = error_table(plan, options, max_position, errors, num_fit, num_heldout)
    folder = checkpoint.save(options.out, options.overwrite, report)
    return TrainResult(checkpoint, folder, errors, num_fit, num_heldout, report)


def fit_and_measure(
    model: Any,
    plan: EchoPlan,
    fit_sequences: torch.Tensor,
    heldout_sequences: torch.Tensor,
    options: TrainOptions,
    max_position: int,
) -> tuple[dict[int, LayerMaps], dict[int, LayerErrors]]:
    """Fit maps on some sequences and measure them on others.

    Every sequence gets one random position offset, so that positions cover [0, max_position); exact
    attention does not depend on it, but block-rotated keys do.

    Args:
        model: Supported Hugging Face causal LM in eval mode.
        plan: Echo plan for that model.
        fit_sequences: [num_sequences, sequence_len] token ids on the CPU.
        heldout_sequences: Likewise, used for the errors only.
        options: Key space, ridge, batch size and seed are taken from here.
        max_position: At least the sequence length.
    """
    rotary = rotary_from_config(model.config).to(model.device)
    generator = torch.Generator().manual_seed(options.seed)

    def run(name: str, sequences: torch.Tensor, visitor: Fit | HeldOutErrors) -> None:
        highest = max_position - sequences.shape[1]
        offsets = torch.randint(0, highest + 1, (len(sequences),), generator=generator)
        layers = LayerStream(plan, rotary, options.rotation_block, visitor)
        stream(model, sequences, offsets, options.batch_size, layers, _bar(name, options))

    fit = Fit(plan, rotary.head_dim, model.device, options.bias)
    run("fit", fit_sequences, fit)
    maps, fit_errors = fit.solve(options.ridge)
    heldout = HeldOutErrors(plan, maps, model.device)
    run("held-out errors", heldout_sequences, heldout)
    errors = {
        layer: LayerErrors(key, value, *fit_errors[layer])
        for layer, (key, value) in heldout.errors().items()
    }
    return maps, errors


def _bar(name: str, options: TrainOptions) -> Callable[[Iterable[int]], Iterable[int]]:
    def wrap(batches: Iterable[int]) -> Iterable[int]:
        return tqdm(batches, desc=name, unit="batch", disable=not options.progress)

    return wrap


def _check_lengths(options: TrainOptions, context_len: int) -> int:
    """The range of positions to spread over."""
    if options.sequence_len > context_len:
        raise ValueError(
            f"sequence_len={options.sequence_len} is longer than the model's context of "
            f"{context_len} tokens; lower sequence_len"
        )
    return context_len if options.max_position is None else options.max_position


def _check_enough_tokens(plan: EchoPlan, head_dim: int, num_fit_tokens: int) -> None:
    feature_size = head_dim * max(
        len(plan.source_heads(layer, shard=0)) for layer in range(plan.num_layers)
    )
    if num_fit_tokens < feature_size:
        raise ValueError(
            f"{num_fit_tokens} tokens are left for the fit, fewer than the {feature_size} features "
            f"a head of plan {plan.name!r} is rebuilt from; give more text or raise num_tokens "
            "(several hundred tokens per feature is a good start)"
        )
