"""What a training run is asked to do and what it hands back. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from echokv_vllm.train.search.options import check_ratio

if TYPE_CHECKING:
    from echokv_vllm.checkpoint import EchoCheckpoint

DTYPES = ("auto", "float32", "bfloat16")
STAGES_ONE = ("closed-form", "sgd")
STAGES_TWO = ("auto", "none", "o-mse", "qk-kl", "kl")
CACHE_DTYPES = ("auto", "fp8", "int4")
RESIDUAL_BITS = (0, 2)
SEARCHED_PLAN = "auto"
"""Value of the option `plan` that asks for a search."""
DEFAULT_RATIO = 0.5
MAX_SEED = 2**64 - 1
"""What torch's generators take."""


@dataclass(frozen=True)
class TrainOptions:
    """One training run; the fields are the options of `echokv train`.

    Attributes:
        model: Folder of a Hugging Face model, or a repo id.
        data: Local `.txt`, `.txt.xz` or `.jsonl` file, or a Hugging Face dataset as
            `NAME[:CONFIG[:SPLIT]]`.
        out: Folder for the checkpoint.
        plan: `auto`: search which heads to retain, for `ratio`; or a preset name (see
            `echokv_vllm.presets.PRESETS`), or a JSON plan file.
        ratio: With plan `auto`: bytes of the retained heads over bytes of all heads, rounded to
            whole heads by at most 0.01. None: half of them.
        uniform: With plan `auto`: every layer retains equally many heads, which decodes fastest.
            None: yes.
        neighbours: With plan `auto`: also look for source heads in so many earlier layers; they
            cost no bytes but slow decode down.
        max_sources: With `neighbours`: source heads of a layer at most, its own included; decode
            reads so many of each token. None: as many as the model has KV heads, the reading of a
            full cache.
        rotation_block: Tokens per rotation block; 1 = un-rotated keys, 0 = absolute rotation. The
            default costs 7 % more KL than 64 (benchmarks/results/2026-11-22-quality) and a decode
            step 17 % less time (benchmarks/results/2026-11-22-h200).
        stage1: How stage I fits rebuilt to true heads: `closed-form` (least squares) or `sgd` (the
            paper's KV-MSE by AdamW).
        stage1_steps: Steps of `sgd`.
        ridge: Ridge of the least squares, relative to the mean squared feature; None = chosen for
            every layer, for K and V apart, on held-out tokens.
        bias: Fit a constant per discarded number as well.
        stage2: What stage II descends on after that: `o-mse` (error of the attention output, layer
            by layer), `qk-kl` (KL of the attention weights, keys only), `kl` (KL of the next-token
            distribution, all layers compressed), `none`, or `auto`: `kl` on CUDA, `none` on a CPU,
            where it would take long.
        stage2_steps: Steps of stage II.
        learning_rate: Highest learning rate of AdamW in both stages; falls to 0 as a cosine.
        step_size: Sequences per training step of both stages.
        whiten: Descend in coordinates in which the features of stage II are uncorrelated and of
            unit size; not with `stage1="sgd"`.
        num_queries: Queries per sequence, drawn at random, on which `o-mse` and `qk-kl` are
            measured.
        checkpoint_activations: Let `kl` recompute every model layer in the backward pass: less
            memory for long sequences, more time.
        resume: Continue an interrupted run with the same `out`.
        save_every: Steps between two saves of the training state.
        curves: CSV file that the losses are written to while the run goes on; the checkpoint gets
            a copy in any case.
        tensorboard: Folder for TensorBoard's event files.
        kv_cache_dtype: Format of the cache the maps are to work on: `auto`, `fp8` or `int4`.
        residual_bits: Bits of the coded residual the maps are to work with: 0 (none) or 2.
        sequence_len: Tokens per sequence.
        batch_size: Sequences per forward pass of the closed form.
        num_tokens: At most so many tokens are used, held-out ones included.
        max_position: Positions are spread over [0, max_position); None = the model's context.
        recent_tokens: Recent tokens to keep exact; used by stage II and recorded for the server.
        sink_tokens: First tokens of a sequence that stage II keeps exact.
        shards: Head shards of a preset plan (tensor-parallel ranks).
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on the CPU, the model's own on CUDA), `float32` or `bfloat16`.
        seed: Seed of everything random.
        overwrite: Replace a checkpoint that is already at `out`.
        progress: Show a progress bar on stderr.

    Raises:
        ValueError: If a number is out of range or a word is unknown.
    """

    model: str
    data: str
    out: str
    plan: str = SEARCHED_PLAN
    ratio: float | None = None
    uniform: bool | None = None
    neighbours: int = 0
    max_sources: int | None = None
    rotation_block: int = 256
    stage1: str = "closed-form"
    stage1_steps: int = 600
    ridge: float | None = None
    bias: bool = False
    stage2: str = "auto"
    stage2_steps: int = 1000
    learning_rate: float = 5e-4
    step_size: int = 1
    whiten: bool = True
    num_queries: int = 256
    checkpoint_activations: bool = False
    resume: bool = False
    save_every: int = 100
    curves: str | None = None
    tensorboard: str | None = None
    kv_cache_dtype: str = "auto"
    residual_bits: int = 0
    sequence_len: int = 1024
    batch_size: int = 4
    num_tokens: int = 1_000_000
    max_position: int | None = None
    recent_tokens: int = 128
    sink_tokens: int = 4
    shards: int = 1
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        minimums = {
            "rotation_block": 0,
            "sequence_len": 1,
            "batch_size": 1,
            "num_tokens": 1,
            "recent_tokens": 0,
            "sink_tokens": 0,
            "stage1_steps": 1,
            "stage2_steps": 1,
            "step_size": 1,
            "num_queries": 1,
            "save_every": 1,
            "shards": 1,
            "neighbours": 0,
            "seed": 0,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"{name}={value} is too small; it must be at least {minimum}")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed={self.seed} is too large; it must be at most {MAX_SEED}")
        self._check_search()
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"ridge={self.ridge} must be a number, at least 0, such as 1e-4")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(
                f"learning_rate={self.learning_rate} must be a positive number, such as 5e-4"
            )
        words = {
            "dtype": DTYPES,
            "stage1": STAGES_ONE,
            "stage2": STAGES_TWO,
            "kv_cache_dtype": CACHE_DTYPES,
            "residual_bits": RESIDUAL_BITS,
        }
        for name, allowed in words.items():
            value = getattr(self, name)
            if value not in allowed:
                listed = ", ".join(str(word) for word in allowed)
                raise ValueError(f"{name}={value!r} is not one of {listed}")
        if self.max_position is not None and self.max_position < self.sequence_len:
            raise ValueError(
                f"max_position={self.max_position} is smaller than "
                f"sequence_len={self.sequence_len}; raise the one or lower the other"
            )

    def check_used(self, stage2: str) -> None:
        """An option that nothing reads is a mistake: the maps would be taken for others.

        Args:
            stage2: What `auto` stands for on the device, or what was named.

        Raises:
            ValueError: If an option that is not at its default speaks of a stage that is not run.
        """
        read = {
            "stage1_steps": self.stage1 == "sgd",
            "learning_rate": self.stage1 == "sgd" or stage2 != "none",
            "step_size": self.stage1 == "sgd" or stage2 != "none",
            "stage2_steps": stage2 != "none",
            "whiten": stage2 != "none",
            "residual_bits": stage2 != "none",
            "num_queries": stage2 in ("o-mse", "qk-kl"),
            "checkpoint_activations": stage2 == "kl",
        }
        chosen = f"stage2={stage2}" if self.stage2 != "auto" else f"stage2=auto, here {stage2}"
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and not read.get(field.name, True):
                raise ValueError(
                    f"{field.name}={value} is read by no stage of this run (stage1={self.stage1}, "
                    f"{chosen}); name the stage that it is about (--stage2 kl or o-mse, --stage1 "
                    "sgd), or leave the option out"
                )

    @property
    def searched_ratio(self) -> float:
        """The ratio a search aims at."""
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    @property
    def searches_uniform(self) -> bool:
        """Whether a searched plan retains equally many heads in every layer."""
        return self.uniform is not False

    def _check_search(self) -> None:
        """What belongs to plan `auto` and only to it."""
        if self.plan == SEARCHED_PLAN:
            check_ratio(self.searched_ratio)
            if self.max_sources is not None and not (self.neighbours and self.max_sources > 0):
                raise ValueError(
                    f"max_sources={self.max_sources} must be at least 1 and needs neighbours, the "
                    f"earlier layers to look at (neighbours={self.neighbours}); name both, or "
                    "neither"
                )
            return
        for name in ("ratio", "uniform", "neighbours", "max_sources"):
            value = getattr(self, name)
            if value is not None and (name, value) != ("neighbours", 0):
                raise ValueError(
                    f"{name}={value} is for plan='auto' only, but the plan is {self.plan!r}; use "
                    f"plan=auto, or leave out {name}"
                )


