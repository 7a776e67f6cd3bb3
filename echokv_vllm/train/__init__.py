"""Training of EchoKV maps: stage I in closed form. Never imports vLLM."""

from __future__ import annotations

from echokv_vllm.train.options import LayerErrors, TrainOptions, TrainResult

__all__ = ["LayerErrors", "TrainOptions", "TrainResult", "train"]


def train(options: TrainOptions, command: str | None = None) -> TrainResult:
    """Fit the maps of an echo plan to a model and write an EchoKV checkpoint.

    Args:
        options: What to do.
        command: Command line to record in the checkpoint's provenance.

    Raises:
        ValueError: If the model, plan, data or destination cannot be used; nothing was written.
        OSError: If a file cannot be read or written.
    """
    # torch and transformers load here, so that importing the package stays cheap.
    from echokv_vllm.train.run import run_training

    return run_training(options, command)
