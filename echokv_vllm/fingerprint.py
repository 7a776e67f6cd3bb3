"""Identity of a base model: what must match before a checkpoint's maps may touch its cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from echokv_vllm.rope import head_dim_of, normalized_rope

# Enough bytes to tell two trainings of one shape apart, few enough to read in no time.
_HASHED_BYTES_PER_TENSOR = 64 * 1024
# A safetensors header is metadata only; anything longer means that the file is something else.
_MAX_HEADER_BYTES = 100 * 1024 * 1024
# Dtypes whose bytes are the weights. A quantized copy of a base model may keep the tensors' names
# and hold codes, which say nothing about what they were made from.
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ModelFingerprint:
    """Shape, rotary embedding and a sample of the weights of a base model.

    Attributes:
        architecture: First entry of the config's `architectures`.
        num_layers: Decoder layers.
        num_attention_heads: Query heads per layer.
        num_kv_heads: KV heads per layer.
        head_dim: Numbers per head.
        hidden_size: Width of the residual stream.
        rope: Output of `normalized_rope`.
        weights_sha256: Hex digest over the raw bytes of (up to) the first 64 KiB of the K and V
            projection weights of the first and the last layer, or None when the files were not at
            hand or hold quantized weights. It depends on the stored dtype.
    """

    architecture: str
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    rope: dict[str, Any]
    weights_sha256: str | None = None

    @classmethod
    def from_config(
        cls,
        hf_config: Any,
        model_path: str | os.PathLike[str] | None = None,
        revision: str | None = None,
    ) -> ModelFingerprint:
        """Fingerprint a model from its Hugging Face config and, when at hand, its weights.

        Args:
            hf_config: Config of a decoder-only model.
            model_path: Model folder, or a repo id looked up in the local Hugging Face cache;
                nothing is downloaded.
            revision: Revision of the repo id.

        Raises:
            ValueError: If the config lacks `architectures`, its rotary type is unsupported, or a
                weight file is damaged.
        """
        architectures = getattr(hf_config, "architectures", None)
        if not architectures:
            raise ValueError(
                "the model's config names no architecture; load it from a model folder whose "
                "config.json has an 'architectures' entry"
            )
        num_heads = int(hf_config.num_attention_heads)
        num_layers = int(hf_config.num_hidden_layers)
        weights = None
        if model_path is not None:
            weights = weights_sha256(model_path, num_layers, revision)
        return cls(
            architecture=str(architectures[0]),
            num_layers=num_layers,
            num_attention_heads=num_heads,
            num_kv_heads=int(getattr(hf_config, "num_key_value_heads", None) or num_heads),
            head_dim=head_dim_of(hf_config),
            hidden_size=int(hf_config.hidden_size),
            rope=normalized_rope(hf_config),
            weights_sha256=weights,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ModelFingerprint:
        """Parse what `to_dict` wrote.

        Raises:
            ValueError: If a key is missing or unknown, or a value has the wrong type.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"fingerprint must be a JSON object, got {type(data).__name__}")
        names = [field.name for field in fields(cls)]
        if sorted(data) != sorted(names):
            raise ValueError(f"fingerprint has keys {sorted(data)}; expected are {sorted(names)}")
        types: dict[str, tuple[type, ...]] = {
            "architecture": (str,),
            "rope": (dict,),
            "weights_sha256": (str, type(None)),
        }
        for name in names:
            if not isinstance(data[name], types.get(name, (int,))):
                raise ValueError(f"fingerprint field {name} has an unusable value {data[name]!r}")
        return cls(**data)

    def differences(self, other: ModelFingerprint) -> dict[str, tuple[Any, Any]]:
        """Fields whose values differ, as `{name: (own, other)}`.

        An unknown weight hash on either side is no difference: it means that the weights were not
        at hand, not that they are others.
        """
        found = {}
        for field in fields(self):
            own, theirs = getattr(self, field.name), getattr(other, field.name)
            unknown = field.name == "weights_sha256" and None in (own, theirs)
            if own != theirs and not unknown:
                found[field.name] = (own, theirs)
        return found


def weights_sha256(
    model_path: str | os.PathLike[str], num_layers: int, revision: str | None = None
) -> str | None:
    """Hash a sample of a model's K and V projections, straight from its safetensors files.

    Returns:
        Hex digest, or None when the folder (or the local cache of the repo id) does not hold the
        safetensors files, or the tensors have other names or are quantized.

    Raises:
        ValueError: If a file is not valid safetensors.
    """
    names = [
        f"model.layers.{layer}.self_attn.{projection}.weight"
        for layer in (0, num_layers - 1)
        for projection in ("k_proj", "v_proj")
    ]
    digest = hashlib.sha256()
    for name in names:
        path = _file_of_tensor(model_path, name, revision)
        sample = None if path is None else _read_tensor_start(path, name)
        if sample is None:
            return None
        digest.update(sample)
    return digest.hexdigest()


def _local_file(
    model_path: str | os.PathLike[str], filename: str, revision: str | None
) -> Path | None:
    folder = Path(model_path)
    if folder.is_dir():
        path = folder / filename
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(model_path), filename, revision=revision)
    except HFValidationError:
        # Neither a folder nor a possible repo id, for example a GGUF file or a bucket address.
        return None
    return Path(cached) if isinstance(cached, str) else None


def _file_of_tensor(
    model_path: str | os.PathLike[str], name: str, revision: str | None
) -> Path | None:
    index = _local_file(model_path, "model.safetensors.index.json", revision)
    if index is None:
        return _local_file(model_path, "model.safetensors", revision)
    try:
        filename = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"weight index {str(index)!r} is damaged: {error}") from error
    return None if filename is None else _local_file(model_path, filename, revision)


def _read_tensor_start(path: Path, name: str) -> bytes | None:
    """First bytes of one tensor; None when the file does not hold it, or a quantized one."""
    with path.open("rb") as file:
        header = _read_header(file, path)
        entry = header.get(name)
        if entry is None or entry["dtype"] not in _WEIGHT_DTYPES:
            return None
        start, end = entry["data_offsets"]
        file.seek(start, os.SEEK_CUR)
        length = min(end - start, _HASHED_BYTES_PER_TENSOR)
        sample = file.read(length)
    if len(sample) != length:
        raise ValueError(f"weight file {str(path)!r} ends inside {name}; fetch the model again")
    return sample


def _read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Parse the header and leave the file at the first data byte."""
    num_bytes = int.from_bytes(file.read(8), "little")
    if not 2 <= num_bytes <= _MAX_HEADER_BYTES:
        raise ValueError(f"weight file {str(path)!r} is not safetensors; fetch the model again")
    try:
        header = json.loads(file.read(num_bytes))
    except ValueError as error:
        raise ValueError(
            f"weight file {str(path)!r} has a damaged header; fetch the model again"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"weight file {str(path)!r} has a damaged header; fetch the model again")
    return header
