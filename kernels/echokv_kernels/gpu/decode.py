"""Launching echoed decode attention of one layer.

    attend_context    absorbed queries, weighted features of every work item: scratch
    attend_exact      exact residual pages, where stock attention is not called
    reduce_context    the items' means: scratch
    combine           value maps and exact parts, to the output

Reference: `echokv_kernels.decode.absorbed_decode` for the echoed part, `softmax.merge_attention`
for the parts beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from echokv_kernels.gpu.absorb import absorb_kernel
from echokv_kernels.gpu.absorbed import absorbed_decode_kernel
from echokv_kernels.gpu.combine import combine_kernel
from echokv_kernels.gpu.exact import exact_decode_kernel
from echokv_kernels.gpu.fused import fused_decode_kernel
from echokv_kernels.gpu.heads import EchoedHeads
from echokv_kernels.gpu.launch import ABSORB, COMBINE, EXACT, REDUCE, DecodeTiles
from echokv_kernels.gpu.overlap import overlap
from echokv_kernels.gpu.reduce import reduce_kernel
from echokv_kernels.gpu.rotation import RotationTable
from echokv_kernels.gpu.scratch import DecodeScratch, DecodeShape, mean_size
from echokv_kernels.gpu.unrotated import launch_unrotated
from echokv_kernels.step_plan import StepPlan

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, eq=False)
class DecodeBatch:
    """What all layers of one step share.

    Attributes:
        num_reqs: requests, a host number.
        plan: exact pages and shares (`step_plan.plan_step`).
        retained_table: [>= num_reqs, PR] int32.
        query_start_loc: [>= num_reqs + 1] int32.
        seq_lens: [>= num_reqs] int32.
        exact_lens: [>= num_reqs] int32, any stride: tokens in exact pages of each request.
    """

    num_reqs: int
    plan: StepPlan
    retained_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    exact_lens: torch.Tensor


def _launch_absorb(
    query: torch.Tensor,
    heads: EchoedHeads,
    batch: DecodeBatch,
    scratch: DecodeScratch,
    shape: DecodeShape,
    rotation: RotationTable,
) -> None:
    """Fills the lines of absorbed queries; arguments as in `attend_context`."""
    maps = heads.maps
    absorb_kernel[(scratch.num_programs,)](
        query, maps.key, maps.key if maps.key_bias is None else maps.key_bias, heads.row_query,
        batch.query_start_loc, batch.plan.line_end, rotation.coarse, rotation.fine,
        scratch.absorbed, scratch.offset, batch.num_reqs, scratch.max_lines, query.stride(0),
        query.stride(1),
        LINES=ABSORB.lines,
        REQUESTS=ABSORB.requests,
        MEMBERS=ABSORB.query_heads(heads.group, heads.dim_pad),
        TASK_COST=ABSORB.task_cost,
        num_warps=ABSORB.num_warps,
        **overlap(query.device),
        **_rotation_constants(heads, shape, rotation),
    )  # fmt: skip


def _rotation_constants(
    heads: EchoedHeads, shape: DecodeShape, rotation: RotationTable
) -> dict[str, Any]:
    return {
        "ROTATION_BLOCK": shape.rotation_block,
        "ROTARY_DIM": rotation.rotary_dim,
        "INTERLEAVED": rotation.interleaved,
        "HAS_BIAS": heads.maps.key_bias is not None,
        "HALF_PAD": max(16, triton.next_power_of_2(heads.maps.head_dim // 2)),
        **heads.counts,
    }


def _launch_absorbed(
    query: torch.Tensor,
    heads: EchoedHeads,
    batch: DecodeBatch,
    scratch: DecodeScratch,
    shape: DecodeShape,
    tiles: DecodeTiles,
    rotation: RotationTable,
    scale_log2: float,
) -> None:
    """Fills the scratch's items; arguments as in `attend_context`."""
    features, maps, plan = heads.features, heads.maps, batch.plan
    arguments = [
        query, features.pool, features.offsets, maps.key,
        maps.key if maps.key_bias is None else maps.key_bias,
        heads.row_query, heads.row_source, batch.retained_table, plan.exact,
        batch.query_start_loc, batch.seq_lens, plan.token_end, plan.line_end, plan.share_len,
        rotation.coarse, rotation.fine, scratch.absorbed, scratch.offset,
    ]  # fmt: skip
    results = [scratch.item_mean, scratch.maximum, scratch.total]
    numbers = [
        batch.num_reqs, scratch.max_lines, query.stride(0), query.stride(1),
        batch.retained_table.stride(0), plan.exact.stride(0), features.block_stride, scale_log2,
    ]  # fmt: skip
    constants = dict(
        NUM_BLOCKS=shape.num_blocks,
        CHUNK=shape.chunk_len,
        RESIDUAL_BLOCK_SIZE=plan.residual_block_size,
        BLOCK_SIZE=features.block_size,
        # A KV head's queries, and what tensor cores want.
        BLOCK_M=max(16, heads.group_pad),
        NUM_REQUESTS=triton.next_power_of_2(plan.max_reqs),
        NUM_ROWS=heads.num_rows,
        ROW_PAD=heads.row_pad,
        DIM_PAD=heads.dim_pad,
        GROUP_PAD=heads.group_pad,
        **overlap(query.device),
        **_rotation_constants(heads, shape, rotation),
    )
    if tiles.is_fused(heads.echo_pad, *heads.feature_size):
        fused_decode_kernel[(scratch.num_programs,)](
            *arguments, *results, *numbers,
            BLOCK_T=min(shape.block_len, tiles.fused_len(*heads.feature_size)),
            ECHO_PAD=heads.echo_pad,
            OWN_PAD=heads.own_pad,
            ONE_BLOCK=shape.rotation_block == 0 or shape.rotation_block >= tiles.hold_from,
            STAGES=tiles.fused_stages,
            num_warps=tiles.num_warps,
            **constants,
        )  # fmt: skip
    else:
        absorbed_decode_kernel[(scratch.num_programs,)](
            *arguments, scratch.scores, scratch.weights, scratch.sums, *results, *numbers,
            **_loop_constants(heads, shape, tiles),
            **constants,
        )  # fmt: skip


