"""Buffers that all layers of one worker share, made before vLLM measures its memory.

None grows with the context. What they hold is dead between two layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from echokv_kernels.gpu.heads import EchoedHeads
from echokv_kernels.gpu.launch import DECODE, num_programs
from echokv_kernels.gpu.rotation import RotationTable
from echokv_kernels.gpu.scratch import DecodeScratch, DecodeShape
from echokv_kernels.rotary import Rotary
from echokv_vllm.worker.gpu.prefill import TILE

MIN_WORKSPACE_TILES = 128  # long contexts in few rounds


@dataclass(frozen=True, eq=False)
class GpuMemory:
    """Shared buffers.

    Attributes:
        rotation: Angles of all positions.
        shape: How decode cuts its tokens.
        scratch: Of echoed decode.
        workspace: [tiles, TILE, nd, 2, d] flat, cache dtype; layers view what they need.
        merged: [tokens, rows, d] flat float32, prompt chunks' sums over rounds.
        part: The same in the cache dtype, one round's result.
        merged_lse: [rows, tokens] flat float32.
        num_tiles: Tiles of the workspace.
        branch: Stream of what runs beside stock attention in captured graphs; None without CUDA.
    """

    rotation: RotationTable
    shape: DecodeShape
    scratch: DecodeScratch
    workspace: torch.Tensor
    merged: torch.Tensor
    part: torch.Tensor
    merged_lse: torch.Tensor
    num_tiles: int
    branch: Any

    @classmethod
    def allocate(
        cls,
        groups: list[EchoedHeads],
        max_discarded: int,
        rotary: Rotary,
        rotation_block: int,
        vllm_config: Any,
        max_reqs: int,
    ) -> GpuMemory:
        """Reserves everything.

        Args:
            groups: The echo groups of all layers; their addresses are not used.
            max_discarded: Discarded heads of the layer that discards most.
            rotary: The model's rotary embedding, on the device.
            rotation_block: Of the checkpoint's maps.
            vllm_config: Batch and sequence bounds.
            max_reqs: Rows of a step, graph padding included.
        """
        group, dtype = groups[0], groups[0].maps.key.dtype
        device = group.maps.key.device
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        num_tiles = max(-(-tokens // TILE) + 2, MIN_WORKSPACE_TILES)
        slot = max_discarded * group.maps.head_dim
        rows = tokens * max_discarded * group.group

        def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        shape = DecodeShape.of(rotation_block, DECODE, groups)
        max_len = vllm_config.model_config.max_model_len
        return cls(
            rotation=RotationTable.build(rotary, max_len + TILE),
            shape=shape,
            scratch=DecodeScratch.allocate(
                groups, shape, max_reqs, num_programs(device, rotation_block), max_len
            ),
            workspace=empty(num_tiles * TILE * slot * 2, dtype),
            merged=empty(rows * group.maps.head_dim, torch.float32),
            part=empty(rows * group.maps.head_dim, dtype),
            merged_lse=empty(rows, torch.float32),
            num_tiles=num_tiles,
            branch=torch.cuda.Stream(device) if device.type == "cuda" else None,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        parts = (vars(self), vars(self.scratch), vars(self.rotation))
        tensors = [value for part in parts for value in part.values() if torch.is_tensor(value)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
