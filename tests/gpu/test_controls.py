"""Controls on a GPU: full mode against stock, compressed mode against the portable path, and
random traffic under the shadow; Model Runner V2 with graphs and asynchronous scheduling, and V1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pressure_traffic
import pytest
from distance import Distance

pytestmark = pytest.mark.gpu

PLANS = ("local-0.5", "local-0.25")
RUNNERS = ("v2", "v1")
Run = Callable[[str], dict[str, Any]]


def jobs() -> dict[str, dict[str, Any]]:
    """Everything the tests look at, by name."""
    compressed, full = {"mode": "compressed"}, {"mode": "full"}
    named: dict[str, dict[str, Any]] = {
        "stock": {"plan": None},
        "triton": {"plan": None, "backend": "TRITON_ATTN"},
    }
    for plan in PLANS:
        named[f"compressed-{plan}"] = {"plan": plan, "echokv": compressed}
        named[f"portable-{plan}"] = {"plan": plan, "echokv": compressed, "portable": True}
        for runner in RUNNERS:
            chosen = {"plan": plan, "runner": runner}
            named[f"full-{plan}-{runner}"] = {**chosen, "echokv": full}
            named[f"traffic-{plan}-{runner}"] = {**chosen, **pressure_traffic.TRAFFIC}
    return named


def noise_of(run: Run) -> Distance:
    return Distance.of(run("stock"), run("triton"))


@pytest.mark.engines("stock", "triton", "full-{plan}-{runner}")
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("plan", PLANS)
def test_full_mode_is_stock(run: Run, runner: str, plan: str) -> None:
    full = run(f"full-{plan}-{runner}")
    print(full["engine"])
    (rank,) = full["engine"]["ranks"]
    if runner == "v2":
        assert "FULL" in full["engine"]["graphs"] and full["engine"]["async"]
        assert rank["runner"].startswith("vllm.v1.worker.gpu.")
    assert rank["paired"] == (plan == "local-0.5")
    Distance.of(run("stock"), full).check(noise_of(run))


@pytest.mark.engines("stock", "triton", "portable-{plan}", "compressed-{plan}")
@pytest.mark.parametrize("plan", PLANS)
def test_compressed_mode_is_the_portable_path(run: Run, plan: str) -> None:
    compressed = run(f"compressed-{plan}")
    assert compressed["tokens"] != run("stock")["tokens"]
    Distance.of(run(f"portable-{plan}"), compressed).check(noise_of(run))


@pytest.mark.engines(
    "stock", "full-{plan}-v2", "full-{plan}-v1", "compressed-{plan}", "traffic-{plan}-v2",
    "traffic-{plan}-v1",
)  # fmt: skip
@pytest.mark.parametrize("plan", PLANS)
def test_no_request_waits_for_a_compiler(run: Run, plan: str) -> None:
    names = [f"{job}-{plan}-{runner}" for job in ("full", "traffic") for runner in RUNNERS]
    names.append(f"compressed-{plan}")
    for name in names:
        assert set(run(name)["compiled"]) <= set(run("stock")["compiled"]), name


@pytest.mark.engines("traffic-{plan}-{runner}")
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("plan", PLANS)
def test_traffic_under_pressure_reads_no_foreign_page(run: Run, runner: str, plan: str) -> None:
    pressure_traffic.check(run(f"traffic-{plan}-{runner}"))
