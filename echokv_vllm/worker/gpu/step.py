"""Metadata of one engine step on a GPU, in buffers that captured graphs can rely on.

Everything is decided on the device; the host knows only which requests decode (they come
first in the batch) and how long prompt chunks are. The R group's builder opens a step, the D
group's completes it, as on the portable path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from echokv_kernels.gpu.decode import DecodeBatch
from echokv_kernels.gpu.stamp import stamp_owners
from echokv_kernels.gpu.step_plan import plan_step
from echokv_kernels.step_plan import Shares, StepKind, StepPlan
from echokv_vllm import compat, step_kind
from echokv_vllm.worker.gpu.flash import FlashDecodeSchedule
from echokv_vllm.worker.gpu.prefill import PrefillStep, build_prefill

RETAINED, DISCARDED, PAIRED, WHOLE = range(4)  # which rows a schedule is for


@dataclass(eq=False)
class GpuStep:
    """One batch.

    Attributes:
        kind: What the scheduler promised.
        num_tokens: Tokens of the batch, graph padding included.
        num_reqs: Requests of the batch, graph padding included.
        num_decodes: Leading requests with one query token each, and as many tokens.
        max_seq_len: Bound of the sequence lengths.
        query_start_loc: [num_reqs + 1] int32.
        seq_lens: [num_reqs] int32.
        retained_table: [num_reqs, PR] int32.
        retained_slots: [>= num_tokens] int.
        residual_table: [num_reqs, PD] int32.
        decodes: What echoed decode needs of the leading requests.
        prefill: The prompt chunks behind them, if any.
    """

    kind: StepKind
    num_tokens: int
    num_reqs: int
    num_decodes: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    retained_table: torch.Tensor
    retained_slots: torch.Tensor
    residual_table: torch.Tensor
    decodes: DecodeBatch | None
    prefill: PrefillStep | None

    @cached_property
    def context_lens(self) -> torch.Tensor:
        """[num_reqs] int32, tokens cached before this step; steps of decodes need it nowhere."""
        return self.seq_lens - self.query_start_loc.diff()


class GpuStepBuilder:
    """Builds the steps of one worker; owns page stamps, plan and schedules.

    Args:
        retained_block_size: Tokens per R page.
        residual_block_size: Tokens per D page.
        vllm_config: Batch, sequence and graph bounds.
        device: Where.
        step_kinds: Whether to believe what is announced of a whole step.
    """

    def __init__(
        self,
        retained_block_size: int,
        residual_block_size: int,
        vllm_config: Any,
        device: torch.device,
        step_kinds: bool,
    ) -> None:
        self.step_kinds = step_kinds
        self.retained_block_size = retained_block_size
        self.residual_block_size = residual_block_size
        self.device = device
        self.owner: torch.Tensor | None = None
        self.step: GpuStep | None = None
        self.is_open = False
        compilation = vllm_config.compilation_config
        has_graphs = compilation.cudagraph_mode.has_full_cudagraphs()
        self.graph_size = (compilation.max_cudagraph_capture_size or 0) if has_graphs else 0
        self.max_splits = vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        self.max_reqs = max(vllm_config.scheduler_config.max_num_seqs, self.graph_size)
        self.max_model_len = vllm_config.model_config.max_model_len
        self.schedules: dict[tuple[int, int], FlashDecodeSchedule] = {}
        self.shares = Shares(num_shares=1, align=1, min_len=1, request_cost=0, rotation_block=0)
        self.num_tiles = 1
        self.paired = False
        self.is_dummy = False  # requests own no pages: graphs are captured
        self.plan: StepPlan

    def configure(
        self,
        schedules: dict[tuple[int, int], FlashDecodeSchedule],
        *,
        paired: bool,
        shares: Shares,
        num_tiles: int,
    ) -> None:
        """Sets what the layers need, once they are known.

        Args:
            schedules: By (which rows, KV heads).
            paired: R and D rows of a request lie side by side and are attended to in one call.
            shares: How the programs of echoed decode share its tokens.
            num_tiles: Tiles of the prefill workspace.
        """
        self.schedules = schedules
        self.shares, self.num_tiles = shares, num_tiles
        self.paired = paired
        self.plan = StepPlan.allocate(
            self.max_reqs,
            self.max_model_len,
            self.retained_block_size,
            self.residual_block_size,
            paired,
            self.device,
        )

    def bind_pool(self, num_blocks: int, device: torch.device) -> None:
        """Makes fresh stamps; vLLM may bind the cache twice (graph memory profiling)."""
        self.owner = torch.full((num_blocks,), -1, dtype=torch.int64, device=device)

    def open(self, common: Any) -> GpuStep:
        """Starts a step from the R group's ``CommonAttentionMetadata``."""
        n = common.num_reqs
        assert n <= self.max_reqs, f"echokv: {n} requests in a step, room for {self.max_reqs}"
        query_start_loc, seq_lens = common.query_start_loc[: n + 1], common.seq_lens[:n]
        self.step = GpuStep(
            kind=step_kind.current() if self.step_kinds else StepKind.MIXED,
            num_tokens=common.num_actual_tokens,
            num_reqs=n,
            num_decodes=_count_decodes(common),
            max_seq_len=common.max_seq_len,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            retained_table=common.block_table_tensor[:n],
            retained_slots=common.slot_mapping,
            residual_table=common.block_table_tensor[:n],
            decodes=None,
            prefill=None,
        )
        self.is_open = True
        return self.step

    def complete(self, common: Any) -> GpuStep:
        """Adds the D group's tables; stamps pages, plans the step, schedules stock attention."""
        step, owner = self.step, self.owner
        assert step is not None and self.is_open, (
            "echokv: vLLM built the residual group's metadata first"
        )
        self.is_open = False
        assert owner is not None, "echokv: no KV cache is bound"
        self._check_promises()
        n, tokens = step.num_reqs, slice(0, step.num_tokens)
        step.residual_table = common.block_table_tensor[:n]
        stamp_owners(
            owner,
            step.retained_slots[tokens],
            common.slot_mapping[tokens],
            self.retained_block_size,
            self.residual_block_size,
        )
        plan_step(
            self.plan,
            owner,
            step.retained_table,
            step.residual_table,
            step.query_start_loc,
            step.seq_lens,
            n,
            self.shares,
            StepKind.MIXED if self.is_dummy else step.kind,
        )
        if step.num_decodes:
            self._schedule_decodes(step)
        if step.num_decodes < n:
            step.prefill = build_prefill(
                step.num_decodes,
                common.query_start_loc_cpu[: n + 1].numpy(),
                compat.host_seq_lens(common)[:n].numpy(),
                step.query_start_loc,
                step.seq_lens,
                self.plan.compressed,
                self.num_tiles,
                step.kind is StepKind.FULL,
            )
        return step

    def idle_decodes(self, num_reqs: int, kind: StepKind) -> GpuStep:
        """A step of padding alone, to launch kernels with before any step was planned.

        Args:
            num_reqs: Decodes it pretends to have.
            kind: Of the step.
        """
        assert self.step is not None, "echokv: no step shows how vLLM lays out its tables"
        like = self.step.retained_table
        zeros = torch.zeros(num_reqs + 1, dtype=torch.int32, device=like.device)
        # Kernels are compiled for strides: a table must have those of vLLM's.
        table = torch.zeros(num_reqs, like.stride(0), dtype=torch.int32, device=like.device)
        table = table[:, : like.shape[1]]
        step = GpuStep(
            kind=kind,
            num_tokens=num_reqs,
            num_reqs=num_reqs,
            num_decodes=num_reqs,
            max_seq_len=1,
            query_start_loc=zeros[: num_reqs + 1],
            seq_lens=torch.zeros_like(zeros[:num_reqs]),
            retained_table=table,
            retained_slots=zeros[:num_reqs],
            residual_table=table,
            decodes=None,
            prefill=None,
        )
        self._schedule_decodes(step)
        return step

    def _check_promises(self) -> None:
        """The device looks at every page anyway; what it found comes a step or two late."""
        if self.plan.broken.numpy()[0]:
            raise RuntimeError(
                "EchoKV: a step that was scheduled as full lacked residual pages, so its tokens "
                "are wrong. This is a bug of EchoKV; please report it. Until it is fixed, start "
                'with --additional-config \'{"echokv": {"step_kinds": false, ...}}\'.'
            )

    def rows(self, part: int, num_reqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block-table rows and lengths of stock attention over one group, or over both paired."""
        plan = self.plan
        if part == PAIRED:
            return plan.tables[: 2 * num_reqs], plan.lens[: 2 * num_reqs]
        first = plan.max_reqs if part == DISCARDED else 0
        return plan.tables[first : first + num_reqs], plan.lens[first : first + num_reqs]

    def _schedule_decodes(self, step: GpuStep) -> None:
        n, plan = step.num_decodes, self.plan
        num_splits = self.max_splits if step.num_tokens <= self.graph_size else 0
        for (part, _), schedule in self.schedules.items():
            lens = step.seq_lens[:n] if part == WHOLE else self.rows(part, n)[1]
            schedule.update(lens, step.max_seq_len, num_splits)
        per_request, per_part = plan.row_strides
        step.decodes = DecodeBatch(
            num_reqs=n,
            plan=plan,
            retained_table=step.retained_table,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            exact_lens=plan.lens[per_part:][: n * per_request : per_request],
        )


def _count_decodes(common: Any) -> int:
    """Leading requests with at most one query token; graph padding counts."""
    if common.max_query_len <= 1:
        return int(common.num_reqs)
    query_lens = np.diff(common.query_start_loc_cpu[: common.num_reqs + 1].numpy())
    return int(np.argmax(query_lens > 1))
