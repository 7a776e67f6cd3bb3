"""A batch of echoed decodes, what the kernels make of it, and what they should."""

from __future__ import annotations

import dataclasses
import math

import torch

from echokv_kernels.attention import paged_attention
from echokv_kernels.decode import absorbed_decode
from echokv_kernels.reconstruct import EchoMaps, FeatureSource, rebuilt_attention
from echokv_kernels.softmax import merge_attention
from echokv_kernels.step_plan import Shares, StepPlan, plan_shares
from echokv_kernels.tiles import split_queries

HEADS = 3  # KV heads that layer 0 retains


class Scene:
    """Decodes over a paged batch; some requests are compressed.

    `kit` is the fixture of tests/kernels, the other arguments are shapes and tile numbers.
    """

    def __init__(
        self, kit, device, rotation_block=64, group=2, head_dim=32, block_size=16,
        residual_block_size=48, sources=((0, None),), num_echoed=2, bias=True, rotary_dim=None,
        interleaved=False, dtype=torch.float32, context_lens=(500, 63, 15, 700, 17, 1, 0),
        full=(1,), chunk_len=128, num_programs=3, max_lines=6, num_retained=HEADS, seed=0,
        fused_bytes=2048, num_parts=1,
    ):  # fmt: skip
        self.kit, self.device, self.dtype = kit, device, dtype
        self.rotation_block, self.group, self.full = rotation_block, group, full
        n = len(context_lens)
        self.batch = batch = kit.PagedBatch(
            [1] * n, list(context_lens), num_retained, head_dim, block_size,
            num_layers=1 + max(layer for layer, _ in sources), dtype=dtype, seed=seed,
        )  # fmt: skip
        pool = batch.caches[0].untyped_storage()
        self.caches = [cache.to(torch.float32) for cache in batch.caches]
        moved = torch.empty(0, dtype=dtype).set_(pool).to(device)
        self.device_caches = [
            moved.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            for cache in batch.caches
        ]
        self.source_heads = [
            (layer, list(range(num_retained)) if heads is None else list(heads))
            for layer, heads in sources
        ]
        width = head_dim * sum(len(heads) for _, heads in self.source_heads)
        shape = (num_echoed, width, head_dim)
        randn = batch.randn
        maps = [randn(*shape) / width**0.5, randn(*shape) / width**0.5, None, None]
        if bias:
            maps[2:] = randn(num_echoed, head_dim), randn(num_echoed, head_dim)
        self.maps = EchoMaps(*(m if m is None else m.to(dtype) for m in maps))
        self.rotary = kit.make_rotary(head_dim, rotary_dim, interleaved)
        # The model's heads in an order of their own: echoed heads are not "the last ones".
        order = torch.randperm(num_retained + num_echoed, generator=batch.generator).tolist()
        self.retained, self.echoed = order[:num_retained], order[num_retained:]
        num_heads = len(order)
        self.query = randn(n, num_heads * group, head_dim).to(dtype)
        self.key, self.value = (randn(n, num_heads, head_dim).to(dtype) for _ in range(2))
        self.residual_block_size = residual_block_size
        pages = -(-(batch.max_len) // residual_block_size)
        self.exact = torch.rand(n, pages, generator=batch.generator) < 0.3
        for request in full:
            self.exact[request] = True
        self.exact_out = randn(n, num_echoed * group, head_dim).to(dtype)
        self.exact_lse = randn(n, num_echoed * group).float()
        self.exact_lens = torch.tensor([request % 2 for request in range(n)], dtype=torch.int32)
        self.exact_out[self.exact_lens == 0] = float("nan")
        self.exact_lse[self.exact_lens == 0] = float("nan")
        self.chunk_len, self.num_programs, self.max_lines = chunk_len, num_programs, max_lines
        self.fused_bytes = fused_bytes
        self.num_parts = num_parts

    def plan(self, align):
        n, batch = len(self.batch.query_lens), self.batch
        plan = StepPlan.allocate(
            n, batch.max_len, batch.block_size, self.residual_block_size, True, self.device
        )
        plan.exact.fill_(255)
        plan.exact[:, : self.exact.shape[1]].copy_(self.exact)
        tokens = batch.seq_lens.to(device=self.device, dtype=torch.int64, copy=True)
        tokens[list(self.full)] = 0
        plan_shares(plan, tokens, Shares(self.num_programs, align, 64, 40, self.rotation_block))
        return plan

    def prepare(self):
        """Two launches, context and combine, and the output: poison where they write nothing."""
        from echokv_kernels.gpu.decode import (
            DecodeBatch,
            attend_context,
            attend_exact,
            combine,
            reduce_context,
        )
        from echokv_kernels.gpu.heads import EchoedHeads
        from echokv_kernels.gpu.launch import DecodeTiles
        from echokv_kernels.gpu.rotation import RotationTable
        from echokv_kernels.gpu.scratch import DecodeScratch, DecodeShape, line_size

        device, batch = self.device, self.batch
        source = FeatureSource(
            [self.device_caches[layer] for layer, _ in self.source_heads],
            [torch.tensor(heads) for _, heads in self.source_heads],
        )
        places = [(layer, head) for layer, heads in self.source_heads for head in heads]
        own = [
            (self.retained[head], place) for place, (layer, head) in enumerate(places) if layer == 0
        ]
        heads = EchoedHeads.of(
            source,
            self.maps.to(device=device),
            [(head, place) for place, head in enumerate(self.echoed)],
            own,
            self.group,
        )
        tiles = DecodeTiles(
            chunk_len=self.chunk_len,
            block_len=32,
            wide_block_len=64,
            max_width=2 * self.batch.head_dim,
            value_len=64,
            # Scenes for two loops take several steps over the values.
            warp_sums=DecodeTiles.warp_sums
            if self.fused_bytes
            else heads.row_pad * self.batch.head_dim // 2,
            fused_bytes=self.fused_bytes,
            hold_from=256,
        )
        shape = DecodeShape.of(self.rotation_block, tiles, [heads])
        scratch = DecodeScratch.allocate(
            [heads],
            shape,
            len(batch.query_lens),
            self.num_programs,
            batch.max_len,
            self.max_lines * line_size(heads) * self.dtype.itemsize,
        )
        for field in dataclasses.fields(scratch):
            memory = getattr(scratch, field.name)
            if isinstance(memory, torch.Tensor) and memory.is_floating_point():
                memory.fill_(float("nan"))
        output = torch.full_like(self.query, 777.0).to(device)
        decode_batch = DecodeBatch(
            num_reqs=len(batch.query_lens),
            plan=self.plan(shape.item_align),
            retained_table=batch.block_table.to(device),
            query_start_loc=batch.query_start_loc.to(device),
            seq_lens=batch.seq_lens.to(device),
            exact_lens=self.exact_lens.to(device),
        )
        query, key, value, exact_out, exact_lse = (
            x.to(device) for x in (self.query, self.key, self.value, self.exact_out, self.exact_lse)
        )
        exact_out, exact_lse = self.exact_parts(exact_out, exact_lse)
        rotation = RotationTable.build(self.rotary.to(device), batch.max_len)
        # A link of a chain; what it finds is not used.
        exact_rows = self.rows(self.echoed).to(device, torch.int32)
        exact_pages = torch.zeros(
            1, len(self.echoed), self.residual_block_size, 2 * batch.head_dim,
            dtype=self.dtype, device=device,
        )  # fmt: skip

        def context(chained=False):
            attend_context(query, heads, decode_batch, scratch, shape, tiles, rotation, batch.scale)
            if chained:
                attend_exact(query, exact_rows, exact_pages, decode_batch, batch.scale)
            reduce_context(heads, decode_batch, scratch)

        def finish(chained=False):
            combine(
                output, query, key, value, exact_out, exact_lse, heads,
                decode_batch, scratch,
                batch.scale, chained=chained,
            )  # fmt: skip

        return context, finish, output, [head for head, _ in own]

    def exact_parts(self, out, lse):
        """The exact part as `num_parts` of them: two halves, the others of no tokens."""
        if self.num_parts == 1:
            return out[:, None], lse[:, None]
        empty = self.num_parts - 2
        halves, nothing = [lse - math.log(2.0)] * 2, [torch.full_like(lse, float("-inf"))]
        garbage = [torch.full_like(out, float("nan"))]
        return torch.stack([out, out] + garbage * empty, 1), torch.stack(
            halves + nothing * empty, 1
        )

    def run(self):
        """The kernels' output and the retained heads with a source head."""
        context, finish, output, own = self.prepare()
        context()
        finish()
        return output.cpu(), own

    def rows(self, heads):
        return (torch.tensor(heads)[:, None] * self.group + torch.arange(self.group)).flatten()

    def expected(self, own):
        """The same in float32 from the rounded inputs."""
        batch, n = self.batch, len(self.batch.query_lens)
        want = torch.full(self.query.shape, 777.0)
        compressed = [request for request in range(n) if request not in self.full]
        tiles = split_queries(batch.query_start_loc, batch.seq_lens)
        source = FeatureSource(
            [self.caches[layer] for layer, _ in self.source_heads],
            [torch.tensor(heads) for _, heads in self.source_heads],
        )
        echo_rows = self.rows(self.echoed)
        query = self.query.float()
        # Un-rotated keys cannot be absorbed: their reference rebuilds them.
        attention = rebuilt_attention if self.rotation_block == 1 else absorbed_decode
        context = attention(
            query[:, echo_rows], source, self.maps.to(dtype=torch.float32), batch.block_table,
            tiles, batch.context_lens, self.exact, self.residual_block_size, self.rotary,
            self.rotation_block, batch.scale, max_len=batch.max_len,
        )  # fmt: skip
        key = self.key.float()[:, self.echoed].repeat_interleave(self.group, 1)
        value = self.value.float()[:, self.echoed].repeat_interleave(self.group, 1)
        score = (query[:, echo_rows] * key).sum(-1) * batch.scale
        page = (batch.seq_lens - 1).long() // self.residual_block_size
        is_exact = self.exact[torch.arange(n), page]
        score[is_exact] = float("-inf")
        exact_lse = self.exact_lse.masked_fill((self.exact_lens == 0)[:, None], float("-inf"))
        parts = [context, (self.exact_out.float().nan_to_num(), exact_lse), (value, score)]
        merged, _ = merge_attention(parts)
        for request in compressed:
            want[request, echo_rows] = merged[request]
        if own:
            rows = self.rows(own)
            places = [self.retained.index(head) for head in own]
            out, _ = paged_attention(
                query[:, rows], self.caches[0][:, places], batch.block_table, tiles, "causal",
                batch.scale, max_len=batch.max_len,
            )  # fmt: skip
            for request in compressed:
                want[request, rows] = out[request]
        return want

    def check(self):
        got, own = self.run()
        want = self.expected(own)
        tolerance = {torch.float32: 5e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}[self.dtype]
        torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)
