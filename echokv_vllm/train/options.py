"""What a training run is asked to do and what it hands back. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echokv_vllm.checkpoint import EchoCheckpoint

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainOptions:
    """One training run; the fields are the options of `echokv train`.

    Attributes:
        model: Folder of a Hugging Face model, or a repo id.
        data: Local `.txt`, `.txt.xz` or `.jsonl` file, or a Hugging Face dataset as
            `NAME[:CONFIG[:SPLIT]]`.
        out: Folder for the checkpoint.
        plan: Preset name (see `echokv_vllm.plan.PRESETS`) or a JSON plan file.
        rotation_block: Tokens per rotation block; 1 = un-rotated keys, 0 = absolute rotation.
        ridge: Ridge of the least squares, relative to the mean squared feature.
        bias: Fit a constant per discarded number as well.
        sequence_len: Tokens per sequence.
        batch_size: Sequences per forward pass.
        num_tokens: At most so many tokens are used, held-out ones included.
        max_position: Positions are spread over [0, max_position); None = the model's context.
        recent_tokens: Recent tokens to keep exact, recorded for the server.
        shards: Head shards of a preset plan (tensor-parallel ranks).
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on the CPU, the model's own on CUDA), `float32` or `bfloat16`.
        seed: Seed of the position offsets.
        overwrite: Replace a checkpoint that is already at `out`.
        progress: Show a progress bar on stderr.

    Raises:
        ValueError: If a number is out of range or a word is unknown.
    """

    model: str
    data: str
    out: str
    plan: str = "local-0.5"
    rotation_block: int = 64
    ridge: float = 1e-4
    bias: bool = False
    sequence_len: int = 1024
    batch_size: int = 4
    num_tokens: int = 1_000_000
    max_position: int | None = None
    recent_tokens: int = 128
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
            "shards": 1,
            "seed": 0,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"{name}={value} is too small; it must be at least {minimum}")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"ridge={self.ridge} must be a number, at least 0, such as 1e-4")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.max_position is not None and self.max_position < self.sequence_len:
            raise ValueError(
                f"max_position={self.max_position} is smaller than "
                f"sequence_len={self.sequence_len}; raise the one or lower the other"
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
class TrainResult:
    """A finished run.

    Attributes:
        checkpoint: What was written.
        folder: Where it was written.
        errors: Errors of every layer that discards heads.
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

    @property
    def mean_key_error(self) -> float:
        """Mean over the discarding layers of the held-out key error."""
        return sum(errors.key for errors in self.errors.values()) / len(self.errors)

    @property
    def mean_value_error(self) -> float:
        """Mean over the discarding layers of the held-out value error."""
        return sum(errors.value for errors in self.errors.values()) / len(self.errors)
