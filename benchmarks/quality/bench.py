"""The model under test, its data, and the caches of the rows, with their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from eviction import EvictingCache
from exact_window import ExactWindow
from head_copy import copy_checkpoint
from hybrid_values import tune_values
from low_rank import LowRankCache
from moments import Moments, collect
from one_sided import OneSided
from pruned_keys import HybridCache, PromptPrunedKeys, PrunedKeys
from rows import Row

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.eval.attention import ContextMaker, Window, install
from echokv_vllm.eval.divergence import draw_sequences
from echokv_vllm.eval.rebuild import HeadRebuilder, QuantizedCache, Rebuilder
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.quantization import bytes_per_number
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train.data import load_tokens
from echokv_vllm.train.model import load_config, load_model, load_tokenizer

Cache = Rebuilder | ContextMaker

_TUNING_SEQUENCES = 128


@dataclass(frozen=True)
class Bytes:
    """What a cache holds of a token outside the window.

    Attributes:
        shares: Format to the share of the full cache's numbers that is held in it.
        full_size: Numbers per token of the full cache.
    """

    shares: Mapping[str, float]
    full_size: int

    def ratio(self, head_dim: int) -> float:
        """Bytes over those of the full cache in 16 bits, scales for heads of `head_dim`."""
        return sum(
            share * bytes_per_number(name, head_dim) / 2 for name, share in self.shares.items()
        )

    def per_token(self, head_dim: int) -> float:
        return self.ratio(head_dim) * 2 * self.full_size


class Bench:
    """A model in float32 and what is measured on it.

    Args:
        model: Folder or repo id.
        calibration: Text the baselines may learn from.
        heldout: Text the divergence is measured on.
        device: Where to.
        num_sequences: Sequences of the divergence.
        length: Tokens of each.
        offset_max: Positions are shifted by up to this.
        window: Exact tokens.
        calibration_tokens: Tokens of the calibration text for the baselines.
        seed: Of sequences and offsets.
    """

    def __init__(
        self,
        model: str,
        calibration: str,
        heldout: str,
        device: torch.device,
        *,
        num_sequences: int,
        length: int,
        offset_max: int,
        window: Window,
        calibration_tokens: int,
        seed: int = 0,
    ) -> None:
        config = load_config(model)
        self.tokenizer = load_tokenizer(model)
        self.model = load_model(model, device, torch.float32)
        install(self.model)
        self.fingerprint = ModelFingerprint.from_config(config, model)
        self.rotary = rotary_from_config(config).to(device)
        self.window = window
        self.device = device
        self.sequences = draw_sequences(heldout, self.tokenizer, num_sequences, length, seed)
        generator = torch.Generator().manual_seed(seed)
        self.offsets = torch.randint(offset_max + 1, (num_sequences,), generator=generator)
        # The prompt of the methods that need one ends where scoring begins.
        self.skip_tokens = min(256, length // 2)
        self._calibration = load_tokens(
            calibration, self.tokenizer, length, calibration_tokens
        ).sequences

    @cached_property
    def moments(self) -> Moments:
        """Of the calibration text."""
        return collect(self.model, self._calibration, batch_size=16)

    @property
    def full_size(self) -> int:
        """Numbers per token of the full cache."""
        shape = self.fingerprint
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim

    def cache(self, row: Row, checkpoint: EchoCheckpoint | None) -> tuple[Cache, Bytes]:
        """What a row measures, and its bytes."""
        cache, shares = getattr(self, f"_{row.method.replace('-', '_')}")(
            checkpoint, **row.arguments
        )
        return cache, Bytes(shares, self.full_size)

    def _echo(
        self,
        checkpoint: EchoCheckpoint,
        kv_cache_dtype: str = "auto",
        residual_bits: int = 0,
        exact_window: bool = False,
    ) -> tuple[Cache, dict[str, float]]:
        rebuilder: Cache = HeadRebuilder(
            checkpoint, self.rotary, self.device, kv_cache_dtype, residual_bits
        )
        if exact_window:
            plan = checkpoint.plan
            rebuilder = ExactWindow(rebuilder, plan.num_layers, plan.num_kv_heads)
        shares = {kv_cache_dtype: checkpoint.plan.ratio}
        if residual_bits:
            shares[f"int{residual_bits}"] = 1 - checkpoint.plan.ratio
        return rebuilder, shares

    def _one_sided(self, checkpoint: EchoCheckpoint, part: str) -> tuple[Cache, dict[str, float]]:
        rebuilder = OneSided(checkpoint, self.rotary, self.device, part)
        return rebuilder, {"auto": (1 + checkpoint.plan.ratio) / 2}

    def _quantised(
        self, _: None, kv_cache_dtype: str, exact_window: bool = False
    ) -> tuple[Cache, dict[str, float]]:
        cache: Cache = QuantizedCache(kv_cache_dtype)
        if exact_window:
            cache = ExactWindow(cache, self.fingerprint.num_layers, self.fingerprint.num_kv_heads)
        return cache, {kv_cache_dtype: 1.0}

    def _low_rank(
        self, _: None, ratio: float, num_groups: int, allocation: str
    ) -> tuple[Cache, dict[str, float]]:
        group_heads = self.fingerprint.num_kv_heads // num_groups
        cache = LowRankCache(self.moments, self.rotary, ratio, group_heads, allocation)
        return cache, {"auto": cache.num_cached / self.full_size}

    def _eviction(
        self, _: None, ratio: float, shared_budget: bool
    ) -> tuple[Cache, dict[str, float]]:
        return EvictingCache(ratio, shared_budget), {"auto": ratio}

    def _copy(self, _: None, ratio: float, scaled: bool) -> tuple[Cache, dict[str, float]]:
        num_retained = round(ratio * self.fingerprint.num_kv_heads)
        checkpoint = copy_checkpoint(self.moments, self.fingerprint, num_retained, scaled)
        return self._echo(checkpoint)

    def _think(self, _: None, ratio: float, prompt: bool) -> tuple[Cache, dict[str, float]]:
        """Values are whole, so `ratio` is at least a half."""
        shape = self.fingerprint
        num_channels = round((2 * ratio - 1) * shape.head_dim)
        share = (num_channels / shape.head_dim + 1) / 2
        if not prompt:
            return PrunedKeys.calibrated(self.moments, num_channels), {"auto": share}
        maker = PromptPrunedKeys(
            shape.num_layers, shape.num_kv_heads, num_channels, self.skip_tokens
        )
        return maker, {"auto": share}

    def _hybrid(
        self, checkpoint: EchoCheckpoint, ratio: float, tuned: bool
    ) -> tuple[Cache, dict[str, float]]:
        num_channels = round(ratio * self.fingerprint.head_dim)
        keys = PrunedKeys.calibrated(self.moments, num_channels)
        if tuned:
            checkpoint = tune_values(
                self.model, checkpoint, keys, self._calibration[:_TUNING_SEQUENCES], self.window
            )
        values = HeadRebuilder(checkpoint, self.rotary, self.device)
        share = (num_channels / self.fingerprint.head_dim + checkpoint.plan.ratio) / 2
        return HybridCache(keys, values), {"auto": share}


def tokens_at(ratio: float, length: int, window: Window) -> float:
    """Bytes over the full cache's of a request of `length` tokens, its exact window included."""
    exact = min(length, window.sink_tokens + window.recent_tokens)
    return (exact + ratio * (length - exact)) / length


def describe(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    import platform

    import transformers

    machine = platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