def _loop_constants(heads: EchoedHeads, shape: DecodeShape, tiles: DecodeTiles) -> dict[str, int]:
    """Tiles of the loop over keys and of the loop over values, and warps."""
    num_warps = tiles.loop_warps(shape.block_len)
    num_sources, head_dim = heads.features.num_heads, heads.maps.head_dim
    itemsize = heads.maps.key.element_size()
    element = heads.dim_pad * itemsize
    score_heads = tiles.score_heads(num_sources, head_dim)
    value_heads = tiles.value_heads(num_sources, head_dim, heads.row_pad, num_warps)
    score_bytes = (shape.block_len + heads.row_pad) * score_heads * element
    value_bytes = tiles.value_len * (value_heads * element + heads.row_pad * itemsize)
    return {
        "BLOCK_T": shape.block_len,
        "SCORE_HEADS": score_heads,
        "VALUE_HEADS": value_heads,
        "VALUE_T": tiles.value_len,
        "SCORE_STAGES": tiles.stages(tiles.score_stages, score_bytes),
        "VALUE_STAGES": tiles.stages(tiles.value_stages, value_bytes),
        "num_warps": num_warps,
    }


def attend_context(
    query: torch.Tensor,
    heads: EchoedHeads,
    batch: DecodeBatch,
    scratch: DecodeScratch,
    shape: DecodeShape,
    tiles: DecodeTiles,
    rotation: RotationTable,
    scale: float,
) -> None:
    """Attention of the group's rows to cached tokens, as items in `scratch`.

    Echoed rows attend to rebuilt context, retained rows to the whole sequence, which must be stored
    already. Needs nothing of stock attention over exact pages and may run beside it. Capturable: no
    host synchronisation, no allocation.

    Args:
        query: [T, query heads, head_dim], last axis contiguous.
        heads: the echo group.
        batch: the step.
        scratch: of this worker; dead until now, in use until `combine` is done.
        shape: of the plan's rotation block.
        tiles: tile numbers.
        rotation: angles of all positions.
        scale: factor of the scores.
    """
    if shape.rotation_block == 1:
        launch_unrotated(query, heads, batch, scratch, shape, rotation, scale * _LOG2_E)
    else:
        _launch_absorb(query, heads, batch, scratch, shape, rotation)
        _launch_absorbed(query, heads, batch, scratch, shape, tiles, rotation, scale * _LOG2_E)


