"""Attention of one layer as vLLM calls it; portable.py and gpu/ do the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from echokv_vllm.worker.backend import EchoMetadata
from echokv_vllm.worker.portable import PortableAttention
from echokv_vllm.worker.rank_plan import RankLayer
from echokv_vllm.worker.refusals import check_cache_dtype, check_layer, check_vllm_config

if TYPE_CHECKING:
    from echokv_vllm.worker.topology import EchoGroupMaps, EchoWorker


class EchoKVImpl(AttentionImpl[EchoMetadata]):
    """Built by vLLM's Attention layer, whose arguments it takes.

    Attributes:
        worker: Shared by the layers of this process.
        rank_layer: The heads this rank keeps and discards. Set by ``bind``, as everything below.
        groups: How the discarded heads are rebuilt.
        attention: Does the work.
        residual_layer: The layer that owns the D pages, None where nothing is discarded.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        from echokv_vllm.worker.topology import worker_of

        self.vllm_config = get_current_vllm_config()
        check_vllm_config(self.vllm_config)
        check_layer(
            sliding_window=sliding_window,
            alibi_slopes=alibi_slopes,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target=kv_sharing_target_layer_name,
            kv_cache_dtype=kv_cache_dtype,
            extra=extra,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.device = torch.device(self.vllm_config.device_config.device)
        # The first layer reads the checkpoint here: a bad one must not cost a model load.
        self.worker: EchoWorker = worker_of(self)
        if self.worker.gpu is not None:
            check_cache_dtype(kv_cache_dtype, self.vllm_config.model_config.dtype)
        self.rank_layer: RankLayer
        self.groups: list[EchoGroupMaps]
        self.attention: Any
        self.residual_layer: Any = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM's hook after the model is loaded: the first layer gives all layers their roles."""
        self.worker.adopt_layers()

    def bind(self, layer: Any, rank_layer: RankLayer, groups: list[EchoGroupMaps]) -> None:
        """Tells the implementation its layer; called once by the worker."""
        self.rank_layer = rank_layer
        self.groups = groups
        self.layer_name = layer.layer_name
        if self.worker.gpu is None:
            self.attention = PortableAttention(self.worker, layer, rank_layer, groups)

    def _residual_cache(self) -> torch.Tensor | None:
        return None if self.residual_layer is None else self.residual_layer.kv_cache

    def _residual_slots(self) -> torch.Tensor | None:
        from echokv_vllm.worker.topology import RESIDUAL_SUFFIX

        if not self.rank_layer.discarded:
            return None
        own = self.layer_name
        name = own + RESIDUAL_SUFFIX if self.rank_layer.retained else own
        return get_forward_context().slot_mapping[name]

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes the step's K and V: retained heads to R pages, discarded ones to D pages.

        Args:
            layer: The attention layer.
            key: [T, H, d].
            value: [T, H, d].
            kv_cache: The layer's own view.
            slot_mapping: [T] slots in the layer's own group, padding -1.
        """
        self.attention.store(
            key, value, kv_cache, slot_mapping, self._residual_cache(), self._residual_slots()
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: EchoMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the step's tokens into ``output`` [T, num_heads, d]."""
        assert output_scale is None and output_block_scale is None, "echokv: no output quantisation"
        if attn_metadata is None:  # profiling run: no cache, no requests
            return output.fill_(0)
        self.attention.attend(
            query, key, value, kv_cache, self._residual_cache(), attn_metadata.step, output
        )
        return output
