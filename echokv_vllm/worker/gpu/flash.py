"""vLLM's own FlashAttention, over pages of a packed pool.

A paged cache view [num_blocks, heads, block_size, 2 * head_dim] is passed as it lies: keys and
values are strided views of it. Rows are (request, group) pairs, see ``step_plan``.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backends import fa_utils

from echokv_kernels.gpu.launch import HEAD_DIM_MULTIPLE

AOT_VERSION = 3  # the version that takes a schedule made ahead of time
SERVED_VERSIONS = (2, 3)


def flash_version(head_dim: int) -> int | None:
    """FlashAttention's version for this GPU and head size; None where vLLM has none."""
    if not fa_utils.is_flash_attn_varlen_func_available():
        return None
    version: int | None = fa_utils.get_flash_attn_version(head_size=head_dim)
    return version


def is_served(head_dim: int) -> bool:
    """Whether vLLM's FlashAttention and all kernels take heads of this size."""
    return head_dim % HEAD_DIM_MULTIPLE == 0 and flash_version(head_dim) in SERVED_VERSIONS


def keys_and_values(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [num_blocks, block_size, heads, head_dim] of a paged cache."""
    by_token = cache.permute(0, 2, 1, 3)
    head_dim = cache.shape[3] // 2
    return by_token[..., :head_dim], by_token[..., head_dim:]


class FlashDecodeSchedule:
    """FlashAttention's ahead-of-time schedule of one-token rows, made once per step.

    Args:
        version: FlashAttention's version.
        group: Query heads per KV head.
        kv_heads: KV heads of a row.
        head_dim: Elements of a head.
        dtype: Of queries and cache.
        block_size: Tokens per page.
        max_rows: Rows there is room for.
        device: Where.
    """

    def __init__(
        self,
        version: int,
        group: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        block_size: int,
        max_rows: int,
        device: torch.device,
    ) -> None:
        self.version = version
        self.group = group
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.block_size = block_size
        self.query_start_loc = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        # The size is FlashAttention's: a semaphore and four numbers per row, rows in fours.
        self._buffer = torch.zeros(1 + -(-max_rows // 4) * 16, dtype=torch.int32, device=device)
        self._size = 0
        self.num_rows = 0
        self.num_splits = 0
        self.max_len = 0
        self.lens = self.query_start_loc

    def update(self, lens: torch.Tensor, max_len: int, num_splits: int) -> None:
        """Schedules rows of the given lengths.

        Args:
            lens: [rows] int32, contiguous; must keep its address in captured graphs.
            max_len: No row is longer.
            num_splits: Bound captured graphs need, 0 for FlashAttention's own choice.
        """
        self.num_rows, self.max_len, self.num_splits = lens.shape[0], max_len, num_splits
        self.lens = lens
        if self.version != AOT_VERSION:
            return
        metadata = fa_utils.get_scheduler_metadata(
            batch_size=self.num_rows,
            max_seqlen_q=1,
            max_seqlen_k=max_len,
            num_heads_q=self.group * self.kv_heads,
            num_heads_kv=self.kv_heads,
            headdim=self.head_dim,
            cache_seqlens=lens,
            qkv_dtype=self.dtype,
            cu_seqlens_q=self.query_start_loc[: self.num_rows + 1],
            page_size=self.block_size,
            causal=True,
            num_splits=num_splits,
        )
        previous, self._size = self._size, metadata.shape[0]
        self._buffer[: self._size].copy_(metadata)
        if self._size < previous:
            # Stale entries behind it would send thread blocks to rows that do not exist.
            self._buffer[self._size : previous].zero_()

    def attend(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
        out: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention of one token per row.

        Args:
            query: [rows, group * kv_heads, head_dim].
            cache: Paged cache view.
            table: [rows, P] int32.
            out: Like ``query``, written; 0 for rows of length 0.
            scale: Factor of the scores.

        Returns:
            Log-sum-exp [group * kv_heads, rows] float32.
        """
        key, value = keys_and_values(cache)
        schedule = self._buffer[: self._size] if self.version == AOT_VERSION else None
        _, lse = fa_utils.flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=self.query_start_loc[: self.num_rows + 1],
            max_seqlen_q=1,
            seqused_k=self.lens,
            max_seqlen_k=self.max_len,
            softmax_scale=scale,
            causal=True,
            block_table=table,
            scheduler_metadata=schedule,
            num_splits=self.num_splits if self.version == AOT_VERSION else 0,
            fa_version=self.version,
            return_softmax_lse=True,
        )
        return lse


def flash_prefill(
    version: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
    max_len: int,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    out: torch.Tensor,
    scale: float,
    *,
    causal: bool,
) -> torch.Tensor:
    """Attention of prompt chunks over paged keys and values.

    Args:
        version: FlashAttention's version.
        query: [T, heads, head_dim].
        key: [blocks, block_size, KV heads, head_dim].
        value: Like ``key``.
        table: [requests, P] int32.
        lens: [requests] int32, contiguous.
        max_len: No request is longer.
        query_start_loc: [requests + 1] int32.
        max_query_len: No chunk is longer.
        out: Like ``query``, written.
        scale: Factor of the scores.
        causal: The last query sees all keys and each earlier one fewer; otherwise all see all.

    Returns:
        Log-sum-exp [heads, T] float32.
    """
    _, lse = fa_utils.flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=max_query_len,
        seqused_k=lens,
        max_seqlen_k=max_len,
        softmax_scale=scale,
        causal=causal,
        block_table=table,
        fa_version=version,
        return_softmax_lse=True,
    )
    return lse
