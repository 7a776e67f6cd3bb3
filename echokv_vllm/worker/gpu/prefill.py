"""Prompt chunks over compressed context: which keys a workspace holds in which round.

The discarded heads of a compressed request have no pages to run stock attention over. They are
materialised in a workspace of `TILE` token tiles and attended to round by round:

    chunk round     from the last tile boundary before the chunk to its end, causal
    context rounds  what lies before, every query sees all of it

Which requests are compressed is known on the device only, so rounds are laid out for all, unless
the whole step is known to be full; tiles and rows of requests that are not compressed end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

TILE = 128  # tokens per workspace tile


@dataclass(frozen=True)
class Segment:
    """Positions of one request that a round holds, beginning at a tile.

    Attributes:
        request: Index in the batch.
        start: First position.
        stop: Position after the last.
        first_tile: Place in the workspace.
    """

    request: int
    start: int
    stop: int
    first_tile: int

    @property
    def num_tiles(self) -> int:
        """Tiles it takes."""
        return -(-(self.stop - self.start) // TILE)


@dataclass(frozen=True)
class RoundLayout:
    """One round on the host: consecutive requests, one segment each."""

    is_chunk: bool
    segments: tuple[Segment, ...]

    @property
    def num_tiles(self) -> int:
        """Tiles of the workspace it fills."""
        last = self.segments[-1]
        return last.first_tile + last.num_tiles


def lay_out_rounds(requests: Sequence[tuple[int, int, int]], num_tiles: int) -> list[RoundLayout]:
    """Cuts chunks and their contexts into rounds.

    Args:
        requests: (index in the batch, context length, chunk length), in batch order.
        num_tiles: Tiles of the workspace; a whole chunk must fit.
    """
    chunks, contexts = [], []
    for request, context_len, chunk_len in requests:
        boundary = context_len // TILE * TILE
        chunks.append((request, boundary, context_len + chunk_len))
        contexts.append((request, 0, boundary))
    return _pack(chunks, num_tiles, True) + _pack(contexts, num_tiles, False)


def _pack(spans: list[tuple[int, int, int]], num_tiles: int, is_chunk: bool) -> list[RoundLayout]:
    rounds: list[RoundLayout] = []
    segments: list[Segment] = []
    used = 0

    def close() -> None:
        nonlocal segments, used
        if segments:
            rounds.append(RoundLayout(is_chunk, tuple(segments)))
        segments, used = [], 0

    for request, start, stop in spans:
        if start == stop and segments:
            # A round's requests are consecutive; one without context has a row of length 0.
            segments.append(Segment(request, start, stop, used))
        while start < stop:
            room = num_tiles - used
            whole = -(-(stop - start) // TILE) <= room
            if not room or (is_chunk and not whole and used):
                close()
                continue
            end = stop if whole else start + room * TILE
            assert whole or not is_chunk, "echokv: a prompt chunk is longer than its workspace"
            segments.append(Segment(request, start, end, used))
            used += segments[-1].num_tiles
            start = end
            if start < stop:
                close()
    close()
    return rounds


@dataclass(frozen=True, eq=False)
class PrefillRound:
    """One round on the device.

    Attributes:
        is_chunk: Causal, and the first that its tokens take part in.
        first_token: Of the round's requests, counted from the first prefill token.
        num_tokens: Tokens of the round's requests.
        query_start_loc: [requests + 1] int32.
        max_query_len: The longest chunk among them.
        table: [requests, P] int32, workspace tiles.
        lens: [requests] int32, 0 for requests that are not compressed.
        max_len: Bound of ``lens``.
        tile_request: [tiles] int32, index in the batch.
        tile_start: [tiles] int32, first position.
    """

    is_chunk: bool
    first_token: int
    num_tokens: int
    query_start_loc: torch.Tensor
    max_query_len: int
    table: torch.Tensor
    lens: torch.Tensor
    max_len: int
    tile_request: torch.Tensor
    tile_start: torch.Tensor


@dataclass(frozen=True, eq=False)
class PrefillStep:
    """The prompt chunks of one step: the last requests of the batch.

    Attributes:
        first_request: Index in the batch.
        first_token: Index in the batch.
        num_tokens: Tokens of all chunks.
        query_start_loc: [requests + 1] int32, from 0.
        max_query_len: The longest chunk.
        max_seq_len: The longest sequence.
        seq_lens: [requests] int32.
        residual_lens: [requests] int32, 0 for compressed requests.
        token_request: [num_tokens] int32, index in the batch.
        rounds: For the compressed ones; none if there cannot be any.
    """

    first_request: int
    first_token: int
    num_tokens: int
    query_start_loc: torch.Tensor
    max_query_len: int
    max_seq_len: int
    seq_lens: torch.Tensor
    residual_lens: torch.Tensor
    token_request: torch.Tensor
    rounds: list[PrefillRound]


class _Upload:
    """Many small integer arrays, one copy to the device."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._size = 0

    def add(self, array: np.ndarray) -> tuple[int, tuple[int, ...]]:
        """Registers an array; returns what ``take`` needs to find it again."""
        start = self._size
        self._arrays.append(array.astype(np.int32).ravel())
        self._size += array.size
        return start, array.shape

    def send(self, device: torch.device) -> torch.Tensor:
        """All arrays on the device, flat int32."""
        host = torch.from_numpy(np.concatenate(self._arrays))
        if device.type == "cuda":
            host = host.pin_memory()
        return host.to(device, non_blocking=True)


