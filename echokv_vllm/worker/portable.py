"""Attention of one layer, portable path: PyTorch operations of ``echokv_kernels``.

Retained heads read R pages. For discarded heads three parts are merged by log-sum-exp:

    context tokens with an exact D page     paged attention over D
    context tokens without one              rebuilt from R features (decodes: absorbed queries)
    tokens of the running chunk             the chunk's own K and V, exact in any mode
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from echokv_kernels.attention import fresh_attention, paged_attention
from echokv_kernels.decode import absorbed_decode
from echokv_kernels.reconstruct import rebuilt_attention
from echokv_kernels.softmax import merge_attention
from echokv_kernels.store import write_pages
from echokv_vllm.worker.rank_plan import RankLayer
from echokv_vllm.worker.step import EchoStep

if TYPE_CHECKING:
    from echokv_vllm.worker.topology import EchoGroupMaps, EchoWorker

UN_ROTATED = 1  # rotation block of the paper's key space, which cannot be absorbed


class PortableAttention:
    """Stores and attends for one layer.

    Args:
        worker: Shared by the layers of this process.
        layer: vLLM's attention layer.
        rank_layer: The heads this rank keeps and discards.
        groups: How the discarded heads are rebuilt.
    """

    def __init__(
        self, worker: EchoWorker, layer: Any, rank_layer: RankLayer, groups: list[EchoGroupMaps]
    ) -> None:
        from echokv_vllm.worker.topology import query_heads

        impl = layer.impl
        group, device = impl.num_heads // impl.num_kv_heads, impl.device
        self.worker, self.rank_layer, self.groups = worker, rank_layer, groups
        self.scale = impl.scale
        self.retained = torch.tensor(rank_layer.retained, device=device)
        self.discarded = torch.tensor(rank_layer.discarded, device=device)
        self.retained_queries = query_heads(rank_layer.retained, group).to(device)
        self.discarded_queries = query_heads(rank_layer.discarded, group).to(device)

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        residual_cache: torch.Tensor | None,
        residual_slots: torch.Tensor | None,
    ) -> None:
        """Writes the step's keys and values [T, H, d] into R and D pages."""
        if self.rank_layer.retained:
            write_pages(key, value, kv_cache, slot_mapping, self.retained)
        if residual_cache is not None:
            assert residual_slots is not None
            # Placeholders of tokens without a D page point into the null page.
            first_slot = residual_cache.shape[2]
            write_pages(
                key, value, residual_cache, residual_slots, self.discarded, first_slot=first_slot
            )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        residual_cache: torch.Tensor | None,
        step: EchoStep,
        output: torch.Tensor,
    ) -> None:
        """Attention of the step's tokens into ``output`` [T, num_heads, d]."""
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
        if residual_cache is not None:
            out = self._attend_discarded(
                query[tokens, self.discarded_queries],
                key[tokens, self.discarded],
                value[tokens, self.discarded],
                residual_cache,
                step,
            )
            output[tokens, self.discarded_queries] = out.to(output.dtype)

    def _attend_discarded(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        residual_cache: torch.Tensor,
        step: EchoStep,
    ) -> torch.Tensor:
        """Attention of the discarded heads' queries [T, nd * G, d], K and V [T, nd, d]."""
        parts = [
            fresh_attention(query, key, value, step.tiles, step.query_start_loc, self.scale),
            paged_attention(
                query,
                residual_cache,
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
