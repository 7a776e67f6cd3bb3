"""Plans whose first layers retain no head, so that vLLM would find their D pages before any R page.

Such plans come from a search or a file: presets begin with an anchor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import engine, generate, tokens
from rebuilt_forward import RebuiltForward
from recording import StepRecorder

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.plan import EchoPlan, LayerPlan, Source

SUPPORT = Path(__file__).resolve().parents[1] / "support"
ALL = (0, 1, 2, 3)
PLANS = {
    "one of two": EchoPlan("one-of-two", 4, (LayerPlan((), (Source(1, ALL),)), LayerPlan(ALL))),
    "two of four": EchoPlan(
        "two-of-four",
        4,
        (
            LayerPlan((), (Source(2, (1, 3)),)),
            LayerPlan((), (Source(3, (2, 0)), Source(2, (3,)))),
            LayerPlan((3, 1), (Source(2, (1, 3)),)),
            LayerPlan(ALL),
        ),
    ),
}

pytestmark = pytest.mark.slow


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> EchoPlan:
    return PLANS[request.param]


def test_logits_equal_a_plain_forward_with_the_same_tokens_rebuilt(
    plan: EchoPlan, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompt_of: Callable[..., list[int]],
) -> None:  # fmt: skip
    model = model_of(num_layers=plan.num_layers)
    folder = checkpoint_of(model, plan, recent_tokens=32, bias=True)
    with (
        engine(
            # A small pool: dropped pages stay exact until they are used again.
            model, folder, {"mode": "compressed", "look_ahead": False},
            num_gpu_blocks_override=80, enable_prefix_caching=False, max_model_len=640,
        ) as llm,
        StepRecorder(llm).attached() as recorder,
    ):  # fmt: skip
        for lengths in ((48, 130, 333), (200, 500, 17)):
            generate(llm, [prompt_of(length) for length in lengths], max_tokens=8)
    reference = RebuiltForward(model, EchoCheckpoint.load(folder))
    num_rebuilt = 0
    for step in recorder.steps:
        num_rebuilt += sum(int((~row.exact).sum()) for row in step.rows)
        # As in test_compressed_equals_reference.
        assert float((reference.logits(step) - step.logits).abs().amax()) < 5e-4
    assert num_rebuilt > 1000, "little was rebuilt: the test proves less than it says"


def test_mode_full_equals_stock(
    plan: EchoPlan, model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompt_of: Callable[..., list[int]],
) -> None:  # fmt: skip
    model = model_of(num_layers=plan.num_layers)
    prompts = [prompt_of(length) for length in (17, 130, 333)]
    answers = []
    for checkpoint in (None, checkpoint_of(model, plan)):
        with engine(model, checkpoint, {"mode": "full"}, num_gpu_blocks_override=400) as llm:
            answers.append(tokens(generate(llm, prompts, max_tokens=24)))
    assert answers[0] == answers[1]


def test_gpu_path_gives_the_tokens_of_the_portable_path(
    model_of: Callable[..., Path], checkpoint_of: Callable[..., Path],
    prompt_of: Callable[..., list[int]], tmp_path: Path,
) -> None:  # fmt: skip
    plan = PLANS["two of four"]
    model = model_of(num_layers=plan.num_layers)
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps(
            {
                "model": str(model),
                "checkpoint": str(checkpoint_of(model, plan, recent_tokens=16)),
                "echokv": {},
                "options": {"max_model_len": 256, "max_num_batched_tokens": 96, "max_num_seqs": 4},
                "prompts": [prompt_of(length) for length in (130, 60, 200)],
                "modes": ["compressed", "full", "compressed"],
                "max_tokens": 3,
            }
        )
    )
    answers = []
    for script in ("generate_tokens.py", "interpreted_engine.py"):
        done = subprocess.run(
            [sys.executable, str(SUPPORT / script), str(job)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append(json.loads(Path(f"{job}.out").read_text()))
    assert answers[0] == answers[1]
