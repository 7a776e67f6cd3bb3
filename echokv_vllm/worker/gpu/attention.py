"""Attention of one layer on a GPU.

Decodes: one call of stock attention over exact pages (R and D rows of a request side by side
where the plan allows it), beside it the echo kernels, which end at once for requests that are not
compressed, and at last one kernel that combines both. A step known to be wholly full leaves out the
echo kernels, one wholly compressed leaves out stock attention (`StepKind`). Prompt chunks: stock
attention over R and D pages; for compressed requests the discarded heads go round by round through
the workspace instead (rounds.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from echokv_kernels.gpu.decode import attend_context, attend_exact, combine, reduce_context
from echokv_kernels.gpu.heads import EchoedHeads
from echokv_kernels.gpu.launch import DECODE
from echokv_kernels.gpu.store import VARIANT_LENS, place_heads, store_pages
from echokv_kernels.step_plan import StepKind
from echokv_vllm.worker.gpu.flash import flash_prefill, keys_and_values
from echokv_vllm.worker.gpu.memory import GpuMemory
from echokv_vllm.worker.gpu.prefill import PrefillStep
from echokv_vllm.worker.gpu.rounds import RoundAttention
from echokv_vllm.worker.gpu.step import DISCARDED, PAIRED, RETAINED, WHOLE, GpuStep, GpuStepBuilder
from echokv_vllm.worker.rank_plan import RankLayer
from echokv_vllm.worker.topology import query_heads

if TYPE_CHECKING:
    from echokv_vllm.worker.topology import EchoGroupMaps


class GpuAttention:
    """Stores and attends for one layer.

    Args:
        layer: vLLM's attention layer.
        rank_layer: The heads this rank keeps and discards.
        groups: How the discarded heads are rebuilt.
        steps: The worker's step builder.
        memory: The worker's buffers.
        version: FlashAttention's version.
        rotation_block: Of the checkpoint's maps.
    """

    def __init__(
        self,
        layer: Any,
        rank_layer: RankLayer,
        groups: list[EchoGroupMaps],
        steps: GpuStepBuilder,
        memory: GpuMemory,
        version: int,
        rotation_block: int,
    ) -> None:
        impl = layer.impl
        device = impl.device
        self.layer, self.rank_layer = layer, rank_layer
        self.steps, self.memory, self.version = steps, memory, version
        self.scale = impl.scale
        self.group = impl.num_heads // impl.num_kv_heads
        self.head_dim = impl.head_size
        retained, discarded = rank_layer.retained, rank_layer.discarded
        self.head_places = place_heads(retained, discarded, device)
        self.row_order = query_heads((*retained, *discarded), self.group).to(device)
        self.in_order = (*retained, *discarded) == tuple(range(impl.num_kv_heads))
        self.num_retained_rows = len(retained) * self.group
        self.discarded_rows = self.row_order[self.num_retained_rows :].to(torch.int32)
        self.groups = groups
        self.rounds = RoundAttention(
            impl, rank_layer.discarded, self.discarded_rows, groups, steps, memory, version,
            rotation_block,
        )  # fmt: skip
        # Retained heads that no echo group attends to must be read in full by stock attention.
        self.covers_retained = covers_retained(rank_layer, groups)
        self.retained_part = RETAINED if self.covers_retained else WHOLE
        self.echoed: list[EchoedHeads] = []

    def bind(self) -> None:
        """Looks up where the pages lie; again whenever vLLM binds another cache."""
        self.echoed = [group.echoed(self.rank_layer.discarded, self.group) for group in self.groups]

    def release(self) -> None:
        """Lets go of the pages, which ``echoed`` would keep in memory."""
        self.echoed = []

    def warm_up(self, max_model_len: int) -> None:
        """Compiles what steps outside of graphs need and capturing graphs does not run.

        Otherwise the first requests of a server would wait for it. Nothing is written: all tokens
        are padding. Model Runner V1 captures no steps of compressed requests alone, and without
        graphs nothing is run at all.

        Args:
            max_model_len: Tokens of a request at most.
        """
        impl = self.layer.impl
        for num_tokens in VARIANT_LENS:
            fresh = torch.zeros(
                num_tokens, impl.num_kv_heads, self.head_dim,
                dtype=self.memory.workspace.dtype, device=impl.device,
            )  # fmt: skip
            padding = torch.full((num_tokens,), -1, dtype=torch.int64, device=impl.device)
            residual = impl.residual_layer.kv_cache if self.rank_layer.discarded else None
            slots = padding if residual is not None else None
            self.store(fresh, fresh, self.layer.kv_cache, padding, residual, slots)
        if self.echoed:
            self.rounds.warm_up(self.echoed, max_model_len)
            for kind in (StepKind.MIXED, StepKind.COMPRESSED):
                # Every choice of tiles goes one way for few requests and the other for many.
                for num_reqs in sorted({1, self.steps.max_reqs}):
                    self._warm_up_decode(num_reqs, kind)

    def _warm_up_decode(self, num_reqs: int, kind: StepKind) -> None:
        impl = self.layer.impl
        query, fresh, output = (
            torch.zeros(
                num_reqs, heads, self.head_dim,
                dtype=self.memory.workspace.dtype, device=impl.device,
            )
            for heads in (impl.num_heads, impl.num_kv_heads, impl.num_heads)
        )  # fmt: skip
        self._decode(
            query, fresh, fresh, self.layer.kv_cache, impl.residual_layer.kv_cache,
            self.steps.idle_decodes(num_reqs, kind), output,
        )  # fmt: skip

    def has_paired_pages(self) -> bool:
        """Whether the D page of a block lies where its R page would."""
        own, residual = self.layer.kv_cache, self.layer.impl.residual_layer.kv_cache
        same = (own.shape, own.stride(), own.data_ptr())
        return same == (residual.shape, residual.stride(), residual.data_ptr())

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
        retained = kv_cache if self.rank_layer.retained else None
        store_pages(
            key,
            value,
            retained,
            residual_cache,
            slot_mapping if retained is not None else None,
            residual_slots,
            self.head_places,
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        residual_cache: torch.Tensor | None,
        step: GpuStep,
        output: torch.Tensor,
    ) -> None:
        """Attention of the step's tokens into ``output`` [T, num_heads, d].

        Args:
            query: [T, num_heads, d].
            key: [T, H, d], this step's.
            value: [T, H, d].
            kv_cache: The layer's own view.
            residual_cache: The layer's D view, None where nothing is discarded.
            step: The batch.
            output: Written.
        """
        if step.num_decodes:
            self._decode(query, key, value, kv_cache, residual_cache, step, output)
        if step.prefill is not None:
            self._prefill(query, key, value, kv_cache, residual_cache, step, output)

    # Decode -----------------------------------------------------------------------------

    def _decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        residual_cache: torch.Tensor | None,
        step: GpuStep,
        output: torch.Tensor,
    ) -> None:
        echoed = self.echoed if step.kind is not StepKind.FULL else []
        if echoed and step.kind is StepKind.COMPRESSED:
            self._decode_compressed(query, key, value, kv_cache, residual_cache, step, output)
            return
        branch = self._branch_off(query, step, echoed)
        exact_out, exact_lse = self._attend_stock(query, kv_cache, residual_cache, step, output)
        for heads in echoed:
            assert step.decodes is not None and exact_lse is not None
            if heads is not echoed[0] or branch is None:
                self._attend_context(query, step, heads)
                reduce_context(heads, step.decodes, self.memory.scratch)
            else:
                torch.cuda.current_stream().wait_stream(branch)
            combine(
                output, query, key, value, exact_out, exact_lse, heads, step.decodes,
                self.memory.scratch, self.scale,
            )  # fmt: skip

    def _decode_compressed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        residual_cache: torch.Tensor | None,
        step: GpuStep,
        output: torch.Tensor,
    ) -> None:
        """Decodes that are all compressed: one chain, whose kernels begin before others end."""
        assert step.decodes is not None and residual_cache is not None
        scratch = self.memory.scratch
        if self.num_retained_rows and not self.covers_retained:
            self._retained_alone(query, kv_cache, step, output)
        exact: tuple[torch.Tensor, torch.Tensor] | None = None
        for heads in self.echoed:
            self._attend_context(query, step, heads)
            if exact is None:
                exact = attend_exact(
                    query, self.discarded_rows, residual_cache, step.decodes, self.scale
                )
            reduce_context(heads, step.decodes, scratch)
            combine(
                output, query, key, value, *exact, heads, step.decodes, scratch, self.scale,
                chained=len(self.echoed) == 1,
            )  # fmt: skip

    def _branch_off(
        self, query: torch.Tensor, step: GpuStep, echoed: list[EchoedHeads]
    ) -> torch.cuda.Stream | None:
        """Starts the first group on a stream of its own, if that helps; None if it did not.

        A graph runs what does not depend on each other side by side: the echo kernels that find
        nothing to do cost no time of their own, nor do the exact pages of requests that are
        compressed. Outside of graphs two streams would only cost the host time.
        """
        if not (echoed and query.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        branch = self.memory.branch
        branch.wait_stream(torch.cuda.current_stream())
        assert step.decodes is not None
        with torch.cuda.stream(branch):
            self._attend_context(query, step, echoed[0])
            reduce_context(echoed[0], step.decodes, self.memory.scratch)
        return branch

    def _attend_stock(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        residual_cache: torch.Tensor | None,
        step: GpuStep,
        output: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stock attention of all heads into ``output``; the D half of it as `combine` takes it."""
        n = step.num_decodes
        rows = query[:n] if self.in_order else query[:n].index_select(1, self.row_order)
        out = output[:n] if self.in_order else torch.empty_like(rows)
        lse: torch.Tensor | None
        if self.steps.paired:
            lse = self._attend_paired(rows, kv_cache, step, out)
        else:
            lse = self._attend_apart(rows, kv_cache, residual_cache, step, out)
        if not self.in_order:
            output[:n].index_copy_(1, self.row_order, out)
        return out[:, None, self.num_retained_rows :], None if lse is None else lse[:, None]

    def _retained_alone(
        self, query: torch.Tensor, kv_cache: torch.Tensor, step: GpuStep, output: torch.Tensor
    ) -> None:
        """Stock attention of the retained heads, where it has no others to attend to."""
        n, order = step.num_decodes, self.row_order[: self.num_retained_rows]
        rows = query[:n].index_select(1, order)
        out = torch.empty_like(rows)
        self._attend_retained(rows, kv_cache, step, out)
        output[:n].index_copy_(1, order, out)

    def _attend_context(self, query: torch.Tensor, step: GpuStep, heads: EchoedHeads) -> None:
        assert step.decodes is not None, "echokv: no decodes were planned"
        memory = self.memory
        attend_context(
            query, heads, step.decodes, memory.scratch, memory.shape, DECODE, memory.rotation,
            self.scale,
        )  # fmt: skip

    def _attend_paired(
        self, rows: torch.Tensor, kv_cache: torch.Tensor, step: GpuStep, out: torch.Tensor
    ) -> torch.Tensor:
        """Stock attention over both groups at once; the D half's log-sum-exp [n, rows]."""
        n, half = rows.shape[0], self.num_retained_rows
        shape = (2 * n, half, self.head_dim)
        schedule = self.steps.schedules[PAIRED, len(self.rank_layer.retained)]
        table, _ = self.steps.rows(PAIRED, n)
        lse = schedule.attend(rows.reshape(shape), kv_cache, table, out.view(shape), self.scale)
        return lse.view(half, n, 2)[:, :, 1].T

    def _attend_apart(
        self,
        rows: torch.Tensor,
        kv_cache: torch.Tensor,
        residual_cache: torch.Tensor | None,
        step: GpuStep,
        out: torch.Tensor,
    ) -> torch.Tensor | None:
        """Stock attention group by group; the D rows' log-sum-exp [n, rows]."""
        n, half = rows.shape[0], self.num_retained_rows
        lse = None
        if self.rank_layer.retained:
            self._attend_retained(rows[:, :half], kv_cache, step, out[:, :half])
        if residual_cache is not None:
            schedule = self.steps.schedules[DISCARDED, len(self.rank_layer.discarded)]
            table, _ = self.steps.rows(DISCARDED, n)
            lse = schedule.attend(
                rows[:, half:], residual_cache, table, out[:, half:], self.scale
            ).T
        return lse

    def _attend_retained(
        self, rows: torch.Tensor, kv_cache: torch.Tensor, step: GpuStep, out: torch.Tensor
    ) -> None:
        """Stock attention over R pages, retained heads' rows only."""
        schedule = self.steps.schedules[self.retained_part, len(self.rank_layer.retained)]
        table = step.retained_table[: rows.shape[0]]
        schedule.attend(rows, kv_cache, table, out, self.scale)

    # Prefill ----------------------------------------------------------------------------

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        residual_cache: torch.Tensor | None,
        step: GpuStep,
        output: torch.Tensor,
    ) -> None:
        prefill, half = step.prefill, self.num_retained_rows
        assert prefill is not None
        tokens = slice(prefill.first_token, prefill.first_token + prefill.num_tokens)
        requests = slice(prefill.first_request, step.num_reqs)
        rows = query[tokens] if self.in_order else query[tokens].index_select(1, self.row_order)
        out = output[tokens] if self.in_order else torch.empty_like(rows)
        if self.rank_layer.retained:
            self._attend_pages(
                rows[:, :half], kv_cache, step.retained_table[requests], prefill.seq_lens,
                prefill, out[:, :half],
            )  # fmt: skip
        if residual_cache is not None:
            self._attend_pages(
                rows[:, half:], residual_cache, step.residual_table[requests],
                prefill.residual_lens, prefill, out[:, half:],
            )  # fmt: skip
        if not self.in_order:
            output[tokens].index_copy_(1, self.row_order, out)
        if residual_cache is not None and prefill.rounds:
            self.rounds.attend(
                rows[:, half:], key, value, residual_cache, self.echoed, step, output[tokens]
            )

    def _attend_pages(
        self,
        rows: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
        lens: torch.Tensor,
        prefill: PrefillStep,
        out: torch.Tensor,
    ) -> None:
        flash_prefill(
            self.version, rows, *keys_and_values(cache), table, lens, prefill.max_seq_len,
            prefill.query_start_loc, prefill.max_query_len, out, self.scale, causal=True,
        )  # fmt: skip


def covers_retained(rank_layer: RankLayer, groups: list[EchoGroupMaps]) -> bool:
    """Whether every retained head is a source of exactly one of the layer's echo groups."""
    covered = [head for group in groups for head, _ in group.own]
    return sorted(covered) == sorted(rank_layer.retained)
