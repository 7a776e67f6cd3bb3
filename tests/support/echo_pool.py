"""vLLM's KVCacheManager over the two EchoKV groups, built directly."""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from echokv_vllm.config import SchedulerSettings
from echokv_vllm.specs import EchoResidualSpec, EchoRetainedSpec


def settings(**changes: Any) -> SchedulerSettings:
    """Settings of a pool with pages of 4 tokens, small enough to reason about."""
    values: dict[str, Any] = dict(
        mode="auto", recent_tokens=8, admit_full_below=1.0, restore_below=0.5, restore_steps=4,
        strict=True, look_ahead=True, watermark=0.0, retained_block_size=4, residual_block_size=4,
        plan="local-0.5", ratio=0.5,
    )  # fmt: skip
    return SchedulerSettings(**{**values, **changes})


def pool_config(num_blocks: int, echo: SchedulerSettings) -> KVCacheConfig:
    """A pool with an R and a D group, R first."""
    text = echo.to_json()
    common: dict[str, Any] = dict(
        num_kv_heads=2, head_size=8, dtype=torch.float32, echo_settings=text
    )
    sizes = (echo.retained_block_size, echo.residual_block_size)
    groups = [
        KVCacheGroupSpec(["r"], EchoRetainedSpec(block_size=sizes[0], **common)),
        KVCacheGroupSpec(["d"], EchoResidualSpec(block_size=sizes[1], **common)),
    ]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def kv_cache_manager(
    num_blocks: int, echo: SchedulerSettings, caching: bool = True, max_model_len: int = 4096
) -> KVCacheManager:
    """vLLM's manager over such a pool."""
    sizes = (echo.retained_block_size, echo.residual_block_size)
    return KVCacheManager(
        pool_config(num_blocks, echo),
        max_model_len=max_model_len,
        scheduler_block_size=math.lcm(*sizes),
        hash_block_size=math.gcd(*sizes),
        enable_caching=caching,
        watermark=echo.watermark,
    )