def _take(sent: torch.Tensor, place: tuple[int, tuple[int, ...]]) -> torch.Tensor:
    start, shape = place
    return sent[start : start + int(np.prod(shape))].view(shape)


def build_prefill(
    first_request: int,
    query_start: np.ndarray,
    host_seq_lens: np.ndarray,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    compressed: torch.Tensor,
    num_tiles: int,
    all_full: bool,
) -> PrefillStep:
    """Lays out the prompt chunks of a step.

    Args:
        first_request: First request with more than one query token; all later ones are chunks.
        query_start: [n + 1] on the host, first token of each request.
        host_seq_lens: [n] on the host, bounds of the sequence lengths.
        query_start_loc: [n + 1] int32 on the device.
        seq_lens: [n] int32 on the device.
        compressed: [>= n] int32 on the device.
        num_tiles: Tiles of the workspace.
        all_full: None of the requests is compressed: no rounds.
    """
    n = seq_lens.shape[0]
    chunk_lens = np.diff(query_start)
    requests = [
        (i, max(0, int(host_seq_lens[i] - chunk_lens[i])), int(chunk_lens[i]))
        for i in range(first_request, n)
    ]
    layouts = [] if all_full else lay_out_rounds(requests, num_tiles)
    upload = _Upload()
    token_request = upload.add(np.repeat(np.arange(first_request, n), chunk_lens[first_request:n]))
    places = [_register(upload, layout) for layout in layouts]
    sent = upload.send(seq_lens.device)
    full = 1 - compressed[first_request:n]
    first_token = int(query_start[first_request])
    rounds = []
    for layout, (requests_at, starts_at, stops_at, table_at, bounds_at) in zip(
        layouts, places, strict=True
    ):
        first, last = layout.segments[0].request, layout.segments[-1].request + 1
        ends = torch.minimum(_take(sent, stops_at), seq_lens[first:last])
        lens = (ends - _take(sent, bounds_at)).clamp(min=0) * compressed[first:last]
        rounds.append(
            PrefillRound(
                is_chunk=layout.is_chunk,
                first_token=int(query_start[first]) - first_token,
                num_tokens=int(query_start[last] - query_start[first]),
                query_start_loc=query_start_loc[first : last + 1] - query_start_loc[first],
                max_query_len=int(chunk_lens[first:last].max()),
                table=_take(sent, table_at),
                lens=lens.to(torch.int32),
                max_len=max(segment.stop - segment.start for segment in layout.segments),
                tile_request=_take(sent, requests_at),
                tile_start=_take(sent, starts_at),
            )
        )
    return PrefillStep(
        first_request=first_request,
        first_token=first_token,
        num_tokens=int(query_start[n]) - first_token,
        query_start_loc=query_start_loc[first_request : n + 1] - query_start_loc[first_request],
        max_query_len=int(chunk_lens[first_request:n].max()),
        max_seq_len=int(host_seq_lens[first_request:n].max()),
        seq_lens=seq_lens[first_request:n].contiguous(),
        residual_lens=(seq_lens[first_request:n] * full).to(torch.int32),
        token_request=_take(sent, token_request),
        rounds=rounds,
    )


def _register(upload: _Upload, layout: RoundLayout) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Tile requests, tile starts, segment ends, page table, segment starts."""
    segments = layout.segments
    counts = np.array([segment.num_tiles for segment in segments])
    within = np.concatenate([np.arange(count) for count in counts])
    starts = np.array([segment.start for segment in segments])
    first_tiles = np.array([segment.first_tile for segment in segments])
    # Columns beyond a segment's tiles are never read, but must be tiles.
    table = np.minimum(first_tiles[:, None] + np.arange(counts.max()), layout.num_tiles - 1)
    return (
        upload.add(np.repeat([segment.request for segment in segments], counts)),
        upload.add(np.repeat(starts, counts) + within * TILE),
        upload.add(np.array([segment.stop for segment in segments])),
        upload.add(table),
        upload.add(starts),
    )
