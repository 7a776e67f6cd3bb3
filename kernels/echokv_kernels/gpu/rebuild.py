"""Keys and values of the discarded heads, tile by tile, in a workspace laid out like a KV cache.

    tile of TILE positions of one request          workspace[tile, position - start, head, K or V]
    position of this step                          copied from the step's own key and value
    position in an exact residual page             copied from the page
    other positions of the context                 rebuilt (projection.py)

One program fills ROWS positions of HEADS heads, keys or values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from echokv_kernels.gpu.features import PagedFeatures
from echokv_kernels.gpu.filling import fill_copied, fill_rebuilt
from echokv_kernels.gpu.launch import RebuildTiles
from echokv_kernels.gpu.rotation import RotationTable
from echokv_kernels.rebuild import check_materialize
from echokv_kernels.reconstruct import EchoMaps


# Widths of tables and places in shared buffers differ from step to step: one variant for all.
@triton.jit(
    do_not_specialize=[
        "num_exact", "stride_residual_table", "stride_exact", "stride_retained_table",
    ],
    do_not_specialize_on_alignment=[
        "tile_request_ptr", "tile_start_ptr", "group_heads_ptr", "residual_table_ptr", "exact_ptr",
        "compressed_ptr", "retained_table_ptr", "seq_lens_ptr", "context_lens_ptr",
        "query_start_loc_ptr", "discarded_ptr",
    ],
)  # fmt: skip
def materialize_kernel(
    workspace_ptr,  # [num_tiles, TILE, nd, 2, HEAD_DIM] model dtype, written
    tile_request_ptr,  # [num_tiles] int32, -1: unused
    tile_start_ptr,  # [num_tiles] int32
    feature_ptr,  # pool of the features, cache dtype
    offsets_ptr,  # [num_sources] int64
    key_map_ptr,  # [NUM_HEADS, num_sources * HEAD_DIM, HEAD_DIM] cache dtype
    value_map_ptr,  # [NUM_HEADS, num_sources * HEAD_DIM, HEAD_DIM] cache dtype
    key_bias_ptr,  # [NUM_HEADS, HEAD_DIM] cache dtype
    value_bias_ptr,  # [NUM_HEADS, HEAD_DIM] cache dtype
    group_heads_ptr,  # [NUM_HEADS] int32
    residual_ptr,  # [num_blocks, nd, RESIDUAL_BLOCK, 2 * HEAD_DIM] cache dtype
    residual_table_ptr,  # [n, PD] int32
    exact_ptr,  # [n, PD_max] uint8
    compressed_ptr,  # [n] int32
    retained_table_ptr,  # [n, PR] int32
    seq_lens_ptr,  # [n] int32
    context_lens_ptr,  # [n] int32
    query_start_loc_ptr,  # [n + 1] int32
    key_ptr,  # [T, H, HEAD_DIM] model dtype
    value_ptr,  # [T, H, HEAD_DIM] model dtype
    discarded_ptr,  # [nd] int32
    coarse_ptr,  # [C, 2, HEAD_DIM / 2] float32
    fine_ptr,  # [256, 2, HEAD_DIM / 2] float32
    num_exact,
    stride_workspace_tile,
    stride_workspace_token,
    stride_workspace_head,
    stride_feature_block,
    stride_residual_block,
    stride_residual_head,
    stride_residual_table,
    stride_exact,
    stride_retained_table,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_SOURCES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
    RETAINED_BLOCK: tl.constexpr,
    RESIDUAL_BLOCK: tl.constexpr,
    ROTATION_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
):
    """Program = (rows of a tile, keys or values, HEADS heads), heads first: they share features."""
    HEAD_PROGRAMS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    program = tl.program_id(0)
    head = program % HEAD_PROGRAMS * HEADS
    is_value = program // HEAD_PROGRAMS % 2
    part = program // (2 * HEAD_PROGRAMS)
    tile = part // (TILE // ROWS)
    offset = part % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)
    request = tl.load(tile_request_ptr + tile)
    if request < 0:
        return
    if tl.load(compressed_ptr + request) == 0:
        return
    tile_start = tl.load(tile_start_ptr + tile)
    start = tile_start + part % (TILE // ROWS) * ROWS
    seq_len = tl.load(seq_lens_ptr + request)
    context_len = tl.load(context_lens_ptr + request)
    request = request.to(tl.int64)

    position = tile_start + offset
    is_cached = position < context_len
    is_fresh = (position >= context_len) & (position < seq_len)
    page = position // RESIDUAL_BLOCK
    exact = tl.load(
        exact_ptr + request * stride_exact + page, mask=is_cached & (page < num_exact), other=0
    )
    is_exact = exact != 0
    is_rebuilt = is_cached & (exact == 0)
    residual_block = tl.load(
        residual_table_ptr + request * stride_residual_table + page, mask=is_exact, other=0
    ).to(tl.int64)
    residual_row = residual_block * stride_residual_block + position % RESIDUAL_BLOCK * (
        2 * HEAD_DIM
    )
    block = tl.load(
        retained_table_ptr + request * stride_retained_table + position // RETAINED_BLOCK,
        mask=is_rebuilt,
        other=0,
    ).to(tl.int64)
    row = block * stride_feature_block + position % RETAINED_BLOCK * (2 * HEAD_DIM)
    slot = tile.to(tl.int64) * stride_workspace_tile + offset * stride_workspace_token
    token = (tl.load(query_start_loc_ptr + request) + position - context_len).to(tl.int64)
    # Cosines are known for positions of the request only.
    last = tl.maximum(context_len - 1, 0)
    position = tl.where(is_cached, position, 0)
    some_rebuilt = tl.max(is_rebuilt.to(tl.int32), 0) > 0
    some_copied = tl.min(is_rebuilt.to(tl.int32), 0) == 0
    plane = is_value * HEAD_DIM
    workspace_ptr += plane
    fresh_ptr, stride_token, stride_head = key_ptr, stride_key_token, stride_key_head
    map_ptr, bias_ptr, has_bias = key_map_ptr, key_bias_ptr, HAS_KEY_BIAS
    if is_value:
        fresh_ptr, stride_token, stride_head = value_ptr, stride_value_token, stride_value_head
        map_ptr, bias_ptr, has_bias = value_map_ptr, value_bias_ptr, HAS_VALUE_BIAS
    # First, so that nothing copies need occupies registers during the products.
    if some_copied:
        fill_copied(
            workspace_ptr, group_heads_ptr, residual_ptr + plane, fresh_ptr, discarded_ptr,
            slot, residual_row, token, is_rebuilt, is_exact, is_fresh, head,
            stride_workspace_head, stride_residual_head, stride_token, stride_head,
            NUM_HEADS, HEADS, HEAD_DIM, COLUMNS,
        )  # fmt: skip
    if some_rebuilt:
        HAS_BIAS: tl.constexpr = HAS_KEY_BIAS or HAS_VALUE_BIAS
        # Two calls of the same code would be merged, but not the shared memory they need.
        if (ROTATION_BLOCK == 0) | (is_value != 0):
            fill_rebuilt(
                workspace_ptr, feature_ptr + plane, offsets_ptr, map_ptr, bias_ptr, has_bias,
                group_heads_ptr, coarse_ptr, fine_ptr, position, start, last, slot, row,
                is_rebuilt, head, stride_workspace_head,
                False, HAS_BIAS, NUM_SOURCES, NUM_HEADS, HEADS, HEAD_DIM, COLUMNS,
                ROTARY_DIM, INTERLEAVED, STEP, ROTATION_BLOCK, NUM_BLOCKS,
            )  # fmt: skip
        elif ROTATION_BLOCK != 0:
            fill_rebuilt(
                workspace_ptr, feature_ptr, offsets_ptr, map_ptr, bias_ptr, has_bias,
                group_heads_ptr, coarse_ptr, fine_ptr, position, start, last, slot, row,
                is_rebuilt, head, stride_workspace_head,
                True, HAS_BIAS, NUM_SOURCES, NUM_HEADS, HEADS, HEAD_DIM, COLUMNS,
                ROTARY_DIM, INTERLEAVED, STEP, ROTATION_BLOCK, NUM_BLOCKS,
            )  # fmt: skip


def materialize(
    workspace: torch.Tensor,
    tile_request: torch.Tensor,
    tile_start: torch.Tensor,
    features: PagedFeatures,
    maps: EchoMaps,
    group_heads: torch.Tensor,
    residual_cache: torch.Tensor,
    residual_table: torch.Tensor,
    exact: torch.Tensor,
    compressed: torch.Tensor,
    retained_table: torch.Tensor,
    seq_lens: torch.Tensor,
    context_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    discarded: torch.Tensor,
    rotation: RotationTable,
    rotation_block: int,
    tiles: RebuildTiles | None = None,
) -> None:
    """Fills a workspace; one launch, no allocation, no synchronisation.

    Arguments as in `echokv_kernels.rebuild.materialize`. Integers are int32 (`exact`: uint8),
    without gaps in their last axis; nothing checks that what they say is in range.

    Args:
        workspace: as there; its last two axes are contiguous.
        tile_start: as there; multiples of TILE.
        features: as there, in the kernels' form; offsets are multiples of 8, as pages' are.
        maps: as there; contiguous, in the dtype of the caches.
        rotation: as there, in the kernels' form; reaches every position of the context.
        tiles: what one program does; None: `RebuildTiles.choose`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit together.
    """
    num_tiles, tile_len, _, _, head_dim = workspace.shape
    check_materialize(
        workspace, features.num_heads, features.head_dim, maps, residual_cache, key, rotation_block
    )
    _check_layout(workspace, features, maps, residual_cache, key, value)
    tiles = tiles or RebuildTiles.choose(
        tile_len, head_dim, maps.num_heads, workspace.dtype.itemsize
    )
    num_blocks = 0
    if rotation_block and rotation_block % tiles.rows == 0:
        num_blocks = 1
    elif rotation_block >= 16 and tiles.rows % rotation_block == 0:
        num_blocks = tiles.rows // rotation_block
    head_programs = -(-maps.num_heads // tiles.heads)
    grid = (num_tiles * (tile_len // tiles.rows) * 2 * head_programs,)
    if not grid[0]:
        return
    materialize_kernel[grid](
        workspace, tile_request, tile_start,
        features.pool, features.offsets,
        maps.key, maps.value,
        maps.key if maps.key_bias is None else maps.key_bias,
        maps.value if maps.value_bias is None else maps.value_bias,
        group_heads, residual_cache, residual_table, exact, compressed, retained_table,
        seq_lens, context_lens, query_start_loc, key, value, discarded,
        rotation.coarse, rotation.fine,
        min(exact.shape[1], residual_table.shape[1]),
        workspace.stride(0), workspace.stride(1), workspace.stride(2),
        features.block_stride, residual_cache.stride(0), residual_cache.stride(1),
        residual_table.stride(0), exact.stride(0), retained_table.stride(0),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        TILE=tile_len, ROWS=tiles.rows, NUM_SOURCES=features.num_heads,
        NUM_HEADS=maps.num_heads, HEADS=tiles.heads,
        HEAD_DIM=head_dim, COLUMNS=triton.next_power_of_2(head_dim),
        ROTARY_DIM=rotation.rotary_dim, INTERLEAVED=rotation.interleaved, STEP=tiles.step,
        RETAINED_BLOCK=features.block_size, RESIDUAL_BLOCK=residual_cache.shape[2],
        ROTATION_BLOCK=rotation_block, NUM_BLOCKS=num_blocks,
        HAS_KEY_BIAS=maps.key_bias is not None, HAS_VALUE_BIAS=maps.value_bias is not None,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _check_layout(
    workspace: torch.Tensor,
    features: PagedFeatures,
    maps: EchoMaps,
    residual_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    head_dim = maps.head_dim
    for name, tensor, strides in (
        ("workspace", workspace, (head_dim, 1)),
        ("residual_cache", residual_cache, (2 * head_dim, 1)),
        ("key", key, (1,)),
        ("value", value, (1,)),
        ("key map", maps.key, (maps.width * head_dim, head_dim, 1)),
        ("value map", maps.value, (maps.width * head_dim, head_dim, 1)),
    ):
        if tensor.stride()[-len(strides) :] != strides:
            raise ValueError(
                f"{name} with strides {tensor.stride()} must have {strides} last; make it "
                "contiguous"
            )
    dtypes = {features.pool.dtype, maps.key.dtype, maps.value.dtype}
    if len(dtypes) > 1:
        raise ValueError(
            f"features are {features.pool.dtype} and maps {maps.key.dtype} and "
            f"{maps.value.dtype}; convert the maps to the dtype of the cache"
        )
    if maps.key.numel() >= 2**31:
        raise ValueError(
            f"maps of {maps.key.numel()} elements exceed 2**31 - 1; split the heads into groups"
        )
