"""Two or four GPUs: tensor-parallel ranks serve shards of the plan, pipeline ranks layers of it.

Ranks are processes with block pools of their own; one scheduler decides for all of them which pages
are dropped, and each finds by its own stamps what it may read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pressure_traffic
import pytest
import torch
from distance import Distance

pytestmark = pytest.mark.gpu

# Of two KV heads of a rank of four, one is retained; a rank of two has two such pairs.
MODEL = {"num_kv_heads": 8}
PLAN = "local-0.5/4"
PARALLEL = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "tensor-4": {"tensor_parallel_size": 4},
    "tensor-pipeline": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}


def num_ranks(kind: str) -> int:
    return math.prod(PARALLEL[kind].values())


KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            torch.cuda.device_count() < num_ranks(kind), reason=f"needs {num_ranks(kind)} GPUs"
        ),
    )
    for kind in PARALLEL
]
Run = Callable[[str], dict[str, Any]]


def jobs() -> dict[str, dict[str, Any]]:
    """Everything the tests look at, by name."""
    compressed = {"plan": PLAN, "echokv": {"mode": "compressed"}}
    named: dict[str, dict[str, Any]] = {
        "stock": {"plan": None},
        "triton": {"plan": None, "backend": "TRITON_ATTN"},
        "compressed": compressed,
    }
    for kind, options in PARALLEL.items():
        options = {"options": {**options, "distributed_executor_backend": "mp"}}
        traffic = pressure_traffic.TRAFFIC
        named[f"stock-{kind}"] = {"plan": None, **options}
        named[f"full-{kind}"] = {"plan": PLAN, "echokv": {"mode": "full"}, **options}
        named[f"compressed-{kind}"] = compressed | options
        named[f"traffic-{kind}"] = {
            "plan": PLAN, **traffic, "options": traffic["options"] | options["options"],
        }  # fmt: skip
    return named


@pytest.mark.engines("stock", "triton", "stock-{kind}", "full-{kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_full_mode_is_stock(run: Run, kind: str) -> None:
    full = run(f"full-{kind}")
    print(full["engine"])
    assert "FULL" in full["engine"]["graphs"]
    assert len(full["engine"]["ranks"]) == num_ranks(kind)
    noise = Distance.of(run("stock"), run("triton"))
    Distance.of(run(f"stock-{kind}"), full).check(noise)


@pytest.mark.engines("stock", "stock-{kind}", "compressed", "compressed-{kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_mode_is_that_of_one_rank(run: Run, kind: str) -> None:
    compressed = run(f"compressed-{kind}")
    assert compressed["tokens"] != run("stock")["tokens"]
    # Ranks add up their parts of a projection in another order, stock ones too.
    noise = Distance.of(run("stock"), run(f"stock-{kind}"))
    Distance.of(run("compressed"), compressed).check(noise)


@pytest.mark.engines("traffic-{kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_traffic_under_pressure_reads_no_foreign_page(run: Run, kind: str) -> None:
    answer = run(f"traffic-{kind}")
    assert len(answer["ranks"]) == num_ranks(kind)
    pressure_traffic.check(answer)
