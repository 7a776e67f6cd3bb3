"""Where a training run writes; what would fail at its end is refused before it starts."""

from __future__ import annotations

import os
from pathlib import Path

from echokv_vllm.checkpoint import check_destination
from echokv_vllm.durable import try_folder
from echokv_vllm.train.curves import summary_writer
from echokv_vllm.train.options import TrainOptions
from echokv_vllm.train.state import StateFile


def prepare_destination(options: TrainOptions) -> tuple[Path, StateFile]:
    """Check every path the run writes to and what writes there; try the checkpoint's folder.

    Returns:
        The checkpoint folder, symbolic links followed, and the file of the run's state.

    Raises:
        ValueError: If something would be lost: a checkpoint, other files, an unfinished run, or
            the curves. If TensorBoard is asked for and not installed.
        OSError: If the file system refuses.
    """
    out = check_destination(options.out, options.overwrite)
    _check_curves(options, out)
    if options.tensorboard is not None:
        summary_writer(options.tensorboard)
    state_file = StateFile(out)
    if not (options.resume or options.overwrite):
        state_file.check_absent()
    try_folder(out, "the checkpoint")
    return out, state_file


def _check_curves(options: TrainOptions, out: Path) -> None:
    """The checkpoint replaces its folder as a whole, with all that was written into it before."""
    for name, remedy in (
        ("curves", f"{options.out}.csv; the checkpoint gets a copy, curves.csv, in any case"),
        ("tensorboard", f"{options.out}-tensorboard"),
    ):
        value = getattr(options, name)
        if value is None:
            continue
        path = Path(os.path.realpath(value))
        if path == out or out in path.parents:
            raise ValueError(
                f"{name}={value!r} lies in the checkpoint folder out={options.out!r}, which is "
                f"replaced as a whole when training ends; name a place outside it, such as {remedy}"
            )
        if name == "curves" and path in out.parents:
            raise ValueError(
                f"curves={value!r} is a file, but the checkpoint folder out={options.out!r} lies "
                f"in a folder of that name; name another file, such as {remedy}"
            )
