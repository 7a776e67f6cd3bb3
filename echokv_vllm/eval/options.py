"""What an evaluation is asked to do. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields

DTYPES = ("auto", "float32", "bfloat16")
KV_CACHE_DTYPES = ("auto", "fp8", "int4")
RESIDUAL_BITS = (0, 2)
ENDPOINT_MODES = ("compressed", "auto", "as-is")

# What is measured, how it is asked for, and the options that speak of nothing else.
_PARTS = (
    ("data", "held-out text (--data FILE)", ("length", "skip_tokens")),
    ("tasks", "tasks (--tasks NAME)", ("task_lengths",)),
    ("qa_1", "that task (--tasks ruler, or qa_1)", ("squad",)),
    ("qa_2", "that task (--tasks ruler, or qa_2)", ("hotpotqa",)),
    ("haystack", "tasks (--tasks NAME) or the heat map (--heatmap)", ("essays",)),
    (
        "heatmap",
        "the heat map (--heatmap)",
        ("heatmap_lengths", "heatmap_depths", "heatmap_samples", "heatmap_png"),
    ),
    (
        "longbench",
        "LongBench (--longbench SOURCE)",
        ("longbench_tasks", "longbench_length", "longbench_samples", "chat_template"),
    ),
    ("answers", "tasks, the heat map or LongBench", ("endpoint",)),
    ("endpoint", "a server (--endpoint URL)", ("endpoint_mode", "served_model", "concurrency")),
    ("model", "the model that runs here", ("offset_max", "every_query")),
)


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
        squad: Data of task `qa_1`: SQuAD 2.0 as a JSON file or hub dataset.
        hotpotqa: Data of task `qa_2`: HotpotQA as a JSON file or hub dataset.
        heatmap: Measure one needle over lengths and depths.
        heatmap_lengths: Its lengths; empty = eight, evenly up to the model's context.
        heatmap_depths: Its number of depths.
        heatmap_samples: Prompts per length and depth.
        heatmap_png: Draw it as well; needs matplotlib and a folder to write to.
        longbench: LongBench v1: a folder, `data.zip` or a hub dataset; None leaves it out.
        longbench_tasks: Some of its tasks; empty = all sixteen.
        longbench_length: Tokens of prompt and answer, beyond which a prompt loses its middle; None
            = the model's context.
        longbench_samples: Examples per task, the first ones; None = all.
        chat_template: Use the tokenizer's chat template where LongBench does.
        samples: Sequences of the divergence, and prompts per task and length.
        length: Tokens per sequence of the divergence.
        skip_tokens: Predictions before this position are not scored; None = min(256, length / 2).
        every_query: Compress the context of every query. Without it the divergence compresses from
            `skip_tokens` on, the tasks from the last prompt token on. None = the measure's own
            default: every query in the divergence, exact prefill in the tasks.
        offset_max: Shift the positions of a sample by a random offset up to this many tokens.
        recent_tokens: Recent tokens that stay exact; None = the checkpoint's.
        sink_tokens: First tokens that stay exact.
        kv_cache_dtype: Format of the cache that is simulated (see `echokv_vllm.quantization`):
            `fp8` and `int4` round all that the cache returns, window and retained heads included.
            Without a checkpoint the quantised full cache is measured.
        residual_bits: 2 keeps a coded copy of what the reconstruction gets wrong for every
            discarded head (simulated), 0 keeps none.
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
    squad: str | None = None
    hotpotqa: str | None = None
    heatmap: bool = False
    heatmap_lengths: tuple[int, ...] = ()
    heatmap_depths: int = 11
    heatmap_samples: int = 5
    heatmap_png: bool = False
    longbench: str | None = None
    longbench_tasks: tuple[str, ...] = ()
    longbench_length: int | None = None
    longbench_samples: int | None = None
    chat_template: bool = True
    samples: int = 32
    length: int = 768
    skip_tokens: int | None = None
    every_query: bool | None = None
    offset_max: int = 0
    recent_tokens: int | None = None
    sink_tokens: int = 4
    kv_cache_dtype: str = "auto"
    residual_bits: int = 0
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
            "heatmap_depths": 2,
            "heatmap_samples": 1,
            "longbench_length": 1,
            "longbench_samples": 2,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name}={value} is too small; it must be at least {minimum}")
        for name, allowed in (
            ("dtype", DTYPES),
            ("endpoint_mode", ENDPOINT_MODES),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("residual_bits", RESIDUAL_BITS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} is not one of {', '.join(str(word) for word in allowed)}"
                )
        self._check_simulation()
        if self.data is None and not self.asks:
            raise ValueError(
                "nothing to measure: name held-out text with data (--data FILE) for the "
                "divergence, tasks (--tasks ruler) for the task scores, a needle heat map "
                "(--heatmap), LongBench data (--longbench zai-org/LongBench), or several of them"
            )
        self._check_used()
        if self.tasks and not self.task_lengths:
            raise ValueError("task_lengths is empty; give at least one length, such as 1024")
        if self.skip >= self.length - 1:
            raise ValueError(
                f"skip_tokens={self.skip} leaves nothing to score in sequences of "
                f"length={self.length}; lower the one or raise the other"
            )

    def _check_used(self) -> None:
        """An option that nothing reads is a mistake: the report would be taken for another one."""
        measured = {
            "data": self.data is not None,
            "tasks": bool(self.tasks),
            "qa_1": bool({"ruler", "qa_1"} & set(self.tasks)),
            "qa_2": bool({"ruler", "qa_2"} & set(self.tasks)),
            "haystack": bool(self.tasks) or self.heatmap,
            "heatmap": self.heatmap,
            "longbench": self.longbench is not None,
            "answers": self.asks,
            "endpoint": self.endpoint is not None,
            "model": self.data is not None or self.endpoint is None,
        }
        defaults = {field.name: field.default for field in fields(self)}
        for part, asked_for, names in _PARTS:
            for name in names:
                value = getattr(self, name)
                if value != defaults[name] and not measured[part]:
                    raise ValueError(
                        f"{name}={value!r} is about {asked_for}, which is not measured; ask for "
                        "it, or leave the option out"
                    )

    def _check_simulation(self) -> None:
        """What is simulated in the Hugging Face forward pass and needs what."""
        if self.residual_bits and self.checkpoint is None:
            raise ValueError(
                f"residual_bits={self.residual_bits} codes what a reconstruction gets wrong, but "
                "there is no checkpoint; name one"
            )
        simulated = self.kv_cache_dtype != "auto" or self.residual_bits != 0
        if simulated and self.asks and self.endpoint is not None:
            raise ValueError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} and "
                f"residual_bits={self.residual_bits} are simulated here, but the endpoint "
                "answers with its own cache; start the server with the cache to measure, or drop "
                "the endpoint"
            )

    @property
    def asks(self) -> bool:
        """Whether prompts are answered."""
        return bool(self.tasks) or self.heatmap or self.longbench is not None

    @property
    def skip(self) -> int:
        """First scored position."""
        return min(256, self.length // 2) if self.skip_tokens is None else self.skip_tokens
