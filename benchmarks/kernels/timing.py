"""Timing on a GPU: graph replays with events, and the bandwidth everything is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds per call.

    Attributes:
        median, p20, p80: over graph replays.
    """

    median: float
    p20: float
    p80: float


def time_graph(calls: Sequence[Callable[[], None]], repeats: int = 25) -> Timing:
    """Microseconds per call of `calls`, captured one after the other and replayed.

    Pass the same work over different data (layers), so that no call finds its bytes in the cache.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    quantile = torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    return Timing(*quantile)


def copy_bandwidth(num_bytes: int = 1 << 32) -> float:
    """Bytes per second of a device-to-device copy, bytes read and written both counted."""
    source = torch.randn(num_bytes // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return 2 * num_bytes / torch.tensor(times).median().item()
