"""The EchoKV checkpoint: a folder with `echokv.json` and `echokv.safetensors`.

`echokv.json` holds everything but the numbers: format version, plan, key space, windows, the
fingerprint of the base model, provenance, and the SHA-256 of the other file. `echokv.safetensors`
holds, for every layer that discards heads,

    layers.<i>.key         [num_discarded, feature_size, head_dim]
    layers.<i>.value       [num_discarded, feature_size, head_dim]
    layers.<i>.key_bias    [num_discarded, head_dim]   (optional, likewise value_bias)

with `feature_size` = source heads of one shard times `head_dim`. Row `j` belongs to the `j`-th
discarded head in ascending order. Example, `local-0.5` on 8 KV heads of 128, one shard: 4 discarded
heads, 512 features, so 4*512*128*4 bytes = 1 MiB for K and as much for V per layer in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from echokv_vllm.durable import write_folder
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.plan import EchoPlan, PlanError

FORMAT = "echokv"
FORMAT_VERSION = 1
CONFIG_FILE = "echokv.json"
TENSOR_FILE = "echokv.safetensors"
REPORT_FILE = "errors.md"
CURVES_FILE = "curves.csv"

_CONFIG_KEYS = (
    "format",
    "format_version",
    "plan",
    "rotation_block",
    "recent_tokens",
    "tensors_sha256",
    "fingerprint",
    "provenance",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign, or made for another model."""


