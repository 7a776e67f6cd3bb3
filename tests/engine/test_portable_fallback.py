"""Which models a GPU serves on the portable path, and what the server says about it."""

from __future__ import annotations

import pytest
import torch

SERVED, OTHERS = (32, 64, 96, 128, 256), (16, 48, 80, 112, 120)


@pytest.fixture(params=[2, 3, 4, None])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """FlashAttention's version that vLLM is made to have, for any head size."""
    from vllm.v1.attention.backends import fa_utils

    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: request.param)
    number: int | None = request.param
    return number


def test_head_sizes_that_some_kernel_refuses(version: int | None) -> None:
    from echokv_vllm import compat

    def is_served(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return compat.has_gpu_kernels("cuda", dtype, head_dim)

    assert [is_served(head_dim) for head_dim in SERVED] == [version in (2, 3)] * len(SERVED)
    assert not any(is_served(head_dim) for head_dim in OTHERS)
    assert not is_served(128, torch.float32)


@pytest.mark.parametrize("head_dim", [*SERVED, *OTHERS])
def test_the_kernel_refuses_these_head_sizes(head_dim: int) -> None:
    from echokv_kernels.gpu.launch import RebuildTiles

    if head_dim in SERVED:
        assert head_dim % RebuildTiles.choose(128, head_dim, 2, 2).step == 0
    else:
        with pytest.raises(ValueError, match=f"heads of {head_dim} elements"):
            RebuildTiles.choose(128, head_dim, 2, 2)


def test_the_warning_names_the_head_size(
    version: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echokv_vllm.worker import topology

    said: list[str] = []
    monkeypatch.setattr(topology.logger, "warning", lambda text, *args: said.append(text % args))
    topology._warn_of_portable_path(torch.bfloat16, 80)
    (message,) = said
    assert "heads of 80 elements" in message and "multiple of 32 elements" in message
    assert f"has version {version} for this GPU" in message
