"""One layer's decode attention over a packed pool: stock, and echoed under a plan.

The pool has the shape a server gives it: a block holds the pages of all layers of one group, so
the pages of one layer lie a whole block apart. Block tables are random permutations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from echokv_kernels.gpu.decode import (
    DecodeBatch,
    attend_context,
    attend_exact,
    combine,
    reduce_context,
)
from echokv_kernels.gpu.heads import EchoedHeads
from echokv_kernels.gpu.launch import DecodeTiles, num_programs
from echokv_kernels.gpu.rotation import RotationTable
from echokv_kernels.gpu.scratch import DecodeScratch, DecodeShape
from echokv_kernels.layout import PlanLayout
from echokv_kernels.reconstruct import EchoMaps, FeatureSource
from echokv_kernels.rotary import Rotary
from echokv_kernels.step_plan import StepPlan, plan_shares
from echokv_vllm.plan import EchoPlan, Source
from echokv_vllm.presets import preset_plan

NUM_LAYERS, KV_HEADS, GROUP, HEAD_DIM = 32, 8, 4, 128  # Llama-3.1-8B
SINK_TOKENS, RECENT_TOKENS = 16, 144  # what stays exact, in whole 16-token pages
SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device="cuda")


def fill_random(pool: torch.Tensor) -> None:
    """Random data without float32 copies of the whole pool."""
    flat = pool.view(-1)
    piece = 1 << 28
    noise = torch.randn(piece, dtype=DTYPE, device="cuda")
    for start in range(0, flat.numel(), piece):
        stop = min(start + piece, flat.numel())
        flat[start:stop] = noise[: stop - start].roll(start // piece)


def random_table(num_reqs: int, num_pages: int) -> torch.Tensor:
    """[num_reqs, num_pages] int32, all different, none 0."""
    order = torch.randperm(num_reqs * num_pages, device="cuda") + 1
    return order.view(num_reqs, num_pages).to(torch.int32)


class StockDecode:
    """FlashAttention over a stock paged cache, the way vLLM's FLASH_ATTN backend calls it.

    Args:
        num_reqs: requests, one query token each.
        context_len: cached tokens of each.
        num_caches: layers with a cache of their own.
        kv_heads: KV heads.
    """

    def __init__(
        self, num_reqs: int, context_len: int, num_caches: int, kv_heads: int = KV_HEADS
    ) -> None:
        self.num_reqs, self.context_len, self.kv_heads = num_reqs, context_len, kv_heads
        pages = -(-context_len // 16)
        self.table = random_table(num_reqs, pages)
        shape = (num_reqs * pages + 1, 16, kv_heads, 2 * HEAD_DIM)
        self.caches = []
        for _ in range(num_caches):
            cache = torch.empty(shape, dtype=DTYPE, device="cuda")
            fill_random(cache)
            self.caches.append(cache)
        self.query = randn(num_reqs, kv_heads * GROUP, HEAD_DIM)
        self.output = torch.empty_like(self.query)
        self.seq_lens = torch.full((num_reqs,), context_len, dtype=torch.int32, device="cuda")
        self.call = FlashDecode(self.seq_lens, kv_heads, context_len)

    @property
    def num_bytes(self) -> int:
        return self.num_reqs * self.context_len * self.kv_heads * 2 * HEAD_DIM * 2

    def calls(self) -> list[Callable[[], None]]:
        return [
            lambda cache=cache: self.call(
                self.query,
                cache[..., :HEAD_DIM],
                cache[..., HEAD_DIM:],
                self.table,
                self.output,
            )
            for cache in self.caches
        ]


class FlashDecode:
    """One query token per row through vLLM's FlashAttention, with its ahead-of-time schedule."""

    def __init__(self, seq_lens: torch.Tensor, kv_heads: int, max_len: int) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        num_rows = seq_lens.shape[0]
        self.function = flash_attn_varlen_func
        self.start = torch.arange(num_rows + 1, dtype=torch.int32, device="cuda")
        self.seq_lens, self.max_len = seq_lens, max_len
        self.metadata = get_scheduler_metadata(
            batch_size=num_rows,
            max_seqlen_q=1,
            max_seqlen_k=max_len,
            num_heads_q=kv_heads * GROUP,
            num_heads_kv=kv_heads,
            headdim=HEAD_DIM,
            cache_seqlens=seq_lens,
            qkv_dtype=DTYPE,
            cu_seqlens_q=self.start,
            page_size=16,
            causal=True,
            num_splits=32,
        )

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the log-sum-exp [query heads, rows]."""
        _, lse = self.function(
            q=query, k=key, v=value, out=output, cu_seqlens_q=self.start, max_seqlen_q=1,
            seqused_k=self.seq_lens, max_seqlen_k=self.max_len, softmax_scale=SCALE, causal=True,
            block_table=table, scheduler_metadata=self.metadata, num_splits=32, fa_version=3,
            return_softmax_lse=True,
        )  # fmt: skip
        return lse


def plan_named(name: str, num_layers: int) -> EchoPlan:
    """A preset, or "PRESET+N": with N more source heads, those nearest in earlier layers."""
    preset, _, more = name.partition("+")
    plan = preset_plan(preset, num_layers, KV_HEADS)
    if not more:
        return plan
    layers = []
    for index, layer in enumerate(plan.layers):
        room, found = int(more), []
        for earlier in range(index - 1, -1, -1):
            heads = plan.layers[earlier].retained[:room]
            room -= len(heads)
            found += [Source(earlier, heads)] if heads else []
        layers.append(replace(layer, sources=(*reversed(found), *layer.sources)))
    return replace(plan, name=name, layers=tuple(layers))


@dataclass(frozen=True)
class EchoCase:
    """What to run.

    Attributes:
        preset: name of the plan (`plan_named`).
        rotation_block: of its maps.
        num_reqs: requests.
        context_len: cached tokens of each, the current one included.
    """

    preset: str
    rotation_block: int
    num_reqs: int
    context_len: int


class EchoedDecode:
    """A compressed batch: all context dropped but sinks and recent tokens.

    Args:
        case: what to run.
        num_caches: layers to rotate through, of those that discard heads and have most sources.
        tiles: tile numbers.
    """

    def __init__(
        self, case: EchoCase, num_caches: int, tiles: DecodeTiles, num_layers: int = NUM_LAYERS
    ) -> None:
        self.case = case
        plan = plan_named(case.preset, num_layers)
        counts = tuple(len(layer.retained) for layer in plan.layers)
        sizes = PlanLayout(counts, KV_HEADS, HEAD_DIM, 2).block_sizes()
        self.block_size, self.residual_block_size = sizes.retained, sizes.residual
        pages = -(-case.context_len // self.block_size)
        num_blocks = case.num_reqs * pages + 1
        slot, page = 2 * HEAD_DIM, self.block_size * 2 * HEAD_DIM
        row = sum(counts) * page
        pool = torch.empty(num_blocks * row, dtype=DTYPE, device="cuda")
        fill_random(pool)
        starts = torch.tensor((0, *counts)).cumsum(0) * page
        views = [
            pool.as_strided((num_blocks, count, self.block_size, slot), (row, page, slot, 1), start)
            for count, start in zip(counts, starts.tolist()[:-1], strict=True)
        ]
        # The first layers have fewer earlier ones to read.
        widths = {n: len(plan.source_heads(n)) for n in range(num_layers) if plan.discarded(n)}
        widest = [n for n, width in widths.items() if width == max(widths.values())]
        self.heads = [self._heads(plan, layer, views) for layer in widest[:num_caches]]
        self._step(pages)
        self._inputs()
        self.retile(tiles)

    def retile(self, tiles: DecodeTiles) -> None:
        """Switches to other tile numbers."""
        self.tiles = tiles
        self.shape = DecodeShape.of(self.case.rotation_block, tiles, self.heads)
        programs = num_programs(torch.device("cuda"), self.case.rotation_block, tiles)
        self.scratch = DecodeScratch.allocate(
            self.heads, self.shape, self.case.num_reqs, programs, self.case.context_len
        )
        self.plan_shares(self.batch.seq_lens)

    def _heads(self, plan: EchoPlan, layer: int, views: list[torch.Tensor]) -> EchoedHeads:
        layers = [source.layer for source in plan.layers[layer].sources]
        places = [
            [plan.layers[source.layer].retained.index(head) for head in source.heads]
            for source in plan.layers[layer].sources
        ]
        source = FeatureSource(
            [views[n] for n in layers], [torch.tensor(place) for place in places]
        )
        discarded = plan.discarded(layer)
        maps = EchoMaps(
            *(randn(len(discarded), source.width, HEAD_DIM) / source.width**0.5 for _ in range(2))
        )
        flat = [
            (source_layer, head)
            for source_layer, place in zip(layers, places, strict=True)
            for head in place
        ]
        own = [
            (plan.layers[layer].retained[head], n)
            for n, (source_layer, head) in enumerate(flat)
            if source_layer == layer
        ]
        echoed = [(head, place) for place, head in enumerate(discarded)]
        return EchoedHeads.of(source, maps, echoed, own, GROUP)

    def _step(self, num_pages: int) -> None:
        case = self.case
        n = case.num_reqs
        self.plan = StepPlan.allocate(
            n, case.context_len, self.block_size, self.residual_block_size, True,
            torch.device("cuda"),
        )  # fmt: skip
        first_token = torch.arange(self.plan.exact.shape[1], device="cuda")
        first_token *= self.residual_block_size
        exact = (first_token < SINK_TOKENS) | (first_token >= case.context_len - RECENT_TOKENS)
        self.plan.exact.copy_(exact.expand_as(self.plan.exact))
        self.exact_len = int(exact.sum()) * self.residual_block_size
        self.batch = DecodeBatch(
            num_reqs=n,
            plan=self.plan,
            retained_table=random_table(n, num_pages),
            query_start_loc=torch.arange(n + 1, dtype=torch.int32, device="cuda"),
            seq_lens=torch.full((n,), case.context_len, dtype=torch.int32, device="cuda"),
            exact_lens=torch.full((n,), self.exact_len, dtype=torch.int32, device="cuda"),
        )

    def plan_shares(self, tokens: torch.Tensor) -> None:
        """Shares out the tokens [n] of the requests; 0 of those that are not compressed."""
        shares = self.shape.shares(self.scratch.num_programs, self.tiles)
        plan_shares(self.plan, tokens.to(torch.int64), shares)

    def _inputs(self) -> None:
        n, heads = self.case.num_reqs, self.heads[0]
        rows = heads.num_echoed * GROUP
        self.query = randn(n, KV_HEADS * GROUP, HEAD_DIM)
        self.key, self.value = randn(n, KV_HEADS, HEAD_DIM), randn(n, KV_HEADS, HEAD_DIM)
        self.output = torch.zeros_like(self.query)
        self.exact_out = randn(n, 1, rows, HEAD_DIM)
        self.exact_lse = torch.randn(n, 1, rows, device="cuda")
        inverse = 500000.0 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
        self.rotation = RotationTable.build(
            Rotary(inverse.to(torch.float32), HEAD_DIM), self.case.context_len
        )
        pages = self.exact_len // self.residual_block_size
        self.exact_cache = randn(
            n * pages + 1, heads.num_echoed, self.residual_block_size, 2 * HEAD_DIM
        )
        per_request, per_part = self.plan.row_strides
        exact_rows = self.plan.tables[per_part:][: n * per_request : per_request]
        exact_rows[:, :pages] = random_table(n, pages)
        self.echoed_queries = heads.row_query[:rows].contiguous()

    @property
    def num_bytes(self) -> int:
        """Bytes of features that must be read."""
        return self.case.num_reqs * self.case.context_len * self.heads[0].maps.width * 2 * 2

    def run(self, heads: EchoedHeads) -> None:
        self._context(heads)
        reduce_context(heads, self.batch, self.scratch)
        combine(
            self.output, self.query, self.key, self.value, self.exact_out, self.exact_lse, heads,
            self.batch, self.scratch, SCALE,
        )  # fmt: skip

    def run_whole(self, heads: EchoedHeads) -> None:
        """With the exact pages, as a layer of a step runs whose requests are all compressed."""
        self._context(heads)
        exact = attend_exact(self.query, self.echoed_queries, self.exact_cache, self.batch, SCALE)
        reduce_context(heads, self.batch, self.scratch)
        combine(
            self.output, self.query, self.key, self.value, *exact, heads, self.batch, self.scratch,
            SCALE, chained=True,
        )  # fmt: skip

    def _context(self, heads: EchoedHeads) -> None:
        attend_context(
            self.query, heads, self.batch, self.scratch, self.shape, self.tiles, self.rotation,
            SCALE,
        )  # fmt: skip

    def calls(self) -> list[Callable[[], None]]:
        """Echoed decode alone, one call per layer."""
        return [lambda heads=heads: self.run(heads) for heads in self.heads]

    def whole_calls(self) -> list[Callable[[], None]]:
        """With the exact pages."""
        return [lambda heads=heads: self.run_whole(heads) for heads in self.heads]