def reduce_context(heads: EchoedHeads, batch: DecodeBatch, scratch: DecodeScratch) -> None:
    """Means of each request's items, in `scratch` for `combine`. Capturable.

    Args:
        heads: the echo group.
        batch: the step.
        scratch: what `attend_context` left there.
    """
    maps = heads.maps
    items, columns = REDUCE.tile(batch.num_reqs, heads.group_pad, maps.head_dim)
    size = mean_size(heads)
    num_parts = size // (heads.group * columns)
    per_request = max(1, min(num_parts, REDUCE.programs // batch.num_reqs))
    reduce_kernel[(batch.num_reqs, per_request)](
        heads.row_source, batch.plan.items,
        scratch.item_mean, scratch.maximum, scratch.total, scratch.mean, scratch.lse,
        NUM_ROWS=heads.num_rows,
        ROW_PAD=heads.row_pad,
        GROUP_PAD=heads.group_pad,
        COLUMNS=columns,
        ITEMS=items,
        MEAN_SIZE=size,
        num_warps=1,
        **overlap(maps.key.device),
        **heads.counts,
    )  # fmt: skip


def attend_exact(
    query: torch.Tensor,
    row_query: torch.Tensor,
    cache: torch.Tensor,
    batch: DecodeBatch,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the exact residual pages of the batch's requests, as `combine` takes it.

    Behind `attend_context` in the same stream it costs least: it begins while that ends.

    Args:
        query: [T, query heads, head_dim], last axis contiguous.
        row_query: [rows] int32, query heads of the layer's discarded KV heads.
        cache: [blocks, discarded heads, block_size, 2 * head_dim], residual pages.
        batch: the step.
        scale: factor of the scores.

    Returns:
        Output [n, parts, rows, head_dim] and log-sum-exp [n, parts, rows] float32, undefined for
        requests without exact pages; the output also where the log-sum-exp is -inf.
    """
    n, heads, head_dim = batch.num_reqs, cache.shape[1], query.shape[2]
    group = row_query.shape[0] // heads
    shape = (n, EXACT.parts(n, heads), row_query.shape[0])
    out = torch.empty(*shape, head_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    per_request, per_part = batch.plan.row_strides
    tables = batch.plan.tables[per_part:]
    exact_decode_kernel[(n, heads, shape[1])](
        query, row_query, cache, tables, batch.exact_lens, out, lse,
        query.stride(0), query.stride(1), cache.stride(0), cache.stride(1),
        per_request * tables.stride(0), batch.exact_lens.stride(0), scale * _LOG2_E,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=cache.shape[2],
        BLOCK_T=EXACT.tokens(head_dim, query.element_size()),
        ROWS=max(16, triton.next_power_of_2(group)),
        DIM_PAD=triton.next_power_of_2(head_dim),
        STAGES=EXACT.num_stages,
        num_warps=EXACT.num_warps,
        **overlap(query.device),
    )  # fmt: skip
    return out, lse


def combine(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    exact_out: torch.Tensor,
    exact_lse: torch.Tensor,
    heads: EchoedHeads,
    batch: DecodeBatch,
    scratch: DecodeScratch,
    scale: float,
    *,
    chained: bool = False,
) -> None:
    """The group's rows of all requests that have work items, into `output`.

    Echoed rows: their context, their exact part and the current token. Other requests and rows are
    not touched. Capturable.

    Args:
        output: [T, query heads, head_dim], may be the tensor that `exact_out` views.
        query: [T, query heads, head_dim], last axis contiguous.
        key: [T, KV heads, head_dim], this step's, for the current token.
        value: likewise.
        exact_out: [n, parts, rows of the layer's discarded query heads, head_dim], attention over
            parts of the exact residual pages of request n.
        exact_lse: [n, parts, rows] float32, their log-sum-exp.
        heads: the echo group.
        batch: the step.
        scratch: what `reduce_context` left there.
        scale: factor of the scores.
        chained: launched right behind `reduce_context` in the same stream, and that right behind
            `attend_exact`, for the layer's only group.
    """
    maps, plan = heads.maps, batch.plan
    rows, columns, stages = COMBINE.tile(
        batch.num_reqs, heads.num_echoed, heads.group_pad, heads.dim_pad
    )
    grid = (
        triton.cdiv(batch.num_reqs, rows // heads.group_pad),
        heads.num_echoed * (heads.dim_pad // columns) + heads.num_retained,
    )
    combine_kernel[grid](
        output, query, key, value, exact_out, exact_lse, batch.exact_lens, plan.exact,
        maps.value, maps.value_bias if maps.value_bias is not None else maps.value,
        heads.row_query, heads.row_exact, heads.head_kv,
        batch.query_start_loc, batch.seq_lens, plan.items,
        scratch.mean, scratch.lse, batch.num_reqs, exact_out.shape[1],
        output.stride(0), output.stride(1), query.stride(0), query.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *exact_out.stride()[:3], *exact_lse.stride(),
        batch.exact_lens.stride(0), plan.exact.stride(0), scale * _LOG2_E,
        HAS_BIAS=maps.value_bias is not None,
        RESIDUAL_BLOCK_SIZE=plan.residual_block_size,
        NUM_ROWS=heads.num_rows,
        GROUP_PAD=heads.group_pad,
        ROWS=rows,
        DIM_PAD=heads.dim_pad,
        COLUMNS=columns,
        STAGES=stages,
        MEAN_SIZE=mean_size(heads),
        num_warps=COMBINE.num_warps,
        **(overlap(query.device) if chained else {"PDL": False}),
        **heads.counts,
    )  # fmt: skip
