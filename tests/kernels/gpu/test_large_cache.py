"""A cache beyond 2**31 elements gives what a small one gives, bit by bit."""

from __future__ import annotations

import pytest
import torch

from echokv_kernels.reconstruct import EchoMaps, FeatureSource
from echokv_kernels.step_plan import Shares, StepPlan, plan_shares

pytestmark = pytest.mark.gpu

BLOCK, HEADS, HEAD_DIM, GROUP = 16, 2, 64, 4
CONTEXTS = (300, 97)
NUM_BLOCKS = 40
LARGE_STRIDE = 1 << 27  # elements from block to block: 40 blocks are 5.4e9 elements
SMALL_STRIDE = 2 * HEADS * BLOCK * 2 * HEAD_DIM


def views(stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """R and D views of one layer; block ids of both groups differ."""
    pool = torch.empty(NUM_BLOCKS * stride, dtype=torch.bfloat16, device="cuda")
    shape = (NUM_BLOCKS, HEADS, BLOCK, 2 * HEAD_DIM)
    strides = (stride, BLOCK * 2 * HEAD_DIM, 2 * HEAD_DIM, 1)
    retained, residual = (
        pool.as_strided(shape, strides),
        pool.as_strided(shape, strides, stride // 2),
    )
    retained.fill_(float("nan"))
    residual.fill_(float("nan"))
    return retained, residual


def run(stride: int) -> dict[str, torch.Tensor]:
    """Stores, decodes and materialises over a pool with this distance between blocks."""
    from echokv_kernels.gpu.store import place_heads, store_pages

    torch.manual_seed(0)
    device = torch.device("cuda")
    retained, residual = views(stride)
    blocks = (torch.randperm(NUM_BLOCKS - 1, device=device) + 1).to(torch.int32)
    pages = [-(-length // BLOCK) for length in CONTEXTS]
    tables = torch.zeros(2, 2, max(pages), dtype=torch.int32, device=device)
    slots: list[list[torch.Tensor]] = [[], []]
    used = 0
    for request, count in enumerate(pages):
        token = torch.arange(CONTEXTS[request], device=device)
        row = blocks[used : used + count]
        used += count
        for group in range(2):
            # Both groups use the same ids here: their pages do not overlap in this pool.
            tables[group, request, :count] = row
            slots[group].append(row[token // BLOCK].long() * BLOCK + token % BLOCK)
    num_tokens = sum(CONTEXTS)
    key, value = (
        torch.randn(num_tokens, 2 * HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
        for _ in range(2)
    )
    places = place_heads((0, 1), (2, 3), device)
    store_pages(key, value, retained, residual, torch.cat(slots[0]), torch.cat(slots[1]), places)
    width = HEADS * HEAD_DIM
    maps = EchoMaps(
        *(
            torch.randn(HEADS, width, HEAD_DIM, dtype=torch.bfloat16, device=device) / 11
            for _ in "kv"
        )
    )
    results = {"retained": retained[1:].clone(), "residual": residual[1:].clone()}
    results["decode"] = decode(retained, tables[0], maps)
    results["workspace"] = materialize(retained, residual, tables, maps, key, value)
    return results


def source_of(retained: torch.Tensor) -> FeatureSource:
    return FeatureSource([retained], [torch.arange(HEADS)])


def rotation() -> object:
    from echokv_kernels.gpu.rotation import RotationTable
    from echokv_kernels.rotary import Rotary

    inverse = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
    return RotationTable.build(Rotary(inverse.float(), HEAD_DIM), 512)


def decode(retained: torch.Tensor, table: torch.Tensor, maps: EchoMaps) -> torch.Tensor:
    from echokv_kernels.gpu.decode import DecodeBatch, attend_context, combine, reduce_context
    from echokv_kernels.gpu.heads import EchoedHeads
    from echokv_kernels.gpu.launch import DECODE
    from echokv_kernels.gpu.scratch import DecodeScratch, DecodeShape

    n, device = len(CONTEXTS), retained.device
    heads = EchoedHeads.of(source_of(retained), maps, [(2, 0), (3, 1)], [(0, 0), (1, 1)], GROUP)
    shape = DecodeShape.of(64, DECODE)
    plan = StepPlan.allocate(n, max(CONTEXTS), BLOCK, BLOCK, True, device)
    plan_shares(
        plan, torch.tensor(CONTEXTS, device=device), Shares(8, shape.item_align, 64, 64, 64)
    )
    seq_lens = torch.tensor(CONTEXTS, dtype=torch.int32, device=device)
    batch = DecodeBatch(
        num_reqs=n, plan=plan, retained_table=table, seq_lens=seq_lens,
        query_start_loc=torch.arange(n + 1, dtype=torch.int32, device=device),
        exact_lens=torch.zeros(n, dtype=torch.int32, device=device),
    )  # fmt: skip
    query = torch.randn(n, 4 * GROUP, HEAD_DIM, dtype=torch.bfloat16, device=device)
    key, value = (
        torch.randn(n, 4, HEAD_DIM, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    output = torch.full_like(query, float("nan"))
    scratch = DecodeScratch.allocate([heads], shape, n, 8, max(CONTEXTS))
    scale = HEAD_DIM**-0.5
    attend_context(query, heads, batch, scratch, shape, DECODE, rotation(), scale)
    reduce_context(heads, batch, scratch)
    combine(
        output, query, key, value, query[:, None, : 2 * GROUP],
        torch.zeros(n, 1, 2 * GROUP, device=device), heads, batch, scratch, scale,
    )  # fmt: skip
    return output


def materialize(
    retained: torch.Tensor,
    residual: torch.Tensor,
    tables: torch.Tensor,
    maps: EchoMaps,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    from echokv_kernels.gpu.features import PagedFeatures
    from echokv_kernels.gpu.rebuild import materialize as fill

    device = retained.device

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    workspace = torch.zeros(3, 128, HEADS, 2, HEAD_DIM, dtype=torch.bfloat16, device=device)
    exact = torch.zeros(2, tables.shape[2], dtype=torch.uint8, device=device)
    exact[:, 1::3] = 1
    lens = ints(*CONTEXTS)
    fill(
        workspace, ints(0, 0, 1), ints(0, 128, 0), PagedFeatures.of(source_of(retained)), maps,
        ints(0, 1), residual, tables[1], exact, ints(1, 1), tables[0], lens, lens - 1,
        ints(0, 1, 2), key, value, ints(2, 3), rotation(), 64,
    )  # fmt: skip
    return workspace


def test_large_and_small_caches_agree() -> None:
    small, large = run(SMALL_STRIDE), run(LARGE_STRIDE)
    assert NUM_BLOCKS * LARGE_STRIDE > 2**31
    for name, tensor in small.items():
        assert torch.equal(
            tensor.contiguous().view(torch.int16), large[name].contiguous().view(torch.int16)
        ), name
    assert not small["decode"].isnan().any() and not small["workspace"].isnan().any()
