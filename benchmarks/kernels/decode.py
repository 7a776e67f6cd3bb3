"""Echoed decode against stock decode of the same tokens, one layer, in one run.

    python benchmarks/kernels/decode.py OUT_FOLDER

Writes results.json and table.md there; plot.py draws results.json. Needs an NVIDIA GPU, and vLLM
for the stock kernel. All requests are compressed but for their sinks and recent tokens. Kernels are
compiled in parallel processes first; every time is a graph replay over layers that take turns, so
that no call finds its tokens in the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cases import EchoCase, EchoedDecode, StockDecode
from timing import Timing, copy_bandwidth, time_graph

from echokv_kernels.gpu import decode
from echokv_kernels.gpu.launch import DECODE

NUM_LAYERS = 10  # of the pool; a multiple of every preset's group
NUM_CACHES = 3
SHAPES = [(32, 8192), (8, 32768), (2, 131072)]  # requests, tokens of each
PLANS = [
    ("local-0.5", 256),
    ("local-0.5", 64),
    ("local-0.5", 0),
    ("local-0.375", 64),
    ("local-0.25", 256),
    ("local-0.25", 64),
    ("local-0.5+4", 256),  # eight source heads, as many as a full cache reads
    ("local-0.25+6", 256),
    ("paper-0.5", 256),
    ("paper-0.5", 64),
    ("paper-0.3", 256),
    ("paper-0.3", 64),
]
CONTEXTS = [1024, 2048, 4096, 8192, 16384, 32768]  # of the plot, 8 requests each
PLOTTED = [("local-0.5", 256), ("local-0.25", 64)]
KERNELS = {
    "absorb": ("absorb_kernel",),
    "decode": ("fused_decode_kernel", "absorbed_decode_kernel"),  # one of them, by the plan
    "reduce": ("reduce_kernel",),
    "combine": ("combine_kernel",),
}


class NoLaunch:
    """Stands for a kernel that is left out of a measurement."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def only(part: str) -> Iterator[None]:
    """Launches one of the parts; what the others would write is still there from before."""
    real = {kernel: getattr(decode, kernel) for names in KERNELS.values() for kernel in names}
    try:
        for kernel in real:
            if kernel not in KERNELS[part]:
                setattr(decode, kernel, NoLaunch())
        yield
    finally:
        for kernel, value in real.items():
            setattr(decode, kernel, value)


def all_cases(contexts: bool) -> list[EchoCase]:
    cases = [EchoCase(*plan, *shape) for shape in SHAPES for plan in PLANS]
    more = [EchoCase(*plan, 8, length) for plan in PLOTTED for length in CONTEXTS if contexts]
    return cases + [case for case in more if case not in cases]


def compile_case(case: EchoCase) -> None:
    """Kernels depend on the plan and the number of requests, not on the context."""
    echo = EchoedDecode(case, 1, DECODE, NUM_LAYERS)
    echo.run(echo.heads[0])
    echo.run_whole(echo.heads[0])
    torch.cuda.synchronize()


def times(timing: Timing) -> dict[str, float]:
    return {"median": timing.median, "p20": timing.p20, "p80": timing.p80}


def measure_stock(num_reqs: int, context_len: int, bandwidth: float) -> dict[str, Any]:
    stock = StockDecode(num_reqs, context_len, NUM_CACHES)
    total = time_graph(stock.calls())
    return {
        "num_reqs": num_reqs,
        "context_len": context_len,
        "bytes": stock.num_bytes,
        "us": times(total),
        "share_of_copy": stock.num_bytes / total.median * 1e6 / bandwidth,
    }


def measure_case(case: EchoCase, stock: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    echo = EchoedDecode(case, NUM_CACHES, DECODE, NUM_LAYERS)
    total = time_graph(echo.calls())
    whole = time_graph(echo.whole_calls())
    parts = {}
    for part in KERNELS:
        with only(part):
            parts[part] = times(time_graph(echo.calls(), 15))
    echo.plan_shares(torch.zeros_like(echo.batch.seq_lens))
    idle = time_graph(echo.calls() * 4, 15)
    limit = echo.num_bytes / bandwidth * 1e6
    return {
        "preset": case.preset,
        "rotation_block": case.rotation_block,
        "num_reqs": case.num_reqs,
        "context_len": case.context_len,
        "bytes": echo.num_bytes,
        "us": times(total),
        "us_with_exact_pages": times(whole),
        "us_by_kernel": parts,
        "us_idle": times(idle),
        "us_limit": limit,
        "decode_share_of_copy": limit / parts["decode"]["median"],
        "of_stock": total.median / stock["us"]["median"],
        "of_stock_with_exact_pages": whole.median / stock["us"]["median"],
        "of_stock_limit": limit / stock["us"]["median"],
    }


def table(results: dict[str, Any]) -> str:
    """Markdown; times are medians in microseconds."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [
        f"{machine}; commit {results['commit']}.",
        f"Device-to-device copy: {results['copy_bandwidth'] / 1e12:.2f} TB/s. One layer of "
        "Llama-3.1-8B's shape (8 KV heads of 128, 32 query heads), bf16, scattered pages. "
        "Times in us per layer, medians of graph replays; limit: the plan's features at the "
        "copy's rate.",
        "",
        "| plan | rotation block | requests x tokens | stock | echoed | limit | of stock "
        "| with exact pages | absorb | decode (of copy rate) | reduce | combine | idle |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        stock = find_stock(results, case["num_reqs"], case["context_len"])
        parts = {name: value["median"] for name, value in case["us_by_kernel"].items()}
        lines.append(
            f"| {case['preset']} | {case['rotation_block']} "
            f"| {case['num_reqs']} x {case['context_len']:,} | {stock['us']['median']:.1f} "
            f"| {case['us']['median']:.1f} | {case['us_limit']:.1f} "
            f"| {case['of_stock']:.3f} | {case['of_stock_with_exact_pages']:.3f} "
            f"| {parts['absorb']:.1f} | {parts['decode']:.1f} "
            f"({case['decode_share_of_copy']:.0%}) | {parts['reduce']:.1f} "
            f"| {parts['combine']:.1f} | {case['us_idle']['median']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def find_stock(results: dict[str, Any], num_reqs: int, context_len: int) -> dict[str, Any]:
    return next(
        stock
        for stock in results["stock"]
        if (stock["num_reqs"], stock["context_len"]) == (num_reqs, context_len)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where results.json and table.md go")
    parser.add_argument("--no-contexts", action="store_true", help="leave the plot's sweep out")
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    cases = all_cases(not options.no_contexts)
    short = {EchoCase(case.preset, case.rotation_block, case.num_reqs, 512) for case in cases}
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1)) as pool:
        pool.map(compile_case, sorted(short, key=str), chunksize=1)
    print(f"compiled {len(short)} cases in {time.time() - begin:.0f} s", flush=True)
    results: dict[str, Any] = {
        "commit": os.environ.get("ECHOKV_COMMIT", "unknown"),
        "machine": {
            "GPU": torch.cuda.get_device_name(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "triton", "vllm")},
        },
        "tiles": str(DECODE),
        "copy_bandwidth": copy_bandwidth(),
        "stock": [],
        "cases": [],
    }
    bandwidth = results["copy_bandwidth"]
    for num_reqs, length in dict.fromkeys((case.num_reqs, case.context_len) for case in cases):
        stock = measure_stock(num_reqs, length, bandwidth)
        results["stock"].append(stock)
        for case in cases:
            if (case.num_reqs, case.context_len) == (num_reqs, length):
                results["cases"].append(measure_case(case, stock, bandwidth))
                torch.cuda.empty_cache()
        (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = table(results)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
