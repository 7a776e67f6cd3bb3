"""Kernel tests run on the GPU where there is one, and everywhere else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU (Triton's interpreter) or the GPU (compiled kernels)."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("this process compiles its kernels, so they cannot run on the CPU")
    return torch.device(request.param)
