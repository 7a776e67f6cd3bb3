"""The server's EchoKV options: ``--additional-config '{"echokv": {...}}'``, read once.

Worker and scheduler live in different processes. The worker parses the user's
dictionary into an :class:`EchoConfig`; what the scheduler needs to know travels inside
the KV cache spec as a :class:`SchedulerSettings` JSON string, because a spec is the only
thing both sides are guaranteed to share.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

MODES = ("auto", "full", "compressed")
DOCS = "docs/configuration.md"


class EchoConfigError(ValueError):
    """An option or a request parameter that EchoKV does not accept."""


def check_mode(mode: Any, where: str) -> str:
    """Returns ``mode`` when it is one of :data:`MODES`.

    Args:
        mode: The value a user gave.
        where: What the value belongs to, for the message.

    Raises:
        EchoConfigError: Any other value.
    """
    if mode not in MODES:
        raise EchoConfigError(
            f"{where} is {mode!r}; allowed are 'auto', 'full' and 'compressed'. "
            "Leave it out to use the server's default."
        )
    return str(mode)


@dataclass(frozen=True)
class EchoConfig:
    """Options of one server, as documented in docs/configuration.md.

    Attributes:
        checkpoint: Folder or Hugging Face repository id written by ``echokv train``.
        revision: Revision of the repository, when ``checkpoint`` is one.
        mode: Mode of requests that do not name one.
        recent_tokens: Tokens at the end of a compressed request whose discarded heads
            stay exact. None takes the number the checkpoint was trained for.
        admit_full_below: An ``auto`` request starts full when the share of the pool in
            use, counting the request, stays at or below this.
        restore_below: Compressed ``auto`` requests keep the residuals of new tokens
            again once the share in use has been below this ...
        restore_steps: ... for this many scheduler steps in a row.
        strict_prefix_caching: True: only K/V computed from exact K/V are shared. False:
            every block is shared, and requests pinned to ``full`` do not read the
            prefix cache. None: True, except under ``mode: "compressed"``.
        look_ahead: A request waits while those that run are expected to need the pages it
            would take. False: vLLM's rule, a request starts as soon as its prompt fits.
            None: True, except under ``mode: "full"``.
        step_kinds: Steps that are wholly full or wholly compressed leave out what they do
            not need, with CUDA graphs of their own. False: every step runs everything, with
            a third of the graphs.
    """

    checkpoint: str
    revision: str | None = None
    mode: str = "auto"
    recent_tokens: int | None = None
    admit_full_below: float = 0.9
    restore_below: float = 0.7
    restore_steps: int = 64
    strict_prefix_caching: bool | None = None
    look_ahead: bool | None = None
    step_kinds: bool = True

    def __post_init__(self) -> None:
        _check_type("checkpoint", self.checkpoint, str)
        if self.revision is not None:
            _check_type("revision", self.revision, str)
        check_mode(self.mode, "The option echokv.mode")
        if self.recent_tokens is not None:
            _check_type("recent_tokens", self.recent_tokens, int)
            if self.recent_tokens < 0:
                raise EchoConfigError(
                    f"echokv.recent_tokens is {self.recent_tokens}; it must be 0 or more."
                )
        for name in ("admit_full_below", "restore_below"):
            value = getattr(self, name)
            _check_type(name, value, (int, float))
            if not 0 <= value <= 1:
                raise EchoConfigError(f"echokv.{name} is {value}; it must lie in [0, 1].")
        if self.restore_below > self.admit_full_below:
            raise EchoConfigError(
                f"echokv.restore_below ({self.restore_below}) is above admit_full_below "
                f"({self.admit_full_below}); requests would switch back and forth. Lower "
                "restore_below."
            )
        _check_type("restore_steps", self.restore_steps, int)
        if self.restore_steps < 1:
            raise EchoConfigError(
                f"echokv.restore_steps is {self.restore_steps}; it must be 1 or more."
            )
        for name in ("strict_prefix_caching", "look_ahead"):
            if getattr(self, name) is not None:
                _check_type(name, getattr(self, name), bool)
        _check_type("step_kinds", self.step_kinds, bool)

    @property
    def strict(self) -> bool:
        """Whether inexact K/V stay out of the prefix cache."""
        if self.strict_prefix_caching is not None:
            return self.strict_prefix_caching
        return self.mode != "compressed"

    @property
    def looks_ahead(self) -> bool:
        """Whether admission waits for what running requests are expected to need."""
        return self.mode != "full" if self.look_ahead is None else self.look_ahead

    @classmethod
    def parse(cls, additional_config: Any) -> EchoConfig:
        """Builds the options from vLLM's ``additional_config``.

        Raises:
            EchoConfigError: No ``echokv`` section, no checkpoint, an unknown key or a
                value out of range.
        """
        section = additional_config.get("echokv") if isinstance(additional_config, dict) else None
        if section is None:
            raise EchoConfigError(
                "The echokv attention backend needs a checkpoint: add --additional-config "
                '\'{"echokv": {"checkpoint": "FOLDER_OR_REPO_ID"}}\'. `echokv train MODEL` '
                "writes one."
            )
        if not isinstance(section, dict):
            raise EchoConfigError(
                f"additional_config['echokv'] is {section!r}; it must be an object ({DOCS})."
            )
        allowed = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(section) - set(allowed))
        if unknown:
            raise EchoConfigError(
                f"Unknown echokv option {', '.join(map(repr, unknown))}; allowed are "
                f"{', '.join(allowed)} ({DOCS})."
            )
        if "checkpoint" not in section:
            raise EchoConfigError(
                "The option echokv.checkpoint is missing: the folder or Hugging Face "
                "repository id of a checkpoint written by `echokv train MODEL`."
            )
        return cls(**section)

    @staticmethod
    def refuse_unused(additional_config: Any) -> None:
        """Refuses options of EchoKV on a server that runs another attention backend.

        Raises:
            EchoConfigError: There is an ``echokv`` section, which nothing would read.
        """
        if isinstance(additional_config, dict) and "echokv" in additional_config:
            raise EchoConfigError(
                "--additional-config has a section 'echokv', but the attention backend is another "
                "one, which would ignore it. Add --attention-backend echokv, or leave the section "
                f"out ({DOCS})."
            )


def _check_type(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    # bool is an int in Python; an option that counts must not accept true.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise EchoConfigError(f"echokv.{name} is {value!r}; it must be of type {wanted}.")


@dataclass(frozen=True)
class SchedulerSettings:
    """What the two KV cache managers need to know, derived by the worker.

    Attributes:
        mode: Default mode.
        recent_tokens: Width of the exact window, in tokens.
        admit_full_below: See :class:`EchoConfig`.
        restore_below: See :class:`EchoConfig`.
        restore_steps: See :class:`EchoConfig`.
        strict: Whether inexact K/V stay out of the prefix cache.
        look_ahead: Whether admission waits for what running requests are expected to need.
        watermark: vLLM's own ``--watermark``: the share of blocks it keeps free when it
            admits a request. Managers cannot see it, and freeing less would stall.
        retained_block_size: Tokens per R page.
        residual_block_size: Tokens per D page.
        plan: Name of the echo plan, for the log line.
        ratio: Compressed bytes per token / full bytes per token.
    """

    mode: str
    recent_tokens: int
    admit_full_below: float
    restore_below: float
    restore_steps: int
    strict: bool
    look_ahead: bool
    watermark: float
    retained_block_size: int
    residual_block_size: int
    plan: str
    ratio: float

    def to_json(self) -> str:
        """A hashable form: specs are frozen dataclasses that vLLM compares and hashes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SchedulerSettings:
        """The settings a spec carries."""
        return cls(**json.loads(text))

    def floor_pages(self, num_tokens: int, num_batches: int = 1) -> int:
        """D pages a compressed request of ``num_tokens`` can hold at once.

        The sink page, the window of the step being scheduled, and one window for each step
        that ends before it and may not be done yet, or is read by the next chunk.

        Args:
            num_tokens: Length of the request.
            num_batches: Steps vLLM may have under way at once.
        """
        window = -(-self.recent_tokens // self.residual_block_size) + 1
        num_pages = -(-num_tokens // self.residual_block_size)
        return min(num_pages, 1 + (num_batches + 1) * window)