@dataclass(frozen=True)
class LayerErrors:
    """Relative squared errors of one layer's rebuilt heads: `sum((y - y_hat)^2) / sum(y^2)`.

    Attributes:
        key: Keys in block-rotated space, on held-out sequences.
        value: Values, on held-out sequences.
        key_fit: Keys, on the sequences of the fit.
        value_fit: Values, on the sequences of the fit.
    """

    key: float
    value: float
    key_fit: float
    value_fit: float


@dataclass(frozen=True)
class Descent:
    """What steps of gradient descent did, by held-out loss.

    Attributes:
        loss: `kv-mse`, `o-mse`, `qk-kl` or `kl`.
        steps: Steps taken.
        initial: Held-out loss of every group of maps before the first step; a group is a layer
            (`layer 3`), or `model` where all layers share one loss.
        final: Held-out loss of the maps that were kept, the best ones seen.
        best_step: Number of steps after which each group was best.
    """

    loss: str
    steps: int
    initial: dict[str, float]
    final: dict[str, float]
    best_step: dict[str, int]

    @property
    def mean_initial(self) -> float:
        """Mean of `initial` over the groups."""
        return sum(self.initial.values()) / len(self.initial)

    @property
    def mean_final(self) -> float:
        """Mean of `final` over the groups."""
        return sum(self.final.values()) / len(self.final)


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        checkpoint: What was written.
        folder: Where it was written.
        errors: Errors of every layer that discards heads, after the last stage.
        descents: Runs of gradient descent, in order: stage I if it was one, stage II if any.
        num_fit_tokens: Tokens the maps were fitted on.
        num_heldout_tokens: Tokens the errors were measured on.
        report: The text of `errors.md`.
    """

    checkpoint: EchoCheckpoint
    folder: Path
    errors: dict[int, LayerErrors]
    num_fit_tokens: int
    num_heldout_tokens: int
    report: str
    descents: tuple[Descent, ...] = ()

    @property
    def mean_key_error(self) -> float:
        """Mean over the discarding layers of the held-out key error."""
        return sum(errors.key for errors in self.errors.values()) / len(self.errors)

    @property
    def mean_value_error(self) -> float:
        """Mean over the discarding layers of the held-out value error."""
        return sum(errors.value for errors in self.errors.values()) / len(self.errors)
