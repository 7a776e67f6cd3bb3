"""Paged batches with poison in every unused byte, and dense attention in float64 to compare with.

Test modules cannot import from here (importlib mode), so the helpers come as one fixture, `kit`.
"""

from types import SimpleNamespace

import pytest
import torch

from echokv_kernels.layout import PageLayout
from echokv_kernels.rotary import Rotary

torch.set_num_threads(1)


def dense_attention(query, key, value, visible, scale):
    """Plain attention of one request, in the dtype of its inputs.

    query [m, H * G, d], key and value [t, H, d], visible [m, t] or [t] bool. Returns out, lse with
    0 and -inf where nothing is visible.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("mhd,thd->hmt", query, key) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.where(lse[..., None] > float("-inf"), scores.softmax(-1), 0)
    return torch.einsum("hmt,thd->mhd", weights, value), lse.T


def complex_rotate(rotary, x, positions):
    """Each pair as a complex number times exp(i angle); x [t, heads, d] float64."""
    x = x.double().clone()
    half = rotary.rotary_dim // 2
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + half)
        angle = positions.double() * float(rotary.inv_freq[pair])
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        z = torch.complex(x[..., a], x[..., b]) * turn
        x[..., a], x[..., b] = z.real, z.imag
    return x


def make_rotary(head_dim, rotary_dim=None, interleaved=False):
    rotary_dim = rotary_dim or head_dim
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return Rotary(500000.0**-exponent, head_dim, interleaved)


def packed_views(layouts, num_blocks, dtype):
    """Views of several layers' pages in one packed pool full of NaN, with gaps between pages."""
    gap = 24
    row = gap + sum(layout.page_bytes // layout.itemsize + gap for layout in layouts)
    pool = torch.full((num_blocks * row,), float("nan"), dtype=dtype)
    views, offset = [], gap
    for layout in layouts:
        head = layout.block_size * layout.slot_size
        stride = (row, head, layout.slot_size, 1)
        views.append(torch.as_strided(pool, layout.view_shape(num_blocks), stride, offset))
        offset += layout.num_heads * head + gap
    return views


class PagedBatch:
    """Requests whose keys and values lie in scattered pages of one packed pool.

    Attributes:
        key, value: per request [layers, seq_len, num_heads, head_dim] float64, before rounding
            to `dtype`.
        caches: one view per layer; slots that belong to no token are NaN.
        block_table: [n, P] int32; columns beyond a request's pages hold random page ids.
        query_start_loc: [n + 1] int32 on the CPU. seq_lens, context_lens: [n] int32.
    """

    def __init__(
        self, query_lens, context_lens, num_heads, head_dim, block_size,
        num_layers=1, dtype=torch.float32, seed=0,
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.query_lens = query_lens
        self.context_lens = torch.tensor(context_lens, dtype=torch.int32)
        self.seq_lens = self.context_lens + torch.tensor(query_lens, dtype=torch.int32)
        ends = torch.tensor(query_lens).cumsum(0)
        self.query_start_loc = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int()
        self.num_tokens = int(ends[-1])
        self.max_len = int(self.seq_lens.max())
        self.head_dim, self.block_size, self.dtype = head_dim, block_size, dtype
        self.scale = head_dim**-0.5
        num_pages = [-(-int(n) // block_size) for n in self.seq_lens]
        num_blocks = 2 * sum(num_pages) + 3
        ids = torch.randperm(num_blocks - 1, generator=self.generator) + 1
        shape = (len(query_lens), max(num_pages) + 2)
        self.block_table = torch.randint(num_blocks, shape, generator=self.generator).int()
        layout = PageLayout(num_heads, head_dim, block_size, dtype.itemsize)
        self.caches = packed_views([layout] * num_layers, num_blocks, dtype)
        self.key, self.value = [], []
        used = 0
        for request, count in enumerate(num_pages):
            pages = ids[used : used + count]
            used += count
            self.block_table[request, :count] = pages.int()
            shape = (num_layers, int(self.seq_lens[request]), num_heads, head_dim)
            self.key.append(self.randn(*shape))
            self.value.append(self.randn(*shape))
            token = torch.arange(shape[1])
            block, offset = pages[token // block_size], token % block_size
            for layer, cache in enumerate(self.caches):
                slots = torch.cat((self.key[-1][layer], self.value[-1][layer]), -1)
                cache[block, :, offset] = slots.to(dtype)

    def randn(self, *shape):
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def queries(self, num_heads, num_padding=3):
        """[T + padding, num_heads, head_dim] float64; padding is NaN."""
        query = self.randn(self.num_tokens + num_padding, num_heads, self.head_dim)
        query[self.num_tokens :] = float("nan")
        return query

    def random_pages(self, block_size, share=0.5):
        """[n, pages] bool, random beyond each request's length too."""
        num_pages = -(-self.max_len // block_size) + 1
        shape = (len(self.query_lens), num_pages)
        return torch.rand(shape, generator=self.generator) < share

    def dense(self, query, visible_of, keys=None, values=None, dtype=torch.float64):
        """Dense attention request by request.

        visible_of(request, position [m], token [t]) gives [m, t]; keys and values are per
        request [t, H, d], by default those of layer 0. Inputs are rounded to `dtype`.
        """
        num_tokens, num_heads = query.shape[:2]
        out = torch.zeros(query.shape, dtype=torch.float64)
        lse = torch.full((num_tokens, num_heads), float("-inf"), dtype=torch.float64)
        for request, query_len in enumerate(self.query_lens):
            start = int(self.query_start_loc[request])
            at = slice(start, start + query_len)
            seq_len = int(self.seq_lens[request])
            position = torch.arange(seq_len - query_len, seq_len)
            key = self.key[request][0] if keys is None else keys[request]
            value = self.value[request][0] if values is None else values[request]
            visible = visible_of(request, position, torch.arange(seq_len))
            result = dense_attention(
                query[at].to(dtype), key.to(dtype), value.to(dtype), visible, self.scale
            )
            out[at], lse[at] = result[0].double(), result[1].double()
        return out, lse


def assert_same(got, want, atol=2e-5):
    """out and lse agree; -inf in the same places, no NaN."""
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs.double(), atol=atol, rtol=1e-5)


def assert_as_precise(got, low_precision, exact):
    """The largest error is at most twice that of plain PyTorch in the same precision."""
    for mine, theirs, truth in zip(got, low_precision, exact, strict=True):
        seen = truth > float("-inf")
        assert torch.equal(mine > float("-inf"), seen)
        error = (mine.double() - truth)[seen].abs().max()
        allowed = 2 * (theirs - truth)[seen].abs().max()
        assert error <= allowed, f"error {error:.2e}, plain PyTorch allows {allowed:.2e}"


@pytest.fixture(scope="session")
def kit():
    return SimpleNamespace(
        PagedBatch=PagedBatch,
        packed_views=packed_views,
        make_rotary=make_rotary,
        complex_rotate=complex_rotate,
        assert_same=assert_same,
        assert_as_precise=assert_as_precise,
    )
