"""An evaluation from options to report; cheap checks come before expensive work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from tqdm import tqdm

from echokv_vllm import __version__
from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.eval import report as reports
from echokv_vllm.eval.attention import Window, install
from echokv_vllm.eval.divergence import draw_sequences, measure_divergence
from echokv_vllm.eval.endpoint import AS_IS, EndpointBackend
from echokv_vllm.eval.footprint import footprint, full_footprint
from echokv_vllm.eval.heatmap import check_matplotlib
from echokv_vllm.eval.offline import OfflineBackend
from echokv_vllm.eval.options import EvalOptions
from echokv_vllm.eval.questions import (
    Answered,
    Questions,
    available_qa,
    make_questions,
    skipped_tasks,
)
from echokv_vllm.eval.rebuild import HeadRebuilder, QuantizedCache, Rebuilder
from echokv_vllm.eval.tasks import Material, resolve_tasks
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.capture import check_rotary, check_supported
from echokv_vllm.train.model import (
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from echokv_vllm.train.report import git_commit

_DEFAULT_RECENT_TOKENS = 128
# Of a served model's cache: vLLM serves what is stored in float32 in 16 bits, too.
_ITEMSIZE = 2


@dataclass(frozen=True)
class _Subject:
    """What is measured."""

    options: EvalOptions
    config: Any
    tokenizer: Any
    checkpoint: EchoCheckpoint | None
    window: Window
    tasks: tuple[str, ...]

    def row_head(self, length: int, mode: str) -> dict[str, Any]:
        model, checkpoint = self.options.model, self.checkpoint
        if mode == "full":
            return reports.row_head(model, "full cache", "–", 1.0, None, length)
        cache_format = self.options.kv_cache_dtype
        if mode == AS_IS or (checkpoint is None and cache_format == "auto"):
            # Any server, or one whose checkpoint was not named: its cache is not known here.
            return reports.row_head(model, f"endpoint, {mode}", "–", None, None, length)
        if checkpoint is None:
            shape = ModelFingerprint.from_config(self.config)
            size = full_footprint(shape, length, _ITEMSIZE, cache_format)
            name = f"full cache, {cache_format}"
            return reports.row_head(model, name, "–", size.ratio, size, length)
        space = reports.key_space(checkpoint.rotation_block)
        plan = checkpoint.plan
        if mode != "compressed":
            # In mode auto a request's bytes depend on the memory pressure of the moment.
            return reports.row_head(model, f"{plan.name}, {mode}", space, plan.ratio, None, length)
        bits = self.options.residual_bits
        size = footprint(
            checkpoint, length, self.window.recent_tokens, _ITEMSIZE, cache_format, bits
        )
        name = plan.name + (f" + {bits}-bit residual" if bits else "")
        name += "" if cache_format == "auto" else f", {cache_format}"
        return reports.row_head(model, name, space, size.ratio, size, length)


def run_evaluation(options: EvalOptions, command: str | None = None) -> dict[str, Any]:
    """See `echokv_vllm.eval.evaluate`."""
    if options.heatmap_png:
        check_matplotlib()
    subject = _subject(options)
    questions, material = make_questions(
        options, subject.tasks, subject.tokenizer, subject.config.max_position_embeddings
    )
    sequences = None
    if options.data is not None:
        sequences = draw_sequences(
            options.data, subject.tokenizer, options.samples, options.length, options.seed
        )
    try:
        rows, answered = _measure(subject, questions, sequences)
    except torch.OutOfMemoryError as error:
        raise ValueError(_out_of_memory(options)) from error
    return {
        "format": "echokv-eval",
        "format_version": 1,
        "rows": rows,
        "heatmap": answered.heatmap,
        "skipped": skipped_tasks(options),
        "settings": _settings(subject, material),
        "options": asdict(options),
        "versions": _versions(),
        "git_commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def _measure(
    subject: _Subject, questions: Questions, sequences: torch.Tensor | None
) -> tuple[list[dict[str, Any]], Answered]:
    """All rows of the report, and what else comes from answers."""
    # An endpoint that is not there must show before the model is loaded.
    backend = _endpoint(subject.options) if questions and subject.options.endpoint else None
    offline = sequences is not None or backend is None
    model, rebuilder = _model_and_rebuilder(subject) if offline else (None, None)
    rows: list[dict[str, Any]] = []
    if sequences is not None:
        rows += _divergence_rows(subject, model, rebuilder, sequences)
    answered = Answered()
    if questions:
        answered = questions.answer(
            backend or _offline(subject, model, rebuilder), subject.row_head, subject.options.seed
        )
    return rows + answered.rows, answered


def _out_of_memory(options: EvalOptions) -> str:
    ways = ["another --device"]
    if options.dtype != "bfloat16":
        ways.insert(0, "--dtype bfloat16, which halves the model")
    if options.data is not None:
        ways.append(f"a smaller --batch-size (now {options.batch_size}) or --length")
    if options.asks and options.endpoint is None:
        ways.append("shorter tasks, or a server that answers them (--endpoint)")
    return f"the evaluation ran out of memory; try {'; '.join(ways)}"


def _subject(options: EvalOptions) -> _Subject:
    tasks = resolve_tasks(options.tasks, available_qa(options))
    config = load_config(options.model)
    checkpoint = None
    if options.checkpoint is not None:
        checkpoint = EchoCheckpoint.load(options.checkpoint)
        checkpoint.check_model(ModelFingerprint.from_config(config, options.model))
    context_len = config.max_position_embeddings
    lengths = [options.length] if options.data is not None else []
    lengths += options.task_lengths if tasks else ()
    lengths += options.heatmap_lengths if options.heatmap else ()
    for length in (*lengths, options.longbench_length or 0):
        if length > context_len:
            raise ValueError(
                f"length {length} is longer than the model's context of {context_len} tokens; "
                "lower it"
            )
    recent_tokens = options.recent_tokens
    if recent_tokens is None:
        recent_tokens = checkpoint.recent_tokens if checkpoint else _DEFAULT_RECENT_TOKENS
    return _Subject(
        options, config, load_tokenizer(options.model), checkpoint,
        Window(options.sink_tokens, recent_tokens), tasks,
    )  # fmt: skip


def _model_and_rebuilder(subject: _Subject) -> tuple[Any, Rebuilder | None]:
    options, config, checkpoint = subject.options, subject.config, subject.checkpoint
    check_supported(config)
    rotary = rotary_from_config(config)
    device = resolve_device(options.device)
    # Unlike in training float32 everywhere: differences of 1e-3 in KL must not drown in rounding.
    name = "float32" if options.dtype == "auto" else options.dtype
    model = load_model(options.model, device, resolve_dtype(name, device, config))
    check_rotary(model, rotary)
    rebuilder: Rebuilder | None = None
    if checkpoint is not None:
        rebuilder = HeadRebuilder(
            checkpoint, rotary, device, options.kv_cache_dtype, options.residual_bits
        )
    elif options.kv_cache_dtype != "auto":
        rebuilder = QuantizedCache(options.kv_cache_dtype)
    install(model)
    return model, rebuilder


def _divergence_rows(
    subject: _Subject, model: Any, rebuilder: Rebuilder | None, sequences: torch.Tensor
) -> list[dict[str, Any]]:
    options = subject.options
    generator = torch.Generator().manual_seed(options.seed)
    offsets = torch.randint(options.offset_max + 1, (len(sequences),), generator=generator)
    result = measure_divergence(
        model, rebuilder, sequences, offsets, subject.window,
        skip_tokens=options.skip, every_query=options.every_query is not False,
        batch_size=options.batch_size, seed=options.seed, progress=_bar("divergence", options),
    )  # fmt: skip
    head = subject.row_head(options.length, "full" if rebuilder is None else "compressed")
    return reports.divergence_rows(head, result, len(sequences))


def _endpoint(options: EvalOptions) -> EndpointBackend:
    assert options.endpoint is not None, "no endpoint was named"
    return EndpointBackend(
        options.endpoint, options.endpoint_mode, options.served_model,
        concurrency=options.concurrency, progress=_bar("answers", options),
    )  # fmt: skip


def _offline(subject: _Subject, model: Any, rebuilder: Rebuilder | None) -> OfflineBackend:
    options = subject.options
    return OfflineBackend(
        model, subject.tokenizer, {} if rebuilder is None else {"compressed": rebuilder},
        subject.window,
        every_query=bool(options.every_query), offset_max=options.offset_max, seed=options.seed,
        progress=_bar("answers", options),
    )  # fmt: skip


def _settings(subject: _Subject, material: Material) -> dict[str, Any]:
    options = subject.options
    sink_tokens, recent_tokens = subject.window.sink_tokens, subject.window.recent_tokens
    settings: dict[str, Any] = {}
    if options.data is not None or options.endpoint is None:
        settings["exact tokens"] = f"{sink_tokens} sink, {recent_tokens} recent"
        settings["position offsets up to"] = options.offset_max
    if options.endpoint is not None:
        settings["exact tokens of answers"] = "the server's"
        if subject.checkpoint is not None and options.endpoint_mode == "compressed":
            settings["exact tokens of answers"] += f"; bytes/token assumes {recent_tokens} recent"
    settings["seed"] = options.seed
    if options.kv_cache_dtype != "auto":
        settings["cache format, simulated"] = options.kv_cache_dtype
    if options.residual_bits:
        settings["coded residual, simulated"] = f"{options.residual_bits} bits per number"
    if options.data is not None:
        settings["held-out text"] = options.data
        settings["divergence"] = (
            f"scored from token {options.skip} on, compressed "
            f"{f'from token {options.skip}' if options.every_query is False else 'for every query'}"
        )
    if options.tasks or options.heatmap:
        settings["essay haystack"] = material.haystack_name
    if options.longbench is not None:
        settings["LongBench"] = options.longbench
    if options.asks:
        settings["answers"] = options.endpoint or (
            "Hugging Face forward, every query compressed" if options.every_query
            else "Hugging Face forward, exact prefill, compressed decode"
        )  # fmt: skip
    if options.endpoint is not None:
        settings["mode of answers"] = options.endpoint_mode
    if subject.checkpoint is not None and (options.data or options.endpoint_mode != AS_IS):
        settings["checkpoint"] = options.checkpoint
        settings["maps"] = str(subject.checkpoint.provenance.get("stage", "of unknown stage"))
    return settings


def _versions() -> dict[str, str]:
    import transformers

    return {
        "echokv_vllm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _bar(name: str, options: EvalOptions) -> Callable[[Iterable[int]], Iterable[int]]:
    def wrap(steps: Iterable[int]) -> Iterable[int]:
        return tqdm(steps, desc=name, disable=not options.progress)

    return wrap
