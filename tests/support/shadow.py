"""A second copy of every residual, compared with each residual page the GPU path would read.

It works beside captured graphs: it looks at memory between steps only. What a step wrote to D
pages is copied when the next step is built, filed under the tokens' R slots; then every page
that the new step accepts as exact must hold what is filed for its tokens.
"""

from __future__ import annotations

from typing import Any

import torch


class StepShadow:
    """Wraps ``complete`` of a worker's GPU step builder.

    Attributes:
        num_accepted: Context tokens whose page was accepted, over all layers and steps.
        num_stale: Block table entries that were rejected by their stamp.
        num_foreign: Accepted tokens whose page held something else.
        num_steps: Steps seen.
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.steps = worker.steps
        self.num_accepted = self.num_stale = self.num_foreign = self.num_steps = 0
        self._copies: dict[str, torch.Tensor] = {}
        self._pool: tuple[int, int] | None = None
        self._written: tuple[torch.Tensor, torch.Tensor] | None = None
        self._complete = self.steps.complete
        self.steps.complete = self.complete

    def _caches(self) -> dict[str, torch.Tensor]:
        impls = [self.worker.context[name].impl for name in self.worker.layer_names]
        return {
            impl.layer_name: impl.residual_layer.kv_cache
            for impl in impls
            if impl.rank_layer.discarded
        }

    def complete(self, common: Any) -> Any:
        """The builder's method, with the comparison behind it."""
        caches = self._caches()
        lead = next(iter(caches.values()))
        pool = (lead.data_ptr(), lead.shape[0])
        if pool != self._pool:
            self._pool, self._written = pool, None
            num_slots = lead.shape[0] * self.steps.retained_block_size
            self._copies = {
                name: cache.new_full((num_slots, cache.shape[1], cache.shape[3]), float("nan"))
                for name, cache in caches.items()
            }
        self._file(caches)
        step = self._complete(common)
        tokens = slice(0, step.num_tokens)
        self._written = (
            step.retained_slots[tokens].long().clone(),
            common.slot_mapping[tokens].long().clone(),
        )
        self._compare(caches, step)
        self.num_steps += 1
        return step

    def _file(self, caches: dict[str, torch.Tensor]) -> None:
        if self._written is None:
            return
        retained, residual = self._written
        size = self.steps.residual_block_size
        real = (retained >= 0) & (residual >= size)
        absent = (retained >= 0) & (residual < size)
        for name, cache in caches.items():
            slots = residual[real]
            self._copies[name][retained[real]] = cache[slots // size, :, slots % size]
            self._copies[name][retained[absent]] = float("nan")

    def _compare(self, caches: dict[str, torch.Tensor], step: Any) -> None:
        r_size, d_size = self.steps.retained_block_size, self.steps.residual_block_size
        n, table = step.num_reqs, step.residual_table
        first = torch.arange(table.shape[1], device=table.device) * d_size
        known = (first < step.context_lens[:, None]) & (table != 0)
        exact = torch.zeros_like(known)
        width = min(table.shape[1], self.steps.plan.exact.shape[1])
        exact[:, :width] = self.steps.plan.exact[:n, :width] != 0
        self.num_stale += int((known & ~exact).sum())
        row, column = (known & exact).nonzero(as_tuple=True)
        token = (column * d_size)[:, None] + torch.arange(d_size, device=table.device)
        inside = token < step.context_lens[row][:, None]
        page = table[row, column].long()[:, None].expand_as(token)[inside]
        r_column = (token // r_size).clamp(max=step.retained_table.shape[1] - 1)
        r_page = step.retained_table[row[:, None], r_column].long()
        slot = (r_page * r_size + token % r_size)[inside]
        # A request may share pages that another one writes in this very step (prefix caching);
        # every layer writes before it reads, but nothing is written yet.
        assert self._written is not None
        settled = ~torch.isin(slot, self._written[0])
        page, slot, offset = page[settled], slot[settled], (token % d_size)[inside][settled]
        for name, cache in caches.items():
            same = (cache[page, :, offset] == self._copies[name][slot]).flatten(1).all(1)
            self.num_foreign += int((~same).sum())
            self.num_accepted += len(page)
