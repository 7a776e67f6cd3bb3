"""Decode with un-rotated keys (rotation block 1) against stock decode and what cuBLAS could do.

    python benchmarks/kernels/unrotated.py OUT.json

Rebuilding the keys is a matrix product of the cached features with the key maps; the bound is
that product at cuBLAS's rate plus one read of the values at the copy's rate.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from cases import GROUP, HEAD_DIM, EchoCase, EchoedDecode, StockDecode, randn
from timing import copy_bandwidth, time_graph

from echokv_kernels.gpu.launch import DECODE

NUM_LAYERS, NUM_CACHES = 10, 2  # a multiple of every preset's group
CASES = [
    ("paper-0.5", 32, 8192),
    ("paper-0.5", 8, 32768),
    ("paper-0.5", 2, 131072),
    ("paper-0.3", 32, 8192),
    ("local-0.5", 32, 8192),
    ("local-0.375", 32, 8192),
    ("local-0.25", 32, 8192),
]
GEMM_TOKENS = 65536


def measure(preset: str, num_reqs: int, context_len: int, bandwidth: float) -> dict[str, Any]:
    """One plan and shape; microseconds per layer."""
    stock = time_graph(StockDecode(num_reqs, context_len, NUM_CACHES).calls()).median
    echo = EchoedDecode(EchoCase(preset, 1, num_reqs, context_len), NUM_CACHES, DECODE, NUM_LAYERS)
    total = time_graph(echo.calls(), 11).median
    maps = echo.heads[0].maps
    tokens = num_reqs * context_len
    features, weights = randn(GEMM_TOKENS, maps.width), randn(maps.width, maps.num_heads * HEAD_DIM)
    out = torch.empty(GEMM_TOKENS, weights.shape[1], dtype=features.dtype, device="cuda")
    product = time_graph([lambda: torch.mm(features, weights, out=out)]).median
    product *= tokens / GEMM_TOKENS
    flop = 2 * tokens * maps.width * maps.num_heads * HEAD_DIM
    bound = product + tokens * maps.width * 2 / bandwidth * 1e6
    return {
        "preset": preset,
        "num_reqs": num_reqs,
        "context_len": context_len,
        "stock_us": stock,
        "echoed_us": total,
        "of_stock": total / stock,
        "cublas_us": product,
        "cublas_tflops": flop / product / 1e6,
        "bound_us": bound,
        "of_bound": total / bound,
        "query_heads": maps.num_heads * GROUP,
    }


def main() -> None:
    bandwidth = copy_bandwidth()
    rows = []
    for preset, num_reqs, context_len in CASES:
        rows.append(measure(preset, num_reqs, context_len, bandwidth))
        row = rows[-1]
        print(
            f"{preset} un-rotated {num_reqs} x {context_len:,}: {row['echoed_us']:.0f} us, "
            f"{row['of_stock']:.2f}x stock ({row['stock_us']:.0f}), {row['of_bound']:.2f}x of the "
            f"bound {row['bound_us']:.0f} (cuBLAS {row['cublas_tflops']:.0f} TFLOP/s)",
            flush=True,
        )
        torch.cuda.empty_cache()
    answer = {
        "GPU": torch.cuda.get_device_name(),
        "commit": os.environ.get("ECHOKV_COMMIT", "unknown"),
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(answer, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
