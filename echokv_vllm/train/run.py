"""A training run from options to checkpoint; cheap checks come before expensive work."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.plan import EchoPlan
from echokv_vllm.presets import load_plan
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.capture import ActivationError, check_rotary, check_supported
from echokv_vllm.train.curves import Curves, to_csv
from echokv_vllm.train.data import TokenData, check_vocabulary, load_tokens
from echokv_vllm.train.descent import DivergenceError
from echokv_vllm.train.destination import prepare_destination
from echokv_vllm.train.distillation import check_order
from echokv_vllm.train.model import (
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from echokv_vllm.train.options import SEARCHED_PLAN, TrainOptions, TrainResult
from echokv_vllm.train.report import provenance, report_text
from echokv_vllm.train.search.options import SearchOptions, head_budget
from echokv_vllm.train.stages import Material, Stages
from echokv_vllm.train.state import SavedState, StateFile

# Options that may change between a run and its continuation.
_FREE_OPTIONS = (
    "curves",
    "device",
    "out",
    "overwrite",
    "progress",
    "resume",
    "save_every",
    "tensorboard",
)


def run_training(options: TrainOptions, command: str | None = None) -> TrainResult:
    """See `echokv_vllm.train.train`."""
    out, state_file = prepare_destination(options)
    device = resolve_device(options.device)
    config = load_config(options.model)
    check_supported(config)
    shape = ModelFingerprint.from_config(config)
    given_plan = _given_plan(options, shape)
    stage2 = resolve_stage2(options, device)
    if given_plan is not None and stage2 == "kl":
        check_order(given_plan)
    max_position = _check_lengths(options, stage2, config.max_position_embeddings)
    data = load_tokens(
        options.data,
        load_tokenizer(options.model, parse_special=True),
        options.sequence_len,
        options.num_tokens,
    )
    check_vocabulary(data.sequences, config.vocab_size)
    fit_sequences, heldout_sequences = data.split()
    _check_enough_tokens(given_plan, shape, options.shards, fit_sequences.numel())

    def save(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        state_file.save(identity, tensors, {**record, "plan": plan.to_dict()})

    try:
        model = load_model(options.model, device, resolve_dtype(options.dtype, device, config))
        check_rotary(model, rotary_from_config(config))
        # Not before: loading a repo id for the first time is what fetches its weights.
        fingerprint = ModelFingerprint.from_config(config, options.model)
        identity = _identity(options, stage2, fingerprint, data, given_plan)
        saved = _saved_state(options, state_file, identity)
        with closing(Curves(options.curves, options.tensorboard)) as curves:
            plan = given_plan or _searched_plan(model, fit_sequences, options, max_position, saved)
            material = Material(
                model, plan, fit_sequences, heldout_sequences, options, max_position
            )
            trained = Stages(material, curves, save, _progress(options), saved).train(stage2)
    except torch.OutOfMemoryError as error:
        raise ValueError(_out_of_memory(options, stage2, device)) from error
    except (ActivationError, DivergenceError):
        # Continuing would only end there again.
        state_file.delete()
        raise

    checkpoint = EchoCheckpoint(
        plan=plan,
        rotation_block=options.rotation_block,
        maps=trained.maps,
        fingerprint=fingerprint,
        recent_tokens=options.recent_tokens,
        provenance=provenance(options, command, data, max_position, trained),
    )
    num_fit, num_heldout = fit_sequences.numel(), heldout_sequences.numel()
    report = report_text(plan, options, max_position, trained, num_fit, num_heldout)
    points = to_csv(curves.points) if curves.points else None
    folder = checkpoint.save(out, options.overwrite, report, points)
    state_file.delete()
    return TrainResult(
        checkpoint, folder, trained.errors, num_fit, num_heldout, report, trained.descents
    )


def resolve_stage2(options: TrainOptions, device: torch.device) -> str:
    """What `auto` stands for on a device; anything else is itself."""
    if options.stage2 == "auto":
        return "kl" if device.type == "cuda" else "none"
    return options.stage2


def _identity(
    options: TrainOptions,
    stage2: str,
    fingerprint: ModelFingerprint,
    data: TokenData,
    given_plan: EchoPlan | None,
) -> dict[str, Any]:
    """What must be the same for a run to be continued; JSON-able."""
    content = None
    if given_plan is not None:  # the option names a file at most, which may have been edited
        text = json.dumps(given_plan.to_dict(), sort_keys=True)
        content = hashlib.sha256(text.encode()).hexdigest()
    asked = {name: value for name, value in asdict(options).items() if name not in _FREE_OPTIONS}
    return {
        **asked,
        "stage2": stage2,
        "model fingerprint": fingerprint.to_dict(),
        "data tokens": data.tokens_sha256,
        "plan content (SHA-256)": content,
    }


def _saved_state(
    options: TrainOptions, state_file: StateFile, identity: dict[str, Any]
) -> SavedState | None:
    if not options.resume:
        state_file.delete()
        return None
    saved = state_file.load(identity)
    if saved is None:
        note = f"no unfinished run in {state_file.path}; starting anew"
    else:
        note = f"continuing after {saved.record['step']} steps of stage {saved.record['stage']}"
    if options.progress:
        print(note, file=sys.stderr)
    return saved


def _progress(options: TrainOptions) -> Any:
    def wrap(steps: range, title: str, unit: str) -> Iterable[int]:
        settings: dict[str, Any] = {}
        if unit == "step":  # a continued run starts in the middle
            settings = dict(initial=steps.start, total=steps.stop)
        return tqdm(steps, desc=title, unit=unit, disable=not options.progress, **settings)

    return wrap


def _check_lengths(options: TrainOptions, stage2: str, context_len: int) -> int:
    """The range of positions to spread over."""
    if options.sequence_len > context_len:
        raise ValueError(
            f"sequence_len={options.sequence_len} is longer than the model's context of "
            f"{context_len} tokens; lower sequence_len"
        )
    exact = options.sink_tokens + max(options.recent_tokens, 1)
    if stage2 != "none" and options.sequence_len <= exact:
        raise ValueError(
            f"sequence_len={options.sequence_len} leaves stage II nothing to learn: the first "
            f"sink_tokens={options.sink_tokens} and the last recent_tokens="
            f"{options.recent_tokens} tokens are exact; raise sequence_len, or use stage2=none"
        )
    return context_len if options.max_position is None else options.max_position


def _given_plan(options: TrainOptions, model: ModelFingerprint) -> EchoPlan | None:
    """The plan the options name; None if it must be searched, for a ratio that can be reached."""
    shape = model.num_layers, model.num_kv_heads
    if options.plan != SEARCHED_PLAN:
        return load_plan(options.plan, *shape, options.shards)
    ratio, uniform = options.searched_ratio, options.searches_uniform
    head_budget(ratio, *shape, options.shards, uniform, options.max_sources)
    return None


def _searched_plan(
    model: Any,
    sequences: torch.Tensor,
    options: TrainOptions,
    max_position: int,
    saved: SavedState | None,
) -> EchoPlan:
    """The plan found before the interruption, if there was one, or by a search now."""
    if saved is not None:
        return EchoPlan.from_dict(saved.record["plan"])
    from echokv_vllm.train.search.search import search_plan

    wanted = SearchOptions(
        ratio=options.searched_ratio,
        uniform=options.searches_uniform,
        shards=options.shards,
        neighbours=options.neighbours,
        max_sources=options.max_sources,
        rotation_block=options.rotation_block,
        ridge=1e-4 if options.ridge is None else options.ridge,
        max_position=max_position,
        recent_tokens=options.recent_tokens,
        sink_tokens=options.sink_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    rotary = rotary_from_config(model.config).to(model.device)
    return search_plan(model, sequences, wanted, rotary, _progress(options))


def _check_enough_tokens(
    plan: EchoPlan | None, fingerprint: ModelFingerprint, shards: int, num_fit_tokens: int
) -> None:
    """`plan` None stands for one that will be searched."""
    if plan is None:
        name, num_sources = SEARCHED_PLAN, fingerprint.num_kv_heads // shards
    else:
        name = plan.name
        num_sources = max(
            len(plan.source_heads(layer, shard=0)) for layer in range(plan.num_layers)
        )
    feature_size = fingerprint.head_dim * num_sources
    if num_fit_tokens < feature_size:
        raise ValueError(
            f"{num_fit_tokens} tokens are left for the fit, fewer than the {feature_size} features "
            f"a head of plan {name!r} is rebuilt from; give more text or raise num_tokens "
            "(several hundred tokens per feature is a good start)"
        )


def _out_of_memory(options: TrainOptions, stage2: str, device: torch.device) -> str:
    remedies = [f"batch_size={options.batch_size}", f"sequence_len={options.sequence_len}"]
    if stage2 != "none":
        remedies.append(f"step_size={options.step_size}")
    advice = f"{device} ran out of memory; lower {', '.join(remedies)}"
    if stage2 == "kl" and not options.checkpoint_activations:
        advice += ", set checkpoint_activations"
    if options.plan == SEARCHED_PLAN:
        advice += ", name a plan that needs no search, such as local-0.5"
    return f"{advice}, or use device=cpu"
