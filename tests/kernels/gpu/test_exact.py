"""Attention over exact residual pages of decodes against softmax in PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from echokv_kernels.step_plan import StepPlan

DTYPES = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float16]}
# Heads, group, head size, tokens per page.
SHAPES = [(2, 4, 32, 16), (3, 1, 64, 48), (1, 3, 128, 80), (4, 16, 96, 16), (2, 2, 256, 32)]
LENGTHS = (0, 1, 16, 37, 500, 64)


class Pages:
    """Requests with some exact pages each, in a pool whose other slots are poisoned."""

    def __init__(self, shape, dtype, device, paired, seed=0):
        self.heads, self.group, self.head_dim, self.size = shape
        self.device = device
        generator = torch.Generator().manual_seed(seed)
        n = len(LENGTHS)
        counts = [-(-length // self.size) for length in LENGTHS]
        # A layer's pages within wider blocks, as in a server's pool.
        pool = torch.full(
            (sum(counts) + 1, self.heads + 2, self.size, 2 * self.head_dim), float("nan"),
            dtype=dtype,
        )  # fmt: skip
        ids = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        self.plan = StepPlan.allocate(n + 2, max(LENGTHS), 16, self.size, paired, device)
        self.plan.tables.fill_(1 << 29)
        self.filled = []
        for request, length in enumerate(LENGTHS):
            tokens = torch.randn(length, self.heads, 2 * self.head_dim, generator=generator)
            self.filled.append(tokens.to(dtype).float())
            pages = [ids.pop() for _ in range(counts[request])]
            for token in range(length):
                page, slot = pages[token // self.size], token % self.size
                pool[page, 1 : self.heads + 1, slot] = self.filled[-1][token].to(dtype)
            row = self.plan.tables[self.plan.row_of(request, 1)]
            row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
            self.plan.lens[self.plan.row_of(request, 1)] = length
        self.cache = pool.to(device)[:, 1 : self.heads + 1]
        # Discarded heads' queries anywhere among the others, and more tokens than requests.
        num_heads = (self.heads + 3) * self.group
        self.rows = torch.randperm(num_heads, generator=generator)[: self.heads * self.group]
        self.query = torch.randn(n + 3, num_heads, self.head_dim, generator=generator).to(dtype)
        self.scale = self.head_dim**-0.5

    def expected(self, request):
        """Output [rows, head_dim] and log-sum-exp [rows], float32."""
        tokens = self.filled[request].repeat_interleave(self.group, 1).transpose(0, 1)
        key, value = tokens.chunk(2, -1)
        query = self.query[request, self.rows].float()
        scores = (key @ query[:, :, None])[:, :, 0] * self.scale
        return (scores.softmax(1)[:, None] @ value)[:, 0], scores.logsumexp(1)

    def attend(self):
        from echokv_kernels.gpu.decode import DecodeBatch, attend_exact

        per_request, per_part = self.plan.row_strides
        n, nothing = len(LENGTHS), torch.zeros(1, dtype=torch.int32, device=self.device)
        batch = DecodeBatch(
            num_reqs=n,
            plan=self.plan,
            retained_table=nothing,
            query_start_loc=nothing,
            seq_lens=nothing,
            exact_lens=self.plan.lens[per_part:][: n * per_request : per_request],
        )
        rows = self.rows.to(self.device, torch.int32)
        return attend_exact(self.query.to(self.device), rows, self.cache, batch, self.scale)


def merged(out, lse):
    """One part of several."""
    weight = lse.softmax(1).nan_to_num()[..., None]
    out = torch.where(lse[..., None] > float("-inf"), out, 0.0)  # otherwise undefined
    return (out * weight).sum(1), lse.logsumexp(1)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("num_programs", [1, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_matches_softmax(device, shape, num_programs, paired, monkeypatch):
    from echokv_kernels.gpu import decode

    monkeypatch.setattr(decode, "EXACT", replace(decode.EXACT, programs=num_programs))
    for dtype in DTYPES[device.type]:
        pages = Pages(shape, dtype, device, paired)
        results = [result.float().cpu() for result in pages.attend()]
        num_parts = results[0].shape[1]
        assert num_parts == (1 if num_programs == 1 else 16 // (1 << (shape[0] - 1).bit_length()))
        out, lse = merged(*results)
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
        for request, length in enumerate(LENGTHS):
            if length:
                wanted, wanted_lse = pages.expected(request)
                torch.testing.assert_close(out[request], wanted, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(lse[request], wanted_lse, rtol=1e-4, atol=1e-3)
