"""Kernels that begin while the one before them ends: programmatic dependent launch, from Hopper on.

A kernel lets the next one begin as soon as all its programs have, and waits for the previous one
before it touches what that wrote. Every program waits, those with nothing to do as well: otherwise
a kernel could be complete before the one before it, and the next would not wait for that either.
Both calls are harmless where the other kernel takes no part.

A layer whose decodes are all compressed is one such chain:

    store -> absorb -> decode -> exact -> reduce -> combine

Storing begins when everything before it is complete, so queries may be read at once. Decode waits
before it lets exact pages be read, which storing wrote.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that calls both functions below."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """Once all programs have called it, the next kernel's may start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Returns when the previous kernel is complete and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()
