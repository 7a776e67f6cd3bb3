"""Rotary position embedding R(t), as far as it can be known from the model's frequencies.

`R(a) R(b) = R(a + b)` and `R(-t)` undoes `R(t)`. Block-rotated key space rests on this
(design: method.md §3): a cached key `R(t0 + delta) k` is one known rotation `R(t0)` away
from `R(delta) k`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotation of one attention head by its token's position.

    Attributes:
        inv_freq: [rotary_dim / 2] float32, radians per token of each pair of elements.
        head_dim: elements of one head. Elements from `rotary_dim` on are never touched
            (partial rotary).
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, r/2), (1, r/2 + 1), ...
            (the half-split layout of GPT-NeoX and Llama).

    Raises:
        ValueError: `inv_freq` is not a float32 vector, or is wider than the head.
    """

    inv_freq: torch.Tensor
    head_dim: int
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.inv_freq.dim() != 1 or self.inv_freq.dtype != torch.float32:
            raise ValueError(
                f"inv_freq is {self.inv_freq.dtype} with shape {tuple(self.inv_freq.shape)}; "
                "it must be a float32 vector, one frequency per pair of elements"
            )
        if not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"{len(self.inv_freq)} frequencies rotate {self.rotary_dim} elements, but the head "
                f"has {self.head_dim}; pass between 1 and head_dim / 2 frequencies"
            )

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)

    def to(self, device: torch.device | str) -> Rotary:
        return dataclasses.replace(self, inv_freq=self.inv_freq.to(device))

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every pair's angle.

        Angles are products in float64: in float32 they are wrong by 0.004 rad at position
        131,072, which would break `R(a) R(b) = R(a + b)`.

        Args:
            positions: [...] int64, of any sign.

        Returns:
            cos, sin: [..., rotary_dim / 2] float32.
        """
        angle = positions.to(torch.float64)[..., None] * self.inv_freq.to(torch.float64)
        return angle.cos().to(torch.float32), angle.sin().to(torch.float32)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotates every head of a token by the token's position.

        Args:
            x: [..., heads, head_dim], any float dtype.
            positions: int64, broadcastable to [...]; a negative position rotates back.

        Returns:
            Same shape and dtype as `x`, computed in float32.
        """
        cos, sin = self.cos_sin(positions)
        return self.turn(x, cos[..., None, :], sin[..., None, :])

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Applies a rotation whose cosines and sines are at hand (minus `sin` rotates back).

        Args:
            x: [..., head_dim], any float dtype.
            cos: float32, broadcastable to [..., rotary_dim / 2].
            sin: likewise.

        Returns:
            Same shape and dtype as `x`, computed in float32.
        """
        if x.shape[-1] != self.head_dim:
            raise ValueError(
                f"the last axis of {tuple(x.shape)} must be one head of {self.head_dim} elements"
            )
        rotary_dim = self.rotary_dim
        first, second = self._pairs(x[..., :rotary_dim].to(torch.float32))
        new_first, new_second = first * cos - second * sin, second * cos + first * sin
        if self.interleaved:
            turned = torch.stack((new_first, new_second), dim=-1).flatten(-2)
        else:
            turned = torch.cat((new_first, new_second), dim=-1)
        turned = turned.to(x.dtype)
        if rotary_dim == self.head_dim:
            return turned
        return torch.cat((turned, x[..., rotary_dim:].expand(*turned.shape[:-1], -1)), dim=-1)

    def _pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.interleaved:
            return x[..., 0::2], x[..., 1::2]
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]
