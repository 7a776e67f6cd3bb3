"""Launching echoed decode attention: constants of a layer, scratch of a worker, launches.

Reference: `echokv_kernels.decode.absorbed_decode` for the echoed part, `softmax.merge_attention`
for the parts beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from echokv_kernels.gpu.absorb import absorb_kernel
from echokv_kernels.gpu.absorbed import absorbed_decode_kernel
from echokv_kernels.gpu.combine import combine_kernel
from echokv_kernels.gpu.features import PagedFeatures
from echokv_kernels.gpu.launch import ABSORB, COMBINE, UNROTATED, DecodeTiles
from echokv_kernels.gpu.rotation import RotationTable
from echokv_kernels.gpu.unrotated import launch_unrotated, unrotated_sizes
from echokv_kernels.reconstruct import EchoMaps, FeatureSource
from echokv_kernels.step_plan import StepPlan

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, eq=False)
class EchoedHeads:
    """One echo group of one layer as the decode kernels take it. Rows are query heads.

    Attributes:
        features: where the source heads lie.
        maps: contiguous, in the cache's dtype.
        row_query: [rows] int32, query head of each row: echoed heads first, in the maps' order,
            then retained heads that are sources.
        row_source: [rows] int32, the retained row's place among the sources, -1 for echoed rows.
        row_exact: [nd * G] int32, row of each echoed query head in the exact part's output.
        head_kv: [nd] int32, KV head of each echoed head.
        group: G, query heads per KV head.
    """

    features: PagedFeatures
    maps: EchoMaps
    row_query: torch.Tensor
    row_source: torch.Tensor
    row_exact: torch.Tensor
    head_kv: torch.Tensor
    group: int

    @classmethod
    def of(
        cls,
        source: FeatureSource,
        maps: EchoMaps,
        echoed: list[tuple[int, int]],
        retained: list[tuple[int, int]],
        group: int,
    ) -> EchoedHeads:
        """Copies a few numbers to the device: not while serving.

        Args:
            source: the features.
            maps: for the echoed heads.
            echoed: (KV head, place among the layer's discarded heads), in the maps' order.
            retained: (KV head, place among the sources) of the layer's own heads to attend to in
                the same pass.
            group: G.
        """
        features = PagedFeatures.of(source)
        device = features.pool.device

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        def queries(heads: list[int]) -> list[int]:
            return [head * group + g for head in heads for g in range(group)]

        bias = None if maps.key_bias is None else maps.key_bias.contiguous()
        value_bias = None if maps.value_bias is None else maps.value_bias.contiguous()
        return cls(
            features=features,
            maps=EchoMaps(maps.key.contiguous(), maps.value.contiguous(), bias, value_bias),
            row_query=ints(queries([head for head, _ in echoed + retained])),
            row_source=ints(
                [-1] * len(echoed) * group + [s for _, s in retained for _ in range(group)]
            ),
            row_exact=ints(queries([place for _, place in echoed])),
            head_kv=ints([head for head, _ in echoed]),
            group=group,
        )

    @property
    def num_rows(self) -> int:
        return self.row_query.shape[0]

    @property
    def num_echoed(self) -> int:
        return self.maps.num_heads

    @property
    def row_pad(self) -> int:
        return max(16, triton.next_power_of_2(self.num_rows))

    @property
    def dim_pad(self) -> int:
        return max(16, triton.next_power_of_2(self.maps.head_dim))

    @property
    def group_pad(self) -> int:
        return triton.next_power_of_2(self.group)

    @property
    def counts(self) -> dict[str, int]:
        """What every decode kernel is compiled for."""
        return {
            "NUM_ECHOED": self.num_echoed,
            "GROUP": self.group,
            "NUM_SOURCES": self.features.num_heads,
            "HEAD_DIM": self.maps.head_dim,
        }


@dataclass(frozen=True)
class DecodeShape:
    """How the tokens of a decode request are cut, given the rotation block.

    Attributes:
        rotation_block: 0, 1, or a multiple of 16.
        chunk_len: tokens a program works on at once.
        num_blocks: rotation blocks in a chunk.
        block_len: tokens per tile, within one rotation block.
    """

    rotation_block: int
    chunk_len: int
    num_blocks: int
    block_len: int

    @classmethod
    def of(cls, rotation_block: int, tiles: DecodeTiles) -> DecodeShape:
        """Raises ValueError if the rotation block cannot be absorbed tile by tile."""
        if rotation_block == 0:
            return cls(0, tiles.chunk_len, 1, tiles.block_len)
        if rotation_block == 1:
            tile_len = UNROTATED.tile_len(tiles.chunk_len)
            return cls(1, tiles.chunk_len, 1, min(tiles.block_len, tile_len))
        if rotation_block % 16:
            raise ValueError(
                f"rotation_block is {rotation_block}; absorbed decode needs 0 or a multiple of 16. "
                "Train with --rotation-block 64, or use 1 (un-rotated keys)"
            )
        if rotation_block <= tiles.chunk_len:
            chunk_len = tiles.chunk_len // rotation_block * rotation_block
        else:
            chunk_len = max(
                size for size in range(16, tiles.chunk_len + 1, 16) if rotation_block % size == 0
            )
        block_len = tiles.block_len
        while chunk_len % block_len or rotation_block % block_len:
            block_len //= 2
        return cls(rotation_block, chunk_len, max(1, chunk_len // rotation_block), block_len)

    @property
    def item_align(self) -> int:
        """Work items start at multiples of it, so that a chunk has `num_blocks` rotation blocks."""
        if self.rotation_block == 0:
            return self.block_len
        if self.rotation_block == 1:
            return UNROTATED.tile_len(self.chunk_len)
        return min(self.rotation_block, self.chunk_len)


@dataclass(frozen=True, eq=False)
class DecodeScratch:
    """Memory of echoed decode, shared by all layers of a worker; independent of the context.

    Attributes:
        num_programs: persistent programs.
        num_slots: chunks whose absorbed queries are made ahead; later ones cost more.
        absorbed: one dimension, cache dtype: absorbed queries of each slot, then of each program.
        offset: float32, their score offsets (key bias).
        scores: float32, [num_programs, chunk_len * row_pad].
        sums: float32, [max_items, row_pad * F], each work item's weighted features.
        maximum, total: [max_items, row_pad] float32, its softmax state.
        part: float32, value projections of source heads on their way to one sum.
        counter: [max_reqs * nd] int32, 0 between launches.
        places, plain, turned: of un-rotated keys (unrotated.py), empty for other rotation blocks;
            cache dtype, places float16 if that is 16 bits.
    """

    num_programs: int
    num_slots: int
    absorbed: torch.Tensor
    offset: torch.Tensor
    scores: torch.Tensor
    sums: torch.Tensor
    maximum: torch.Tensor
    total: torch.Tensor
    part: torch.Tensor
    counter: torch.Tensor
    places: torch.Tensor
    plain: torch.Tensor
    turned: torch.Tensor

    @classmethod
    def allocate(
        cls,
        groups: list[EchoedHeads],
        shape: DecodeShape,
        max_reqs: int,
        num_programs: int,
        num_slots: int,
    ) -> DecodeScratch:
        """Scratch large enough for each of `groups` at up to `max_reqs` requests."""
        device, dtype = groups[0].maps.key.device, groups[0].maps.key.dtype
        max_items = num_programs + max_reqs

        def empty(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        rows = max(group.row_pad for group in groups)
        absorbed = max(absorbed_size(group, shape) for group in groups)
        places, plain, turned = 0, 0, 0
        if shape.rotation_block == 1:
            sizes = [unrotated_sizes(group, shape) for group in groups]
            places, plain, turned = (max(size) for size in zip(*sizes, strict=True))
            num_slots = absorbed = 0
        return cls(
            num_programs=num_programs,
            num_slots=num_slots,
            absorbed=empty((num_slots + num_programs) * absorbed, dtype),
            offset=empty(
                (num_slots + num_programs)
                * (shape.num_blocks if absorbed else 0)
                * max(group.num_echoed * group.group for group in groups)
            ),
            scores=empty(num_programs * shape.chunk_len * rows),
            sums=empty(max_items * max(g.row_pad * g.maps.width for g in groups)),
            maximum=empty(max_items * rows),
            total=empty(max_items * rows),
            part=empty(
                max_reqs * max(g.num_echoed * COMBINE.rows(g.group) * g.maps.width for g in groups)
            ),
            counter=torch.zeros(
                max_reqs * max(group.num_echoed for group in groups),
                dtype=torch.int32,
                device=device,
            ),
            places=empty(
                num_programs * places, torch.float16 if dtype.itemsize == 2 else torch.float32
            ),
            plain=empty(num_programs * plain, dtype),
            turned=empty(num_programs * turned, dtype),
        )


def absorbed_size(heads: EchoedHeads, shape: DecodeShape) -> int:
    """Elements of one slot: absorbed queries of one chunk."""
    return shape.num_blocks * heads.num_echoed * heads.group * heads.maps.width


@dataclass(frozen=True, eq=False)
class DecodeBatch:
    """What all layers of one step share.

    Attributes:
        num_reqs: requests, a host number.
        plan: exact pages and work items (`step_plan.plan_step`).
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
    """Fills `scratch.sums`, `maximum` and `total`; arguments as in `echoed_decode`."""
    features, maps = heads.features, heads.maps
    head_dim, has_bias = maps.head_dim, maps.key_bias is not None
    half_pad = max(16, triton.next_power_of_2(head_dim // 2))
    plan, num_reqs = batch.plan, batch.num_reqs
    absorb = dict(
        ROTATION_BLOCK=shape.rotation_block,
        NUM_BLOCKS=shape.num_blocks,
        CHUNK=shape.chunk_len,
        ROTARY_DIM=rotation.rotary_dim,
        INTERLEAVED=rotation.interleaved,
        HAS_BIAS=has_bias,
        HALF_PAD=half_pad,
    )
    key_bias = maps.key_bias if maps.key_bias is not None else maps.key
    members, sources = ABSORB.parts(heads.group, features.num_heads, shape.rotation_block)
    num_parts = heads.num_echoed * heads.group // members * (features.num_heads // sources)
    num_programs = -(-ABSORB.programs_per_program * scratch.num_programs // num_parts)
    absorb_kernel[(num_parts, num_programs)](
        query, maps.key, key_bias, heads.row_query, batch.query_start_loc, batch.seq_lens,
        plan.item_end, plan.item_len, rotation.coarse, rotation.fine, scratch.absorbed,
        scratch.offset, num_reqs, scratch.num_slots, query.stride(0), query.stride(1),
        LINES=ABSORB.lines,
        REQUESTS=ABSORB.requests,
        MEMBERS=members,
        SOURCES=sources,
        num_warps=ABSORB.num_warps,
        **absorb,
        **heads.counts,
    )  # fmt: skip
    dim_pad, itemsize = heads.dim_pad, maps.key.element_size()
    fused = tiles.is_fused(heads.row_pad, features.num_heads * dim_pad, itemsize)
    score_heads = tiles.score_heads(features.num_heads, head_dim)
    value_heads = tiles.value_heads(features.num_heads, head_dim, heads.row_pad)
    score_bytes = (shape.block_len + heads.row_pad) * score_heads * dim_pad * itemsize
    value_bytes = tiles.value_len * (value_heads * dim_pad * itemsize + heads.row_pad * 4)
    absorbed_decode_kernel[(scratch.num_programs,)](
        query, features.pool, features.offsets, maps.key, key_bias,
        heads.row_query, heads.row_source, batch.retained_table, plan.exact,
        batch.query_start_loc, batch.seq_lens, plan.item_end, plan.item_len,
        rotation.coarse, rotation.fine, scratch.absorbed, scratch.offset, scratch.scores,
        scratch.sums, scratch.maximum, scratch.total,
        num_reqs, scratch.num_slots, query.stride(0), query.stride(1),
        batch.retained_table.stride(0), plan.exact.stride(0), features.block_stride,
        scale_log2,
        RESIDUAL_BLOCK_SIZE=plan.residual_block_size,
        BLOCK_SIZE=features.block_size,
        BLOCK_M=16,
        BLOCK_T=min(shape.block_len, tiles.fused_len) if fused else shape.block_len,
        FUSED=fused,
        ONE_BLOCK=shape.rotation_block == 0 or shape.rotation_block >= tiles.hold_from,
        NUM_REQUESTS=triton.next_power_of_2(plan.max_reqs),
        SCORE_HEADS=score_heads,
        VALUE_HEADS=value_heads,
        VALUE_T=tiles.value_len,
        SCORE_STAGES=(
            tiles.fused_stages if fused else tiles.stages(tiles.score_stages, score_bytes)
        ),
        VALUE_STAGES=tiles.stages(tiles.value_stages, value_bytes),
        NUM_ROWS=heads.num_rows,
        ROW_PAD=heads.row_pad,
        DIM_PAD=dim_pad,
        GROUP_PAD=heads.group_pad,
        num_warps=tiles.num_warps,
        **absorb,
        **heads.counts,
    )  # fmt: skip


def echoed_decode(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    exact_out: torch.Tensor,
    exact_lse: torch.Tensor,
    heads: EchoedHeads,
    batch: DecodeBatch,
    scratch: DecodeScratch,
    shape: DecodeShape,
    tiles: DecodeTiles,
    rotation: RotationTable,
    scale: float,
) -> None:
    """Attention of the group's rows for all requests that have work items, into `output`.

    Echoed rows attend to rebuilt context, to their exact part and to the current token; retained
    rows to the whole sequence. Other requests and rows are not touched. Capturable: no host
    synchronisation, no allocation.

    Args:
        output: [T, query heads, head_dim], may be the tensor that `exact_out` views.
        query: [T, query heads, head_dim], last axis contiguous.
        key: [T, KV heads, head_dim], this step's, for the current token.
        value: likewise.
        exact_out: [n, rows of the layer's discarded query heads, head_dim], attention over
            the exact residual pages of request n.
        exact_lse: [n, rows] float32, its log-sum-exp.
        heads: the echo group.
        batch: the step.
        scratch: of this worker.
        shape: of the plan's rotation block.
        tiles: tile numbers.
        rotation: angles of all positions.
        scale: factor of the scores.
    """
    launch = launch_unrotated if shape.rotation_block == 1 else _launch_absorbed
    launch(query, heads, batch, scratch, shape, tiles, rotation, scale * _LOG2_E)
    features, maps = heads.features, heads.maps
    plan, num_reqs = batch.plan, batch.num_reqs
    num_retained = heads.num_rows // heads.group - heads.num_echoed
    combine_kernel[(num_reqs, heads.num_echoed + num_retained, features.num_heads)](
        output, query, key, value, exact_out, exact_lse, batch.exact_lens, plan.exact,
        maps.value, maps.value_bias if maps.value_bias is not None else maps.value,
        heads.row_query, heads.row_source, heads.row_exact, heads.head_kv,
        batch.query_start_loc, batch.seq_lens, plan.item_end,
        scratch.sums, scratch.maximum, scratch.total, scratch.part, scratch.counter,
        output.stride(0), output.stride(1), query.stride(0), query.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        exact_out.stride(0), exact_out.stride(1), exact_lse.stride(0), exact_lse.stride(1),
        batch.exact_lens.stride(0), plan.exact.stride(0), scale * _LOG2_E,
        HAS_BIAS=maps.value_bias is not None,
        RESIDUAL_BLOCK_SIZE=plan.residual_block_size,
        ROWS=COMBINE.rows(heads.group),
        GROUP_PAD=heads.group_pad,
        ITEMS=max(COMBINE.items, 16 // heads.group_pad),
        # Three products of leading and trailing halves are as exact as 16-bit outputs need.
        PRECISION="ieee" if output.dtype == torch.float32 else "tf32x3",
        NUM_ROWS=heads.num_rows,
        ROW_PAD=heads.row_pad,
        DIM_PAD=heads.dim_pad,
        num_warps=COMBINE.num_warps,
        num_stages=COMBINE.num_stages,
        **heads.counts,
    )  # fmt: skip
