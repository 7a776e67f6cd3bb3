"""Attention of one layer, portable path: PyTorch operations of ``echokv_kernels``.

Retained heads read R pages. For discarded heads three parts are merged by log-sum-exp:

    context tokens with an exact D page     paged attention over D
    context tokens without one              rebuilt from R features (decodes: absorbed queries)
    tokens of the running chunk             the chunk's own K and V, exact in any mode
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from echokv_kernels.attention import fresh_attention, paged_attention
from echokv_kernels.decode import absorbed_decode
from echokv_kernels.reconstruct import rebuilt_attention
from echokv_kernels.softmax import merge_attention
from echokv_kernels.store import write_pages
from echokv_vllm.worker.backend import EchoMetadata
from echokv_vllm.worker.rank_plan import RankLayer
from echokv_vllm.worker.refusals import check_layer, check_vllm_config
from echokv_vllm.worker.step import EchoStep

if TYPE_CHECKING:
    from echokv_vllm.worker.topology import EchoGroupMaps, EchoWorker

UN_ROTATED = 1  # rotation block of the paper's key space, which cannot be absorbed


class EchoKVImpl(AttentionImpl[EchoMetadata]):
    """Built by vLLM's Attention layer, whose arguments it takes.

    Attributes:
        worker: Shared by the layers of this process.
        rank_layer: The heads this rank keeps and discards. Set by ``bind``, as everything below.
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
        self.rank_layer: RankLayer
        self.residual_layer: Any = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM's hook after the model is loaded: the first layer gives all layers their roles."""
        self.worker.adopt_layers()

    def bind(self, layer: Any, rank_layer: RankLayer, groups: list[EchoGroupMaps]) -> None:
        """Tells the implementation its layer; called once by the worker."""
        from echokv_vllm.worker.topology import query_heads

        group = self.num_heads // self.num_kv_heads
        self.rank_layer = rank_layer
        self.groups = groups
        self.layer_name = layer.layer_name
        self.retained = torch.tensor(rank_layer.retained, device=self.device)
        self.discarded = torch.tensor(rank_layer.discarded, device=self.device)
        self.retained_queries = query_heads(rank_layer.retained, group).to(self.device)
        self.discarded_queries = query_heads(rank_layer.discarded, group).to(self.device)

    def _residual_name(self) -> str:
        from echokv_vllm.worker.topology import RESIDUAL_SUFFIX

        return self.layer_name + RESIDUAL_SUFFIX if self.rank_layer.retained else self.layer_name

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
        if self.rank_layer.retained:
            write_pages(key, value, kv_cache, slot_mapping, self.retained)
        if self.rank_layer.discarded:
            slots = get_forward_context().slot_mapping[self._residual_name()]
            cache = self.residual_layer.kv_cache
            # Placeholders of tokens without a D page point into the null page.
            write_pages(key, value, cache, slots, self.discarded, first_slot=cache.shape[2])

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
        step = attn_metadata.step
        tokens = slice(0, step.num_tokens)
        if self.rank_layer.retained:
            out, _ = paged_attention(
                query[tokens, self.retained_queries],
                kv_cache,
                step.retained_table,
                step.tiles,
                "causal",
                self.scale,
                max_len=step.max_seq_len,
            )
            output[tokens, self.retained_queries] = out.to(output.dtype)
        if self.rank_layer.discarded:
            out = self._attend_discarded(
                query[tokens, self.discarded_queries],
                key[tokens, self.discarded],
                value[tokens, self.discarded],
                step,
            )
            output[tokens, self.discarded_queries] = out.to(output.dtype)
        return output

    def _attend_discarded(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: EchoStep
    ) -> torch.Tensor:
        """Attention of the discarded heads' queries [T, nd * G, d], K and V [T, nd, d]."""
        parts = [
            fresh_attention(query, key, value, step.tiles, step.query_start_loc, self.scale),
            paged_attention(
                query,
                self.residual_layer.kv_cache,
                step.residual_table,
                step.tiles,
                step.context_lens,
                self.scale,
                page_mask=step.exact,
                page_mask_block_size=self.worker.steps.residual_block_size,
                max_len=step.max_seq_len,
            ),
        ]
        parts += self._attend_rebuilt(query, step)
        return merge_attention(parts)[0]

    def _attend_rebuilt(
        self, query: torch.Tensor, step: EchoStep
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The context tokens without an exact page; output and log-sum-exp per set of rows."""
        rotation_block = self.worker.checkpoint.rotation_block
        sets = [(rebuilt_attention, step.prefills), (absorbed_decode, step.decodes)]
        if rotation_block == UN_ROTATED:
            sets = [(rebuilt_attention, step.tiles)]
        parts = []
        for attention, tiles in sets:
            if not tiles:
                continue
            out = query.new_zeros(query.shape, dtype=torch.float32)
            lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
            for group in self.groups:
                heads = group.query_heads
                out[:, heads], lse[:, heads] = attention(
                    query[:, heads],
                    group.features(),
                    group.maps,
                    step.retained_table,
                    tiles,
                    step.context_lens,
                    step.exact,
                    self.worker.steps.residual_block_size,
                    self.worker.rotary,
                    rotation_block,
                    self.scale,
                    max_len=step.max_seq_len,
                )
            parts.append((out, lse))
        return parts
