"""Context of compressed prompt chunks that is rebuilt, for the discarded heads of one layer.

Round by round: true and rebuilt keys and values of some tiles go into the workspace, stock
attention reads them there, and what it finds is merged with the rounds before (prefill.py lays the
rounds out).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from echokv_kernels.gpu.heads import EchoedHeads
from echokv_kernels.gpu.merge import merge_partial, write_merged
from echokv_kernels.gpu.rebuild import materialize
from echokv_vllm.worker.gpu.flash import flash_prefill
from echokv_vllm.worker.gpu.memory import GpuMemory
from echokv_vllm.worker.gpu.prefill import TILE, PrefillRound
from echokv_vllm.worker.gpu.step import GpuStep, GpuStepBuilder

if TYPE_CHECKING:
    from echokv_vllm.worker.topology import EchoGroupMaps


class RoundAttention:
    """Attention over the context that compressed prompt chunks have.

    Args:
        impl: The layer's attention implementation.
        discarded: KV heads that the rank discards.
        rows: [rows] int32, their query heads.
        groups: How they are rebuilt.
        steps: The worker's step builder.
        memory: The worker's buffers.
        version: FlashAttention's version.
        rotation_block: Of the checkpoint's maps.
    """

    def __init__(
        self,
        impl: Any,
        discarded: tuple[int, ...],
        rows: torch.Tensor,
        groups: list[EchoGroupMaps],
        steps: GpuStepBuilder,
        memory: GpuMemory,
        version: int,
        rotation_block: int,
    ) -> None:
        device = rows.device
        self.impl, self.discarded_rows = impl, rows
        self.steps, self.memory, self.version = steps, memory, version
        self.rotation_block, self.scale = rotation_block, impl.scale
        self.head_dim = impl.head_size
        self.discarded = torch.tensor(discarded, dtype=torch.int32, device=device)
        self.group_heads = [
            torch.tensor(group.places, dtype=torch.int32, device=device) for group in groups
        ]

    def warm_up(self, echoed: list[EchoedHeads], max_model_len: int) -> None:
        """Compiles the kernels of compressed prompt chunks (``GpuAttention.warm_up``).

        Nothing is written: the only tile is unused and all tokens are padding.

        Args:
            echoed: The layer's echo groups, bound to a cache.
            max_model_len: Tokens of a request at most.
        """
        assert echoed, "echokv: nothing is echoed in this layer, or no cache is bound"
        device = self.discarded.device
        plan, num_tokens = self.steps.plan, 16
        none = torch.zeros(2, dtype=torch.int32, device=device)
        unused = torch.full((num_tokens,), -1, dtype=torch.int32, device=device)
        tables = [
            torch.zeros(1, -(-max_model_len // size), dtype=torch.int32, device=device)
            for size in (plan.retained_block_size, plan.residual_block_size)
        ]
        dtype = self.memory.workspace.dtype
        fresh = torch.zeros(1, self.impl.num_kv_heads, self.head_dim, dtype=dtype, device=device)
        workspace, residual_cache = self._workspace(1), self.impl.residual_layer.kv_cache
        for heads, group_heads in zip(echoed, self.group_heads, strict=True):
            materialize(
                workspace, unused[:1], none[:1], heads.features, heads.maps, group_heads,
                residual_cache, tables[1], plan.exact, plan.compressed, tables[0],
                none[:1], none[:1], none, fresh, fresh, self.discarded, self.memory.rotation,
                self.rotation_block,
            )  # fmt: skip
        merged, lse = self._merge_buffers(num_tokens)
        part = torch.zeros(merged.shape, dtype=dtype, device=device)
        for is_first in (True, False):
            merge_partial(
                merged, lse, part, torch.zeros_like(lse), unused, plan.compressed,
                first_token=0, is_first=is_first,
            )  # fmt: skip
        output = torch.zeros(
            num_tokens, self.impl.num_heads, self.head_dim, dtype=dtype, device=device
        )
        write_merged(output, merged, self.discarded_rows, unused, plan.compressed)

    def attend(
        self,
        rows: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        residual_cache: torch.Tensor,
        echoed: list[EchoedHeads],
        step: GpuStep,
        output: torch.Tensor,
    ) -> None:
        """Attention of compressed requests' prompt chunks into ``output``.

        Args:
            rows: [chunk tokens, rows, d], queries of the discarded heads.
            key: [T, H, d], this step's.
            value: [T, H, d].
            residual_cache: The layer's D view.
            echoed: The layer's echo groups, bound to a cache.
            step: The batch; it has rounds.
            output: [chunk tokens, num_heads, d]; rows of compressed requests are written.
        """
        prefill = step.prefill
        assert prefill is not None, "echokv: no prompt chunks were planned"
        plan = self.steps.plan
        merged, merged_lse = self._merge_buffers(prefill.num_tokens)
        for round_ in prefill.rounds:
            workspace = self._fill(round_, key, value, residual_cache, echoed, step)
            tokens = slice(round_.first_token, round_.first_token + round_.num_tokens)
            part = self.memory.part[: round_.num_tokens * rows.shape[1] * self.head_dim]
            part = part.view(round_.num_tokens, rows.shape[1], self.head_dim)
            lse = flash_prefill(
                self.version, rows[tokens], workspace[:, :, :, 0], workspace[:, :, :, 1],
                round_.table, round_.lens, round_.max_len, round_.query_start_loc,
                round_.max_query_len, part, self.scale, causal=round_.is_chunk,
            )  # fmt: skip
            merge_partial(
                merged, merged_lse, part, lse, prefill.token_request, plan.compressed,
                first_token=round_.first_token, is_first=round_.is_chunk,
            )  # fmt: skip
        write_merged(output, merged, self.discarded_rows, prefill.token_request, plan.compressed)

    def _fill(
        self,
        round_: PrefillRound,
        key: torch.Tensor,
        value: torch.Tensor,
        residual_cache: torch.Tensor,
        echoed: list[EchoedHeads],
        step: GpuStep,
    ) -> torch.Tensor:
        """The workspace with a round's keys and values."""
        workspace, plan = self._workspace(round_.tile_request.shape[0]), self.steps.plan
        for heads, group_heads in zip(echoed, self.group_heads, strict=True):
            materialize(
                workspace, round_.tile_request, round_.tile_start, heads.features, heads.maps,
                group_heads, residual_cache, step.residual_table, plan.exact, plan.compressed,
                step.retained_table, step.seq_lens, step.context_lens, step.query_start_loc, key,
                value, self.discarded, self.memory.rotation, self.rotation_block,
            )  # fmt: skip
        return workspace

    def _merge_buffers(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.discarded_rows.shape[0]
        shape = (num_tokens, rows, self.head_dim)
        merged = self.memory.merged[: num_tokens * rows * self.head_dim].view(shape)
        return merged, self.memory.merged_lse[: num_tokens * rows].view(rows, num_tokens)

    def _workspace(self, num_tiles: int) -> torch.Tensor:
        """[num_tiles, TILE, nd, 2, d]"""
        shape = (num_tiles, TILE, self.discarded.shape[0], 2, self.head_dim)
        return self.memory.workspace[: math.prod(shape)].view(shape)