@dataclass(frozen=True)
class LayerMaps:
    """Linear maps that rebuild the discarded heads of one layer.

    `K_hat = x_K @ key[j] + key_bias[j]` and likewise for V, where `x_K` is the concatenation of
    the source heads of the discarded head's shard in plan order, with keys in block-rotated space.

    Attributes:
        key: [num_discarded, feature_size, head_dim].
        value: Same shape.
        key_bias: [num_discarded, head_dim], or None.
        value_bias: Same shape, or None.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by attribute name."""
        tensors = {
            "key": self.key,
            "value": self.value,
            "key_bias": self.key_bias,
            "value_bias": self.value_bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class EchoCheckpoint:
    """Everything a server needs to rebuild discarded heads of one base model.

    Attributes:
        plan: Which heads are kept and what feeds the others.
        rotation_block: Tokens per rotation block B; keys are rotated by `position mod B`
            (1 = un-rotated, 0 = absolute rotation).
        recent_tokens: Most recent tokens that were meant to stay exact.
        maps: Maps of every layer that discards heads, all on the CPU and of one dtype.
        fingerprint: The base model.
        provenance: JSON-able record of how the checkpoint came to be.

    Raises:
        CheckpointError: If the parts do not fit together.
    """

    plan: EchoPlan
    rotation_block: int
    maps: dict[int, LayerMaps]
    fingerprint: ModelFingerprint
    recent_tokens: int = 128
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rotation_block", "recent_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise CheckpointError(f"{name}={value!r} must be a whole number, at least 0")
        for name in ("num_layers", "num_kv_heads"):
            in_plan, in_model = getattr(self.plan, name), getattr(self.fingerprint, name)
            if in_plan != in_model:
                raise CheckpointError(
                    f"the plan has {name}={in_plan} but the model has {name}={in_model}; train "
                    "with a plan made for this model"
                )
        _check_maps(self)

    @classmethod
    def load(
        cls, path_or_repo_id: str | os.PathLike[str], revision: str | None = None
    ) -> EchoCheckpoint:
        """Read and validate a checkpoint.

        Args:
            path_or_repo_id: A checkpoint folder, or `owner/name` on the Hugging Face hub.
            revision: Branch, tag or commit on the hub.

        Raises:
            CheckpointError: If there is no complete, intact checkpoint of this format there.
        """
        folder = _resolve(path_or_repo_id, revision)
        config = _read_config(folder)
        tensors = _read_tensors(folder, config["tensors_sha256"])
        try:
            plan = EchoPlan.from_dict(config["plan"])
            fingerprint = ModelFingerprint.from_dict(config["fingerprint"])
        except PlanError as error:
            raise CheckpointError(f"{folder / CONFIG_FILE} holds a bad plan: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
        return cls(
            plan=plan,
            rotation_block=config["rotation_block"],
            maps=_group_by_layer(tensors, folder / TENSOR_FILE),
            fingerprint=fingerprint,
            recent_tokens=config["recent_tokens"],
            provenance=config["provenance"],
        )

    def save(
        self,
        folder: str | os.PathLike[str],
        overwrite: bool = False,
        report: str | None = None,
        curves: str | None = None,
    ) -> Path:
        """Write the checkpoint so that `folder` is complete or untouched, or absent if the process
        is killed between two renames: what was overwritten is then beside it, `.NAME.old-*`.

        Args:
            folder: Where to put it; must be absent or empty unless `overwrite` is set. Where it is
                a symbolic link, the folder it points to is written and the link stays.
            overwrite: Replace a checkpoint that is already there.
            report: Text of an extra file `errors.md`.
            curves: Text of an extra file `curves.csv`.

        Returns:
            The folder, symbolic links followed.

        Raises:
            CheckpointError: If the folder may not be written to (see `check_destination`).
            OSError: If the file system refuses, for example because it is full.
        """
        import safetensors.torch

        target = check_destination(folder, overwrite)
        payload = safetensors.torch.save(
            {
                f"layers.{layer}.{name}": tensor.detach().cpu().contiguous()
                for layer, maps in sorted(self.maps.items())
                for name, tensor in maps.named().items()
            }
        )
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "plan": self.plan.to_dict(),
            "rotation_block": self.rotation_block,
            "recent_tokens": self.recent_tokens,
            "tensors_sha256": hashlib.sha256(payload).hexdigest(),
            "fingerprint": self.fingerprint.to_dict(),
            "provenance": self.provenance,
        }
        files = {TENSOR_FILE: payload, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()}
        for name, text in ((REPORT_FILE, report), (CURVES_FILE, curves)):
            if text is not None:
                files[name] = text.encode()
        write_folder(target, files, "the checkpoint")
        return target

    def check_model(self, fingerprint: ModelFingerprint) -> None:
        """Refuse a base model the maps were not trained for.

        Weight hashes are compared only where both are known.

        Raises:
            CheckpointError: Naming both values of every field that differs.
        """
        differences = self.fingerprint.differences(fingerprint)
        if differences:
            listed = "; ".join(
                f"{name}: checkpoint {ours!r}, model {theirs!r}"
                for name, (ours, theirs) in differences.items()
            )
            raise CheckpointError(
                f"the EchoKV checkpoint was made for another model ({listed}); use the model it "
                "was trained on, or run `echokv train` on this one"
            )


def check_destination(folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Refuse a destination that would lose something or cannot be replaced as a whole.

    Returns:
        The absolute path, symbolic links followed.

    Raises:
        CheckpointError: If `folder` is a file or a mount point, holds a checkpoint and `overwrite`
            is not set, or holds any file that is not part of a checkpoint.
    """
    # A link would itself be renamed, and what it points to left alone.
    target = Path(os.path.realpath(folder))
    if target.is_symlink():
        raise CheckpointError(
            f"{os.fspath(folder)!r} leads to {str(target)!r}, a symbolic link that leads back to "
            "itself; name a folder for the checkpoint"
        )
    if not target.exists():
        return target
    if not target.is_dir():
        raise CheckpointError(f"{str(target)!r} is a file; name a folder for the checkpoint")
    if os.path.ismount(target):
        raise CheckpointError(
            f"folder {str(target)!r} is a mount point, and a checkpoint is put in place by "
            "renaming its folder, which a mount point does not allow; name a folder inside it, "
            f"such as {str(target / 'checkpoint')!r}"
        )
    present = {entry.name for entry in target.iterdir()}
    foreign = sorted(present - {CONFIG_FILE, TENSOR_FILE, REPORT_FILE, CURVES_FILE})
    if foreign:
        raise CheckpointError(
            f"folder {str(target)!r} holds other files ({', '.join(foreign[:5])}); name a new or "
            "empty folder"
        )
    if present and not overwrite:
        raise CheckpointError(
            f"folder {str(target)!r} already holds a checkpoint; allow overwriting or name "
            "another folder"
        )
    return target


def _resolve(path_or_repo_id: str | os.PathLike[str], revision: str | None) -> Path:
    name = os.fspath(path_or_repo_id)
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} was given, but {name!r} is a local folder, which has no "
                "revisions; drop the revision"
            )
        return folder
    if not _REPO_ID.fullmatch(name):
        raise CheckpointError(
            f"there is no checkpoint folder {name!r}; give a folder written by `echokv train` or "
            "a Hugging Face repo id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        local = snapshot_download(
            name, revision=revision, allow_patterns=[CONFIG_FILE, TENSOR_FILE]
        )
    except (OSError, ValueError, HTTPError) as error:
        # The hub client derives its errors (not found, gated, offline) from the first two, and lets
        # those of its HTTP library through (a proxy that refuses, a connection that breaks).
        raise CheckpointError(
            f"{name!r} is no local folder and could not be fetched from the Hugging Face hub: "
            f"{error}"
        ) from error
    return Path(local)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(folder)!r} has no {CONFIG_FILE}, so it is no EchoKV checkpoint; give a folder "
            "written by `echokv train`"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch or train it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not of format {FORMAT!r}; give a folder written by `echokv train`"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {config.get('format_version')!r}, this version of "
            f"echokv_vllm reads {FORMAT_VERSION}; train it again or install the matching version"
        )
    if sorted(config) != sorted(_CONFIG_KEYS):
        raise CheckpointError(
            f"{path} has keys {sorted(config)}, expected are {sorted(_CONFIG_KEYS)}; fetch or "
            "train it again"
        )
    if not isinstance(config["provenance"], dict):
        raise CheckpointError(f"{path}: provenance must be a JSON object")
    return config


def _read_tensors(folder: Path, expected_sha256: str) -> dict[str, torch.Tensor]:
    import safetensors.torch
    from safetensors import SafetensorError

    path = folder / TENSOR_FILE
    try:
        payload = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(folder)!r} has no {TENSOR_FILE}; the checkpoint is incomplete, fetch or train "
            "it again"
        ) from error
    found = hashlib.sha256(payload).hexdigest()
    if found != expected_sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {found}, but {CONFIG_FILE} promises {expected_sha256}; the "
            "checkpoint is damaged or mixed from two, fetch or train it again"
        )
    try:
        return safetensors.torch.load(payload)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _group_by_layer(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[int, LayerMaps]:
    grouped: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(\d+)\.(key|value|key_bias|value_bias)", full_name)
        if match is None:
            raise CheckpointError(f"{path} holds a foreign tensor {full_name!r}")
        grouped.setdefault(int(match[1]), {})[match[2]] = tensor
    for layer, parts in grouped.items():
        missing = {"key", "value"} - set(parts)
        if missing:
            raise CheckpointError(f"{path}: layer {layer} lacks {sorted(missing)}")
    return {layer: LayerMaps(**parts) for layer, parts in sorted(grouped.items())}


def _check_maps(checkpoint: EchoCheckpoint) -> None:
    plan = checkpoint.plan
    discarding = [layer for layer in range(plan.num_layers) if plan.discarded(layer)]
    if sorted(checkpoint.maps) != discarding:
        raise CheckpointError(
            f"the plan discards heads in layers {discarding}, but there are maps for layers "
            f"{sorted(checkpoint.maps)}"
        )
    head_dim = checkpoint.fingerprint.head_dim
    dtype = checkpoint.maps[discarding[0]].key.dtype
    for layer, maps in checkpoint.maps.items():
        num_discarded = len(plan.discarded(layer))
        feature_size = len(plan.source_heads(layer, shard=0)) * head_dim
        for name, tensor in maps.named().items():
            where = f"layer {layer} {name}"
            bias = name.endswith("_bias")
            shape = (num_discarded, head_dim) if bias else (num_discarded, feature_size, head_dim)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{where} has shape {tuple(tensor.shape)}, the plan needs {shape}"
                )
            if tensor.dtype != dtype or dtype not in _DTYPES:
                raise CheckpointError(
                    f"{where} is {tensor.dtype}; allowed is one of {_DTYPES} for all tensors alike"
                )
            if not math.isfinite(tensor.abs().max().item()):
                raise CheckpointError(f"{where} holds NaN or infinite numbers; train it again")
