"""The attention backend vLLM selects by name, and its per-role variants.

vLLM asks a layer's backend to adjust the layer's KV cache spec without telling it the layer.
The variants carry what differs: which group the layer's own pages belong to and how many
heads they hold.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from echokv_vllm import compat
from echokv_vllm.config import SchedulerSettings
from echokv_vllm.specs import EchoResidualSpec, EchoRetainedSpec, spec_like
from echokv_vllm.worker.refusals import check_loaded
from echokv_vllm.worker.step import EchoStep

if TYPE_CHECKING:
    from echokv_vllm.worker.gpu.step import GpuStep


@dataclass
class EchoMetadata(AttentionMetadata):
    """Per-group metadata: all layers of both groups look at the same step."""

    step: EchoStep | GpuStep


class EchoMetadataBuilder(AttentionMetadataBuilder[EchoMetadata]):
    """Feeds one attention group's tables to the worker's step builder."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context = vllm_config.compilation_config.static_forward_context
        self.worker = context[layer_names[0]].impl.worker
        check_loaded(self.worker.layer_names, vllm_config.load_config.load_format)
        # Builders come before the cache they are for: the last moment to free one that only served
        # to measure the memory of graphs.
        self.worker.release_pool()
        self.opens = self.worker.retained_lead in layer_names
        self.completes = self.worker.residual_lead in layer_names
        if self.worker.gpu is not None:
            self._init_reorder_batch_threshold(1)  # decodes first

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decode steps can be captured whole on a GPU; the portable path asks the host."""
        if compat.has_gpu_kernels(
            vllm_config.device_config.device,
            vllm_config.model_config.dtype,
            vllm_config.model_config.get_head_size(),
        ):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> EchoMetadata:
        """vLLM's hook, once per group and step, R groups first."""
        steps = self.worker.steps
        if self.opens:
            steps.open(common_attn_metadata)
        if self.completes:
            # On every step: the cache is bound after this builder is made, perhaps twice.
            self.worker.bind_pool()
            steps.complete(common_attn_metadata)
        assert steps.step is not None, "echokv: vLLM built the residual group's metadata first"
        return EchoMetadata(steps.step)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> EchoMetadata:
        """vLLM's hook while it captures graphs: the requests are dummies without pages."""
        steps = self.worker.steps
        steps.is_dummy = True
        try:
            return self.build(0, common_attn_metadata)
        finally:
            steps.is_dummy = False


class EchoKVBackend(AttentionBackend):
    """Capabilities of EchoKV; see ``echokv_vllm.worker.refusals`` for what is refused."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return compat.BACKEND

    @staticmethod
    def get_impl_cls() -> Any:
        from echokv_vllm.worker.impl import EchoKVImpl

        return EchoKVImpl

    @staticmethod
    def get_builder_cls() -> type[EchoMetadataBuilder]:
        return EchoMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Block-outermost: the only layout in which groups of different page sizes share a pool.
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


@functools.cache
def retained_backend(num_heads: int, settings: SchedulerSettings) -> type[EchoKVBackend]:
    """Backend of layers whose own pages hold ``num_heads`` retained heads (group R)."""
    return _variant(
        f"Retained{num_heads}", EchoRetainedSpec, settings.retained_block_size, num_heads, settings
    )


@functools.cache
def residual_backend(num_heads: int, settings: SchedulerSettings) -> type[EchoKVBackend]:
    """Backend of layers that retain nothing and own D pages only."""
    return _variant(
        f"Residual{num_heads}", EchoResidualSpec, settings.residual_block_size, num_heads, settings
    )


def _variant(
    role: str, spec_cls: Any, block_size: int, num_heads: int, settings: SchedulerSettings
) -> type[EchoKVBackend]:
    class Variant(EchoKVBackend):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            return spec_like(
                spec,
                spec_cls,
                block_size=block_size,
                num_kv_heads=num_heads,
                echo_settings=settings.to_json(),
            )

    # vLLM tells attention groups apart by the backend's name.
    Variant.__name__ = Variant.__qualname__ = f"EchoKV{role}Backend"
    return Variant
