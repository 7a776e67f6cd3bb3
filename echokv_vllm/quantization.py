"""What a quantised KV cache returns, and its bytes. Simulated: numbers in, the same shape out.

Keys are quantised as they are cached, after RoPE. Formats, by name:

    auto   bfloat16 or float16, left alone              16 bits per number
    fp8    e4m3 with scale 1, vLLM's default             8 bits
    int<b> b-bit codes between the least and the         b bits, and two float16
           greatest number of one token's head           (least, step) per token and head

One head of 128 numbers: fp8 128 bytes, int4 68 bytes, int2 36 bytes, against 256 bytes. vLLM's
`int4_per_token_head` stores as many bytes; it also mixes a head's numbers with a fixed rotation
before coding, which this simulation leaves out.
"""

from __future__ import annotations

import re

import torch

CACHE_FORMATS = ("auto", "fp8", "int4")
"""Formats a cache may have as a whole: values of `--kv-cache-dtype`."""

_FP8_MAX = 448.0
# Two float16 numbers per token and head.
_SCALE_BYTES = 4
_MAX_BITS = 8


def fp8(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """What an fp8 (e4m3) cache returns.

    Args:
        x: Any shape, float.
        scale: Stored number times this is the number meant; one for the whole tensor.

    Returns:
        Shape and dtype of `x`; numbers beyond 448 times `scale` become that.
    """
    stored = (x.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return (stored.float() * scale).to(x.dtype)


def int_per_token_head(x: torch.Tensor, bits: int) -> torch.Tensor:
    """What a cache of `bits`-bit codes returns, min-max coded over the last axis.

    Least number and step are rounded to float16, as they are stored. Autograd sees the rounding
    error as a fixed share of the step: the gradient passes straight through, and through the step
    it asks for a smaller range.

    Args:
        x: [..., head_dim] float.
        bits: 1 to 8.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: If `bits` is out of range.
    """
    if not 1 <= bits <= _MAX_BITS:
        raise ValueError(f"bits={bits} is not possible; a code has 1 to {_MAX_BITS} bits")
    top = 2**bits - 1
    numbers = x.float()
    least, greatest = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    least = _as_float16(least)
    step = _as_float16((greatest - least) / top)
    # Equal numbers have no step; any divisor gives them code 0.
    divisor = step.clamp(min=torch.finfo(torch.float16).tiny)
    codes = ((numbers - least) / divisor).round().clamp(0, top)
    coded = codes * step + least
    if coded.requires_grad:
        coded = numbers + step * ((coded - numbers) / divisor).detach()
    return coded.to(x.dtype)


def as_cached(x: torch.Tensor, format: str) -> torch.Tensor:
    """What a cache of a format returns for keys (after RoPE) or values `[..., head_dim]`.

    Raises:
        ValueError: If there is no such format.
    """
    bits = _code_bits(format)
    if bits:
        return int_per_token_head(x, bits)
    return fp8(x) if format == "fp8" else x


def bytes_per_number(format: str, head_dim: int, itemsize: int = 2) -> float:
    """Cache bytes per number of a head, scales included.

    Args:
        format: `auto`, `fp8` or `int<bits>`.
        head_dim: Numbers per head, over which a scale is shared.
        itemsize: Bytes per number of `auto`.

    Raises:
        ValueError: If there is no such format.
    """
    bits = _code_bits(format)
    if bits:
        # A head's codes fill whole bytes.
        return (-(-head_dim * bits // 8) + _SCALE_BYTES) / head_dim
    return 1.0 if format == "fp8" else float(itemsize)


def _as_float16(x: torch.Tensor) -> torch.Tensor:
    """`x` rounded; its gradient stays in float32, where small ones do not vanish."""
    return x + (x.half().float() - x).detach() if x.requires_grad else x.half().float()


def _code_bits(format: str) -> int:
    """Bits of an `int<bits>` format, 0 for the others."""
    match = re.fullmatch(r"int([1-8])", format)
    if match:
        return int(match[1])
    if format not in ("auto", "fp8"):
        raise ValueError(f"cache format {format!r} is unknown; allowed are auto, fp8, int1 to int8")
    return 0
