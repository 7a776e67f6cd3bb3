"""Rounds of merging against softmax.merge_attention, with poison where nothing may be read."""

import pytest
import torch

from echokv_kernels.softmax import merge_attention


class Parts:
    """Attention parts of a batch of four requests, two of them compressed, and padding.

    A query sees nothing in some parts, and some queries in none; `out` is NaN there.
    """

    def __init__(self, num_parts=3, num_heads=3, head_dim=32, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        lens = torch.tensor([1, 33, 20, 5])
        self.compressed = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
        request = torch.arange(4).repeat_interleave(lens)
        self.token_request = torch.cat((request, torch.tensor([-1, -1]))).int()
        self.num_tokens = len(self.token_request)
        self.wanted = torch.zeros(self.num_tokens, dtype=torch.bool)
        self.wanted[:-2] = self.compressed[request] != 0
        shape = (self.num_tokens, num_heads)
        self.outs, self.lses = [], []
        blind = torch.rand(shape, generator=generator) < 0.1
        for _ in range(num_parts):
            unseen = blind | (torch.rand(shape, generator=generator) < 0.3)
            out = torch.randn(*shape, head_dim, generator=generator).to(dtype)
            lse = 10 * torch.randn(shape, generator=generator)
            out[unseen] = float("nan")
            lse[unseen] = float("-inf")
            self.outs.append(out)
            self.lses.append(lse)

    def want(self):
        clean = [out.float().nan_to_num() for out in self.outs]
        return merge_attention(list(zip(clean, self.lses, strict=True)))

    def run(self, device, unseen_lse=float("-inf"), first_token=0):
        """Accumulators after all rounds; the first round finds NaN in them."""
        from echokv_kernels.gpu.merge import merge_partial

        num_heads, head_dim = self.outs[0].shape[1:]
        # Rows wider than a head and a slice of heads: strides are not those of the shape.
        wide = torch.full((self.num_tokens, num_heads + 1, head_dim + 8), float("nan"))
        out = wide.to(device)[:, 1:, :head_dim]
        lse = torch.full((num_heads, self.num_tokens), float("nan"), device=device)
        for i, (part, part_lse) in enumerate(zip(self.outs, self.lses, strict=True)):
            part_lse = torch.where(part_lse == float("-inf"), unseen_lse, part_lse)
            merge_partial(
                out, lse, part[first_token:].to(device),
                part_lse[first_token:].T.contiguous().to(device),
                self.token_request.to(device), self.compressed.to(device),
                first_token=first_token, is_first=i == 0,
            )  # fmt: skip
        return out, lse


@pytest.mark.parametrize("unseen_lse", [float("-inf"), float("inf")])
@pytest.mark.parametrize(("num_parts", "head_dim"), [(1, 32), (2, 96), (5, 128)])
def test_matches_reference(device, num_parts, head_dim, unseen_lse):
    parts = Parts(num_parts, head_dim=head_dim)
    out, lse = (x.cpu() for x in parts.run(device, unseen_lse))
    want_out, want_lse = parts.want()
    wanted = parts.wanted
    torch.testing.assert_close(out[wanted], want_out[wanted], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.T[wanted], want_lse[wanted], atol=1e-6, rtol=1e-5)
    assert bool((lse.T[wanted] == float("-inf")).any()), "no query saw nothing"
    assert bool(out[~wanted].isnan().all()) and bool(lse.T[~wanted].isnan().all())


def test_tokens_before_the_first_are_left_alone(device):
    parts = Parts()
    out, lse = (x.cpu() for x in parts.run(device, first_token=34))
    parts.wanted[:34] = False
    want_out, want_lse = parts.want()
    wanted = parts.wanted
    torch.testing.assert_close(out[wanted], want_out[wanted], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.T[wanted], want_lse[wanted], atol=1e-6, rtol=1e-5)
    assert bool(out[~wanted].isnan().all()) and bool(lse.T[~wanted].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_heads(device, dtype):
    from echokv_kernels.gpu.merge import write_merged

    parts = Parts(dtype=dtype)
    accumulator = parts.run(device)[0]
    output = torch.full((parts.num_tokens + 4, 8, 32), 7.0, dtype=dtype, device=device)
    rows = torch.tensor([6, 1, 3], dtype=torch.int32)
    write_merged(
        output, accumulator, rows.to(device), parts.token_request.to(device),
        parts.compressed.to(device),
    )  # fmt: skip
    want = torch.full(output.shape, 7.0, dtype=dtype)
    merged = parts.want()[0][parts.wanted].to(dtype)
    want[: parts.num_tokens][parts.wanted.nonzero(), rows.long()] = merged
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(output.cpu(), want, atol=1e-6, rtol=tolerance)


def test_many_rounds_lose_nothing(device):
    """A bfloat16 accumulator would drift by a percent."""
    parts = Parts(num_parts=24, num_heads=1, dtype=torch.bfloat16)
    for lse in parts.lses:
        lse.clamp_(max=0.0)
    out = parts.run(device)[0].cpu()[parts.wanted]
    torch.testing.assert_close(out, parts.want()[0][parts.wanted], atol=1e-5, rtol=1e-4)


def test_mismatches_are_named(device):
    from echokv_kernels.gpu.merge import merge_partial, write_merged

    out, lse = torch.zeros(4, 2, 32, device=device), torch.zeros(2, 4, device=device)
    request = torch.zeros(4, dtype=torch.int32, device=device)
    rows = torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="cannot be merged into out"):
        merge_partial(out, lse, out[:, :1], lse[:1], request, request)
    with pytest.raises(ValueError, match=r"part_lse has shape \(4, 2\)"):
        merge_partial(out, lse, out, lse.T, request, request)
    with pytest.raises(ValueError, match="tokens 1 to 5 are beyond"):
        merge_partial(out, lse, out, lse, request, request, first_token=1)
    with pytest.raises(ValueError, match="must be float32"):
        merge_partial(out.half(), lse, out, lse, request, request)
    with pytest.raises(ValueError, match="at 3 rows"):
        write_merged(out, out, rows, request, request)
