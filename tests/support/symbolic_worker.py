"""A worker that computes nothing but knows, for every token, whether it would be exact.

It follows ``echokv_kernels.store``: instead of keys and values a page holds the name of the token
prefix that was written and whether that token was computed exactly. A page that is read for the
wrong token, or a pinned request that sees one inexact token, raises at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.v1.request import Request

if TYPE_CHECKING:
    from paged_world import World


@dataclass
class Page:
    """What one page holds: its group, and per offset the prefix's name and exactness."""

    group: str = ""
    names: dict[int, int] = field(default_factory=dict)
    exact: dict[int, bool] = field(default_factory=dict)


@dataclass
class Step:
    """Work of one scheduling pass: (request, first token, number of tokens, R row, D row)."""

    parts: list[tuple[Request, int, int, list[int], list[int]]] = field(default_factory=list)


class SymbolicWorker:
    """Executes steps on symbolic pages; see the module docstring.

    Attributes:
        num_accepted: Residual tokens read from exact pages.
        num_stale: Table entries rejected by their stamp.
    """

    def __init__(self, world: World, num_blocks: int) -> None:
        self.world = world
        self.pages = [Page() for _ in range(num_blocks)]
        self.owner = [-1] * num_blocks
        self.num_accepted = 0
        self.num_stale = 0

    def run(self, step: Step) -> None:
        """One forward pass: stamps, then writes, then reads in scheduling order."""
        for part in step.parts:
            self._stamp(*part[1:])
        for part in step.parts:
            self._write(*part)
        for request, start, count, r_row, d_row in step.parts:
            exact = self._read(request, start, r_row, d_row)
            for group, size, row in self._groups(r_row, d_row):
                for token in range(start, start + count):
                    page = row[token // size]
                    if group == "r" or page:
                        self.pages[page].exact[token % size] = exact
            if not exact:
                assert not self.world.is_pinned(request), (
                    f"{request.request_id}: token {start} of a pinned request is inexact"
                )

    def _groups(self, r_row: list[int], d_row: list[int]) -> list[tuple[str, int, list[int]]]:
        return [("r", self.world.r_size, r_row), ("d", self.world.d_size, d_row)]

    def _stamp(self, start: int, count: int, r_row: list[int], d_row: list[int]) -> None:
        r_size, d_size = self.world.r_size, self.world.d_size
        for token in range(start, start + count):
            self.owner[r_row[token // r_size]] = -1
        for token in range(start, start + count):
            page = d_row[token // d_size]
            if page and token % d_size == 0:
                self.owner[page] = r_row[token // r_size] * r_size + token % r_size

    def _tag(self, token: int, r_row: list[int]) -> int:
        """The stamp that the D page of a token must carry."""
        first = token // self.world.d_size * self.world.d_size
        return r_row[first // self.world.r_size] * self.world.r_size + first % self.world.r_size

    def _write(
        self, request: Request, start: int, count: int, r_row: list[int], d_row: list[int]
    ) -> None:
        for group, size, row in self._groups(r_row, d_row):
            for token in range(start, start + count):
                page_id = row[token // size]
                assert group == "d" or page_id, f"{request.request_id}: no R page for {token}"
                if not page_id:
                    continue
                if group == "d":
                    stamp = self._tag(token, r_row)
                    assert self.owner[page_id] == stamp, f"{request.request_id}: stale D write"
                page = self.pages[page_id]
                if page.group != group or token % size == 0:
                    self.pages[page_id] = page = Page(group)
                page.names[token % size] = self.world.name(request, token)

    def _read(self, request: Request, start: int, r_row: list[int], d_row: list[int]) -> bool:
        """Reads the context of one request; whether it was complete and exact."""
        names, r_size, d_size = self.world.names[request.request_id], *self.world.sizes
        exact = True
        for token in range(start):
            page = self.pages[r_row[token // r_size]]
            offset = token % r_size
            assert page.group == "r" and page.names.get(offset) == names[token], (
                f"{request.request_id}: R page of token {token} holds something else"
            )
            exact &= page.exact[offset]
            page_id = d_row[token // d_size]
            if not page_id or self.owner[page_id] != self._tag(token, r_row):
                self.num_stale += bool(page_id) and token % d_size == 0
                exact = False
                continue
            page, offset = self.pages[page_id], token % d_size
            assert page.group == "d" and page.names.get(offset) == names[token], (
                f"{request.request_id}: foreign D page accepted for token {token}"
            )
            self.num_accepted += 1
            exact &= page.exact[offset]
        return exact
