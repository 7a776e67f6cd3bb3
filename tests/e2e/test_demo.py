"""The whole path: committed tiny model and checkpoint, real servers, OpenAI requests.

Runs the demo's scenario, so what the demo shows is what is asserted here.
"""

from pathlib import Path

import pytest

from echokv_vllm.demo.scenario import DemoOptions, DemoResult, run_demo
from echokv_vllm.demo.table import render

pytestmark = pytest.mark.slow

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_model"
NUM_PROMPTS = 34  # three points are one answer


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    options = DemoOptions(
        str(MODEL),
        str(MODEL / "echokv-local-0.5"),
        tmp_path_factory.mktemp("logs"),
        num_prompts=NUM_PROMPTS,
        burst=18,
        burst_tokens=64,
    )
    return run_demo(options, print)


def test_full_mode_answers_needle_questions(result: DemoResult) -> None:
    full, _ = result.modes
    assert full.num_correct >= 0.95 * NUM_PROMPTS, render(result)


def test_compressed_answers_are_within_three_points_of_full(result: DemoResult) -> None:
    full, compressed = result.modes
    assert compressed.num_correct >= full.num_correct - 0.03 * NUM_PROMPTS, render(result)
    assert compressed.kv_bytes_per_token == full.kv_bytes_per_token / 2


def test_a_burst_that_makes_stock_vllm_preempt_is_served_without_preemption(
    result: DemoResult,
) -> None:
    echokv, stock = result.bursts
    assert stock.num_preemptions > 0, render(result)
    assert echokv.num_preemptions == 0, render(result)
    assert echokv.num_pages_dropped > 0, render(result)
    assert echokv.num_completed == stock.num_completed == 18, render(result)
    assert echokv.peak_running > stock.peak_running, render(result)
