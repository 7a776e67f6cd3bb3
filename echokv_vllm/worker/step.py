"""What all layers of one engine step share, built once per step.

vLLM builds metadata group by group, R before D. The R group's builder opens a step; the D
group's builder completes it, because only then are both block tables known. Completing stamps
the pages this step writes and decides which D pages are exact. Both happen on the device's
stream before any layer runs, so no page is read between being given away and being stamped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from echokv_kernels.store import exact_pages, stamp_owners
from echokv_kernels.tiles import QueryTiles, split_queries


@dataclass
class EchoStep:
    """One batch.

    Attributes:
        num_tokens: Tokens of the batch without padding.
        num_reqs: Requests of the batch.
        query_start_loc: [num_reqs + 1] int, first token of each request.
        context_lens: [num_reqs] int64, tokens cached before this step.
        max_seq_len: Host bound on the longest sequence.
        retained_table: [num_reqs, PR] int, R block table.
        retained_slots: [>= num_tokens] int, R slot of each token.
        tiles: Query tokens grouped for attention: decodes, then prefill chunks.
        residual_table: [num_reqs, PD] int, D block table.
        exact: [num_reqs, PD] bool, D pages that hold what the table says.
    """

    num_tokens: int
    num_reqs: int
    query_start_loc: torch.Tensor
    context_lens: torch.Tensor
    max_seq_len: int
    retained_table: torch.Tensor
    retained_slots: torch.Tensor
    tiles: list[QueryTiles]
    residual_table: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    exact: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def decodes(self) -> list[QueryTiles]:
        """The rows with one query token."""
        return [tiles for tiles in self.tiles if tiles.query_tile == 1]

    @property
    def prefills(self) -> list[QueryTiles]:
        """The rows of longer chunks."""
        return [tiles for tiles in self.tiles if tiles.query_tile > 1]


class StepBuilder:
    """Builds the steps of one worker and owns the page stamps.

    Args:
        retained_block_size: Tokens per R page.
        residual_block_size: Tokens per D page.
    """

    def __init__(self, retained_block_size: int, residual_block_size: int) -> None:
        self.retained_block_size = retained_block_size
        self.residual_block_size = residual_block_size
        self.owner: torch.Tensor | None = None
        self.step: EchoStep | None = None
        self.is_open = False

    def bind_pool(self, num_blocks: int, device: torch.device) -> None:
        """Makes fresh stamps; vLLM may bind the cache twice (graph memory profiling)."""
        self.owner = torch.full((num_blocks,), -1, dtype=torch.int64, device=device)

    def open(self, common: Any) -> EchoStep:
        """Starts a step from the R group's ``CommonAttentionMetadata``."""
        num_reqs = common.num_reqs
        query_start_loc = common.query_start_loc[: num_reqs + 1]
        seq_lens = common.seq_lens[:num_reqs]
        self.step = EchoStep(
            num_tokens=common.num_actual_tokens,
            num_reqs=num_reqs,
            query_start_loc=query_start_loc,
            context_lens=seq_lens.to(torch.int64) - query_start_loc.diff(),
            max_seq_len=common.max_seq_len,
            retained_table=common.block_table_tensor[:num_reqs],
            retained_slots=common.slot_mapping,
            tiles=split_queries(common.query_start_loc_cpu[: num_reqs + 1], seq_lens),
        )
        self.is_open = True
        return self.step

    def complete(self, common: Any) -> EchoStep:
        """Adds the D group's tables; stamps this step's pages and finds the exact ones."""
        step, owner = self.step, self.owner
        assert step is not None and self.is_open, (
            "echokv: vLLM built the residual group's metadata first"
        )
        self.is_open = False
        assert owner is not None, "echokv: no KV cache is bound"
        sizes = (self.retained_block_size, self.residual_block_size)
        num_tokens = step.num_tokens
        step.residual_table = common.block_table_tensor[: step.num_reqs]
        stamp_owners(
            owner, step.retained_slots[:num_tokens], common.slot_mapping[:num_tokens], *sizes
        )
        step.exact = exact_pages(owner, step.retained_table, step.residual_table, *sizes)
        return step
