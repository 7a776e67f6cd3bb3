"""The state of an unfinished training run: one file beside the checkpoint folder.

`.<name>.training` is a safetensors file. Its tensors are all that the next step depends on; its
metadata holds one JSON object with what the run was asked to do (`identity`) and how far it got
(`record`). It is replaced as a whole and deleted when the checkpoint is there.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from echokv_vllm.durable import write_file

_FORMAT = "echokv-training-2"


@dataclass(frozen=True)
class SavedState:
    """What was saved last.

    Attributes:
        tensors: By name, on the CPU.
        record: JSON-able.
    """

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]


class StateFile:
    """Reads and writes the state of one run.

    Args:
        out: Folder of the checkpoint to be, symbolic links followed.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f".{out.name}.training")

    def check_absent(self) -> None:
        """Refuse to start anew over an unfinished run.

        Raises:
            ValueError: If there is one.
        """
        if self.path.exists():
            raise ValueError(
                f"an unfinished training run lies in {str(self.path)!r}; continue it with resume, "
                "or start anew with overwrite"
            )

    def load(self, identity: dict[str, Any]) -> SavedState | None:
        """The state of the run described by `identity`, None if there is none.

        Raises:
            ValueError: If the file is damaged or belongs to another run; names what differs.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                text = (file.metadata() or {}).get(_FORMAT)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(self._damaged(str(error))) from error
        if text is None:
            raise ValueError(self._damaged(f"it is not of format {_FORMAT}"))
        content = json.loads(text)
        self._compare(content["identity"], identity)
        return SavedState(tensors, content["record"])

    def save(
        self, identity: dict[str, Any], tensors: dict[str, torch.Tensor], record: dict[str, Any]
    ) -> None:
        """Replace the state; after an error the previous one is still there.

        Raises:
            OSError: If the file system refuses, for example because it is full.
        """
        import safetensors.torch

        text = json.dumps({"identity": identity, "record": record})
        payload = safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={_FORMAT: text},
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.name}-{uuid.uuid4().hex[:8]}")
        try:
            write_file(fresh, payload)
            os.replace(fresh, self.path)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; the training state was not saved, an earlier one is untouched",
                str(self.path),
            ) from error
        finally:
            fresh.unlink(missing_ok=True)

    def delete(self) -> None:
        """Remove the file if there is one."""
        self.path.unlink(missing_ok=True)

    def _compare(self, saved: dict[str, Any], asked: dict[str, Any]) -> None:
        differing = [
            f"{name} was {saved.get(name)!r} and is now {asked.get(name)!r}"
            for name in sorted({*saved, *asked})
            if saved.get(name) != asked.get(name)
        ]
        if differing:
            raise ValueError(
                f"the unfinished run in {str(self.path)!r} was started differently "
                f"({'; '.join(differing)}); resume with the same options, or start anew with "
                "overwrite"
            )

    def _damaged(self, why: str) -> str:
        return (
            f"training state {str(self.path)!r} cannot be read ({why}); delete it, or start anew "
            "with overwrite"
        )
