"""Rotation inside a kernel: angles of any position from two small tables, pairs of elements.

    position t = 256 c + f      angle(t) = angle(256 c) + angle(f)

Both tables are made in float64, so the angle of position 131,072 is as exact as that of position
1; a product of float32 numbers would be off by 0.004 rad there.

A head of `head_dim` elements is `head_dim / 2` pairs; a rotation turns each pair by its angle.
Which two elements form pair i depends on the model; pairs that the model does not rotate (partial
rotary) have cosine 1 and sine 0 in the tables, so kernels need not know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from echokv_kernels.rotary import Rotary

FINE_LEN = 256  # positions per entry of the coarse table


@dataclass(frozen=True, eq=False)
class RotationTable:
    """Cosines and sines of all positions below `max_position`.

    Attributes:
        coarse: [ceil(max_position / 256), 2, head_dim / 2] float32, cosines then sines of the
            positions 0, 256, 512, ...
        fine: [256, 2, head_dim / 2] float32, of the positions 0 ... 255.
        places: the same numbers as [2, 256, head_dim / 2 rounded up to a power of two], cosines
            then sines, for kernels that read them with the layout of a product.
        places_half: `places` in float16, which costs such kernels half the shared memory.
        rotary_dim: elements of a head that the model rotates.
        interleaved: as in `Rotary`.
    """

    coarse: torch.Tensor
    fine: torch.Tensor
    places: torch.Tensor
    places_half: torch.Tensor
    rotary_dim: int
    interleaved: bool

    @classmethod
    def build(cls, rotary: Rotary, max_position: int) -> RotationTable:
        """Tables for positions 0 ... max_position - 1, on the device of `rotary`."""
        device = rotary.inv_freq.device
        num_coarse = -(-max_position // FINE_LEN)
        half = rotary.head_dim // 2
        padding = (0, triton.next_power_of_2(half) - half)

        def table(positions: torch.Tensor) -> torch.Tensor:
            cos, sin = rotary.cos_sin(positions)
            still = (rotary.head_dim - rotary.rotary_dim) // 2
            cos = torch.nn.functional.pad(cos, (0, still), value=1.0)
            sin = torch.nn.functional.pad(sin, (0, still))
            return torch.stack((cos, sin), dim=1).contiguous()

        fine = table(torch.arange(FINE_LEN, device=device))
        # Padding pairs meet zeros, but must not make them NaN.
        places = torch.nn.functional.pad(fine, padding).transpose(0, 1).contiguous()
        return cls(
            coarse=table(torch.arange(num_coarse, device=device) * FINE_LEN),
            fine=fine,
            places=places,
            places_half=places.half(),
            rotary_dim=rotary.rotary_dim,
            interleaved=rotary.interleaved,
        )


@triton.jit
def pair_elements(
    pair,  # [P] int32
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The two elements of each pair, [P] int32 each."""
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    if ROTARY_DIM == HEAD_DIM:
        return pair, pair + HEAD_DIM // 2
    turned = pair < ROTARY_DIM // 2
    first = tl.where(turned, pair, pair + ROTARY_DIM // 2)
    second = tl.where(turned, pair + ROTARY_DIM // 2, pair + HEAD_DIM // 2)
    return first, second


@triton.jit
def element_pairs(
    element,  # [E] int32
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The pair each element belongs to, the pair's other element, and whether it comes second."""
    if INTERLEAVED:
        second = element % 2 == 1
        return element // 2, tl.where(second, element - 1, element + 1), second
    HALF: tl.constexpr = ROTARY_DIM // 2
    REST: tl.constexpr = (HEAD_DIM - ROTARY_DIM) // 2
    if REST == 0:
        second = element >= HALF
        return element % HALF, tl.where(second, element - HALF, element + HALF), second
    turned = element < ROTARY_DIM
    half = tl.where(turned, HALF, REST)
    local = tl.where(turned, element, element - ROTARY_DIM)
    second = local >= half
    pair = tl.where(second, local - half, local) + tl.where(turned, 0, HALF)
    return pair, tl.where(second, element - half, element + half), second


@triton.jit
def cos_sin(
    coarse_ptr,  # [C, 2, HEAD_DIM / 2] float32
    fine_ptr,  # [256, 2, HEAD_DIM / 2] float32
    position,  # [N] int
    pair,  # [P] int32
    HEAD_DIM: tl.constexpr,
):
    """Cosines and sines of the positions' angles, [N, P] float32 each."""
    HALF: tl.constexpr = HEAD_DIM // 2
    known = (pair < HALF)[None, :]
    coarse = coarse_ptr + (position // 256)[:, None] * HEAD_DIM + pair[None, :]
    fine = fine_ptr + (position % 256)[:, None] * HEAD_DIM + pair[None, :]
    cos_coarse = tl.load(coarse, mask=known, other=1.0)
    sin_coarse = tl.load(coarse + HALF, mask=known, other=0.0)
    cos_fine = tl.load(fine, mask=known, other=1.0)
    sin_fine = tl.load(fine + HALF, mask=known, other=0.0)
    cos = cos_coarse * cos_fine - sin_coarse * sin_fine
    sin = sin_coarse * cos_fine + cos_coarse * sin_fine
    return cos, sin
