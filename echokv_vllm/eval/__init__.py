"""Evaluation: what an EchoKV checkpoint costs in quality. Never imports vLLM."""

from __future__ import annotations

from typing import Any

from echokv_vllm.eval.options import EvalOptions

__all__ = ["EvalOptions", "evaluate"]


def evaluate(options: EvalOptions, command: str | None = None) -> dict[str, Any]:
    """Measure what `options` ask for.

    Args:
        options: What to do.
        command: Command line to record in the report.

    Returns:
        The report as JSON-able data; `echokv_vllm.eval.report` draws its table.

    Raises:
        ValueError: If the model, checkpoint, data, a task or an endpoint cannot be used.
        OSError: If a file cannot be read.
    """
    # torch and transformers load here, so that importing the package stays cheap.
    from echokv_vllm.eval.run import run_evaluation

    return run_evaluation(options, command)
