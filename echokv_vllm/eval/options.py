"""What an evaluation is asked to do. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("auto", "float32", "bfloat16")
ENDPOINT_MODES = ("compressed", "auto", "as-is")


@dataclass(frozen=True)
class EvalOptions:
    """One evaluation; the fields are the options of `echokv eval`.

    Attributes:
        model: Folder of a Hugging Face model, or a repo id.
        checkpoint: EchoKV checkpoint folder or repo id; None measures the full cache alone.
        data: Held-out text for the divergence, in the forms `echokv train` takes; None leaves the
            divergence out.
        tasks: Names of tasks (see `echokv_vllm.eval.tasks`); empty leaves the tasks out.
        task_lengths: Tokens of prompt and answer together, one table row per task and length.
        essays: Text file with the haystack of the essay tasks; None generates sentences.
        samples: Sequences of the divergence, and prompts per task and length.
        length: Tokens per sequence of the divergence.
        skip_tokens: Predictions before this position are not scored; None = min(256, length / 2).
        every_query: Compress the context of every query. Without it the divergence compresses from
            `skip_tokens` on, the tasks from the last prompt token on. None = the measure's own
            default: every query in the divergence, exact prefill in the tasks.
        offset_max: Shift the positions of a sample by a random offset up to this many tokens.
        recent_tokens: Recent tokens that stay exact; None = the checkpoint's.
        sink_tokens: First tokens that stay exact.
        endpoint: URL of an OpenAI-compatible server that answers the tasks instead of the
            Hugging Face model, such as `http://localhost:8000/v1`.
        endpoint_mode: Mode asked of the endpoint beside `full`, or `as-is`: send no mode, and
            measure the endpoint as it stands.
        served_model: Model name at the endpoint; None = the first one it lists.
        concurrency: Requests in flight at the endpoint.
        batch_size: Sequences per forward pass of the divergence.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: Of the model; `auto` is float32 whatever the device.
        seed: Seed of sequences, offsets, prompts and intervals.
        progress: Show progress on stderr.

    Raises:
        ValueError: If a number is out of range, a word is unknown or options contradict.
    """

    model: str
    checkpoint: str | None = None
    data: str | None = None
    tasks: tuple[str, ...] = ()
    task_lengths: tuple[int, ...] = (1024,)
    essays: str | None = None
    samples: int = 32
    length: int = 768
    skip_tokens: int | None = None
    every_query: bool | None = None
    offset_max: int = 0
    recent_tokens: int | None = None
    sink_tokens: int = 4
    endpoint: str | None = None
    endpoint_mode: str = "compressed"
    served_model: str | None = None
    concurrency: int = 4
    batch_size: int = 4
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        minimums = {
            "samples": 2,  # one sample has no interval
            "length": 4,
            "skip_tokens": 0,
            "offset_max": 0,
            "recent_tokens": 0,
            "sink_tokens": 0,
            "concurrency": 1,
            "batch_size": 1,
            "seed": 0,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name}={value} is too small; it must be at least {minimum}")
        for name, allowed in (("dtype", DTYPES), ("endpoint_mode", ENDPOINT_MODES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if self.data is None and not self.tasks:
            raise ValueError(
                "nothing to measure: name held-out text with data (--data FILE) for the "
                "divergence, tasks (--tasks ruler) for the task scores, or both"
            )
        if self.tasks and not self.task_lengths:
            raise ValueError("task_lengths is empty; give at least one length, such as 1024")
        if self.skip >= self.length - 1:
            raise ValueError(
                f"skip_tokens={self.skip} leaves nothing to score in sequences of "
                f"length={self.length}; lower the one or raise the other"
            )

    @property
    def skip(self) -> int:
        """First scored position."""
        return min(256, self.length // 2) if self.skip_tokens is None else self.skip_tokens
