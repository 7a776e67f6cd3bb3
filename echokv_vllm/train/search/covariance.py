"""Streamed second moments of all KV heads: everything closed-form maps of any plan are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from echokv_vllm.train.capture import captured_attention
from echokv_vllm.train.stage1 import block_shift

if TYPE_CHECKING:
    from echokv_kernels.rotary import Rotary

HeadAt = tuple[int, int]
"""(layer, KV head)."""


class HeadMoments:
    """Capture callback that sums up `x x'` of every layer's keys and values in map space.

    Keys are block-rotated, values as they are. A layer's heads lie side by side, head 0 first, so
    that the moments of any set of heads are rows and columns of one matrix.

    Call `start_batch` before every forward pass.

    Args:
        rotary: Rotary embedding of the model, on the model's device.
        rotation_block: B of the key space.
        neighbours: Also sum up the products with so many earlier layers.
    """

    def __init__(self, rotary: Rotary, rotation_block: int, neighbours: int = 0) -> None:
        self.head_dim = rotary.head_dim
        self.num_tokens = 0
        self._rotary = rotary
        self._rotation_block = rotation_block
        # Keys and values, each [num_tokens, num_kv_heads * head_dim] float32, latest layer last.
        self._recent: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=neighbours + 1)
        # (earlier layer, layer) -> sums of keys and of values, [num_kv_heads * head_dim] squared
        self._sums: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None

    def start_batch(self, offsets: torch.Tensor, sequence_len: int) -> None:
        """Set the position offset of every sample of the next forward pass ([batch] int64)."""
        positions = torch.arange(sequence_len, device=offsets.device)
        cos, sin = self._rotary.cos_sin(block_shift(positions, offsets, self._rotation_block))
        self._rotation = cos[:, None], sin[:, None]
        self._recent.clear()
        self.num_tokens += len(offsets) * sequence_len

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        assert self._rotation is not None, "start_batch was not called"
        turned = self._rotary.turn(key.float(), *self._rotation)
        own = _per_token(turned), _per_token(value.float())
        self._recent.append(own)
        for back, earlier in enumerate(reversed(self._recent)):
            at = (layer - back, layer)
            if at not in self._sums:
                size = own[0].shape[1]
                zero = torch.zeros(size, size, dtype=torch.float64, device=key.device)
                self._sums[at] = zero, zero.clone()
            for sums, before, now in zip(self._sums[at], earlier, own, strict=True):
                # One batch in float32 is exact enough; the sum over many batches is not.
                sums += before.T @ now

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `x x'` over the tokens of a layer's keys and values.

        Returns:
            Two matrices [num_kv_heads * head_dim] squared, float64.
        """
        keys, values = self._sums[layer, layer]
        return keys / self.num_tokens, values / self.num_tokens

    def between(
        self, rows: list[HeadAt], columns: list[HeadAt]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean products of some heads' keys and values with those of others.

        Args:
            rows: Heads of one or several layers.
            columns: Likewise; no two layers may be further apart than `neighbours`.

        Returns:
            Two matrices [len(rows) * head_dim, len(columns) * head_dim] float64.
        """
        return self._gather(rows, columns, 0), self._gather(rows, columns, 1)

    def _gather(self, rows: list[HeadAt], columns: list[HeadAt], key_or_value: int) -> torch.Tensor:
        row_groups, column_groups = self._by_layer(rows), self._by_layer(columns)
        return torch.cat(
            [
                torch.cat([self._block(row, column, key_or_value) for column in column_groups], 1)
                for row in row_groups
            ]
        ).div_(self.num_tokens)

    def _by_layer(self, heads: list[HeadAt]) -> list[tuple[int, torch.Tensor]]:
        """Layer and row numbers of every run of heads of one layer."""
        device = next(iter(self._sums.values()))[0].device
        within = torch.arange(self.head_dim)
        groups = []
        for layer, members in groupby(heads, key=lambda at: at[0]):
            firsts = torch.tensor([head * self.head_dim for _, head in members])
            groups.append((layer, (firsts[:, None] + within).flatten().to(device)))
        return groups

    def _block(
        self,
        row: tuple[int, torch.Tensor],
        column: tuple[int, torch.Tensor],
        key_or_value: int,
    ) -> torch.Tensor:
        if row[0] > column[0]:
            return self._block(column, row, key_or_value).T
        sums = self._sums[row[0], column[0]][key_or_value]
        return sums[row[1][:, None], column[1]]


def collect(
    model: Any,
    sequences: torch.Tensor,
    offsets: torch.Tensor,
    batch_size: int,
    moments: HeadMoments,
    progress: Callable[[range], Iterable[int]],
) -> None:
    """Run the model over all sequences and feed every batch to `moments`.

    Args:
        model: Hugging Face causal LM in eval mode.
        sequences: [num_sequences, sequence_len] token ids on the CPU.
        offsets: [num_sequences] int64 on the CPU.
        batch_size: Sequences per forward pass.
        moments: Receives the attention tensors.
        progress: Wraps the iteration over batch starts.
    """
    with torch.inference_mode(), captured_attention(model, moments):
        for start in progress(range(0, len(sequences), batch_size)):
            ids = sequences[start : start + batch_size].to(model.device, torch.int64)
            batch_offsets = offsets[start : start + batch_size].to(model.device)
            moments.start_batch(batch_offsets, sequences.shape[1])
            # The decoder alone: logits are not needed.
            model.get_decoder()(input_ids=ids, use_cache=False)


def _per_token(heads: torch.Tensor) -> torch.Tensor:
    """[batch, num_kv_heads, len, head_dim] -> [batch * len, num_kv_heads * head_dim]."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)
