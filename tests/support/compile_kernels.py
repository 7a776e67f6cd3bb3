"""Compiles the decode kernels for an NVIDIA GPU without one, and prints what they need.

    python tests/support/compile_kernels.py CASES.json

CASES.json is a list of {preset, rotation_block, num_kv_heads, group, head_dim}. Prints one JSON
object: bytes of shared memory by case and kernel. The interpreter that other tests use here finds
wrong results, but neither a kernel that does not compile nor one that does not fit the hardware.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

CAPABILITY = 90  # Hopper
NUM_LAYERS = 10  # a multiple of every preset's group
CONTEXT_LEN = 512


class NoDriver:
    """What compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_instead_of_launching(
    needs: dict[str, int], variants: dict[str, set[str]] | None = None
) -> None:
    """From now on `kernel[grid](...)` compiles, notes the kernel's shared memory and its hash."""

    def get_item(kernel: Any, grid: Any) -> Any:
        def compile_kernel(*args: Any, **kwargs: Any) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            needs[kernel.__name__] = max(needs.get(kernel.__name__, 0), compiled.metadata.shared)
            if variants is not None:
                variants.setdefault(kernel.__name__, set()).add(compiled.hash)

        return compile_kernel

    jit.JITFunction.__getitem__ = get_item


def launch(case: dict[str, Any]) -> None:
    """One step of echoed decode over an empty cache of the case's shape."""
    from echokv_kernels.gpu.decode import (
        DecodeBatch,
        attend_context,
        attend_exact,
        combine,
        reduce_context,
    )
    from echokv_kernels.gpu.heads import EchoedHeads
    from echokv_kernels.gpu.launch import DECODE
    from echokv_kernels.gpu.rotation import RotationTable
    from echokv_kernels.gpu.scratch import DecodeScratch, DecodeShape
    from echokv_kernels.layout import PlanLayout
    from echokv_kernels.reconstruct import EchoMaps, FeatureSource
    from echokv_kernels.rotary import Rotary
    from echokv_kernels.step_plan import StepPlan
    from echokv_vllm.presets import preset_plan

    heads, group, head_dim = (case[name] for name in ("num_kv_heads", "group", "head_dim"))
    plan = preset_plan(case["preset"], NUM_LAYERS, heads)
    counts = tuple(len(layer.retained) for layer in plan.layers)
    sizes = PlanLayout(counts, heads, head_dim, 2).block_sizes()
    layer = next(n for n in range(NUM_LAYERS) if plan.discarded(n))
    page = sizes.retained * 2 * head_dim
    pool = torch.zeros(2 * sum(counts) * page, dtype=torch.bfloat16)
    views, start = [], 0
    for count in counts:
        shape = (2, count, sizes.retained, 2 * head_dim)
        views.append(pool.as_strided(shape, (sum(counts) * page, page, 2 * head_dim, 1), start))
        start += count * page
    layers = plan.layers
    places = [[layers[s.layer].retained.index(h) for h in s.heads] for s in layers[layer].sources]
    source = FeatureSource(
        [views[s.layer] for s in layers[layer].sources], [torch.tensor(place) for place in places]
    )
    flat = [(s.layer, head) for s in layers[layer].sources for head in s.heads]
    own = [(head, place) for place, (from_layer, head) in enumerate(flat) if from_layer == layer]
    discarded = plan.discarded(layer)
    maps = EchoMaps(
        *(torch.zeros(len(discarded), source.width, head_dim, dtype=torch.bfloat16) for _ in "kv")
    )
    echoed = EchoedHeads.of(
        source, maps, [(head, place) for place, head in enumerate(discarded)], own, group
    )
    shape = DecodeShape.of(case["rotation_block"], DECODE, [echoed])
    scratch = DecodeScratch.allocate([echoed], shape, 1, 2, CONTEXT_LEN)
    zeros = torch.zeros(1, dtype=torch.int32)
    batch = DecodeBatch(
        num_reqs=1,
        plan=StepPlan.allocate(
            1, CONTEXT_LEN, sizes.retained, sizes.residual, True, torch.device("cpu")
        ),
        retained_table=torch.zeros(1, CONTEXT_LEN // 16, dtype=torch.int32),
        query_start_loc=torch.zeros(2, dtype=torch.int32),
        seq_lens=zeros,
        exact_lens=zeros,
    )
    query = torch.zeros(1, heads * group, head_dim, dtype=torch.bfloat16)
    key = torch.zeros(1, heads, head_dim, dtype=torch.bfloat16)
    inverse = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    rotation = RotationTable.build(Rotary(inverse.float(), head_dim), CONTEXT_LEN)
    rows = torch.zeros(len(discarded) * group, dtype=torch.int32)
    residual = torch.zeros(
        2, len(discarded), sizes.residual, 2 * head_dim, dtype=torch.bfloat16
    )  # fmt: skip
    attend_context(query, echoed, batch, scratch, shape, DECODE, rotation, head_dim**-0.5)
    exact_out, exact_lse = attend_exact(query, rows, residual, batch, head_dim**-0.5)
    reduce_context(echoed, batch, scratch)
    combine(
        torch.zeros_like(query), query, key, key, exact_out, exact_lse, echoed,
        batch, scratch, head_dim**-0.5,
    )  # fmt: skip


def overlap_launches() -> None:
    """Kernels as a Hopper GPU would be given them."""
    from echokv_kernels.gpu import decode

    decode.overlap = lambda device: {"PDL": True, "launch_pdl": True}


def main() -> None:
    driver.set_active(NoDriver())
    overlap_launches()
    answer = {}
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        needs: dict[str, int] = {}
        compile_instead_of_launching(needs)
        launch(case)
        answer[json.dumps(case, sort_keys=True)] = needs
    print(json.dumps({"triton": triton.__version__, "cases": answer}))


if __name__ == "__main__":
    main()
