"""The GPU path on a CPU: Triton's interpreter, and FlashAttention in plain PyTorch.

Import it before anything imports Triton or vLLM, then call `install()`. Everything else of the
path runs as it does on a GPU: step planning, schedules, rounds, workspaces, kernels.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **ignored: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention's paged varlen call. Rows without keys give 0 and -inf."""
    assert seqused_k.is_contiguous() and block_table.stride(1) == 1
    assert int(seqused_k.max()) <= max_seqlen_k
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"))
    group = q.shape[1] // k.shape[2]
    for row in range(len(seqused_k)):
        start, stop = int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1])
        num_keys = int(seqused_k[row])
        assert stop - start <= max_seqlen_q
        out[start:stop] = 0
        if not num_keys or start == stop:
            continue
        pages = block_table[row, : -(-num_keys // k.shape[1])].long()
        key, value = (
            pool[pages].flatten(0, 1)[:num_keys].repeat_interleave(group, 1) for pool in (k, v)
        )
        scores = torch.einsum("mhd,thd->hmt", q[start:stop].float(), key.float()) * softmax_scale
        if causal:
            limit = torch.arange(stop - start) + num_keys - (stop - start) + 1
            hidden = torch.arange(num_keys) >= limit[:, None]
            scores = scores.masked_fill(hidden, float("-inf"))
        lse[:, start:stop] = scores.logsumexp(-1)
        weights = scores.softmax(-1).nan_to_num()
        out[start:stop] = torch.einsum("hmt,thd->mhd", weights, value.float()).to(out.dtype)
    return out, lse


def install() -> None:
    """Makes the echokv backend take its GPU path on this CPU."""
    from vllm.v1.attention.backends import fa_utils

    from echokv_vllm import compat
    from echokv_vllm.worker.gpu import flash

    compat.has_gpu_kernels = lambda device, dtype, head_dim: True
    flash.flash_version.__code__ = (lambda head_dim: 3).__code__
    fa_utils.flash_attn_varlen_func = varlen_attention
    fa_utils.get_scheduler_metadata = lambda batch_size, **rest: torch.zeros(
        1 + -(-batch_size // 4) * 16, dtype=torch.int32
    )
