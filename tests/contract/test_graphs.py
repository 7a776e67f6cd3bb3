"""Decode graphs per kind of step: what is captured, and which graph a step replays."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from echokv_kernels.step_plan import StepKind
from echokv_vllm import compat, step_kind
from echokv_vllm.worker.gpu import graphs

METHODS = ("_init_candidates", "capture", "run_fullgraph")


def descriptor(num_tokens: int, uniform: int | None = 1, **more: Any) -> BatchExecutionDescriptor:
    return BatchExecutionDescriptor(
        CUDAGraphMode.FULL, num_tokens, num_tokens, uniform_token_count=uniform, **more
    )


class Graph:
    def __init__(self) -> None:
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's class with our patch, until the test is over."""
    for name in METHODS:
        monkeypatch.setattr(CudaGraphManager, name, getattr(CudaGraphManager, name))
    graphs.patch_graph_manager()


def manager(descs: list[Any], selected: bool = True, step_kinds: bool = True) -> Any:
    """A graph manager of a server on our backend, with graphs but without a GPU."""
    made = CudaGraphManager.__new__(CudaGraphManager)
    config = {"checkpoint": "c", "step_kinds": step_kinds}
    backend = SimpleNamespace(backend=None)
    if selected:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        compat.register_backend_name()
        backend.backend = AttentionBackendEnum[compat.BACKEND]
    made.vllm_config = SimpleNamespace(
        attention_config=backend, additional_config={"echokv": config}
    )
    made.compilation_config = SimpleNamespace(cudagraph_capture_sizes=[])
    made.cudagraph_mode = CUDAGraphMode.NONE
    made._capture_descs = {CUDAGraphMode.FULL: list(descs)}
    made._init_candidates()
    made.graphs = {desc: Graph() for desc in made._capture_descs[CUDAGraphMode.FULL]}
    return made


def test_decode_batches_are_captured_per_kind(patched: None) -> None:
    descs = [descriptor(8), descriptor(4), descriptor(8, uniform=None), descriptor(8, uniform=4)]
    found = list(manager(descs).graphs)
    assert [desc for desc in found if not isinstance(desc, graphs.KindDescriptor)] == descs
    kinds = {(desc.num_tokens, getattr(desc, "kind", None)) for desc in found}
    assert kinds == {
        (size, kind) for size in (8, 4) for kind in (None, StepKind.COMPRESSED, StepKind.FULL)
    }


@pytest.mark.parametrize("options", [{"selected": False}, {"step_kinds": False}])
def test_others_capture_what_vllm_captures(patched: None, options: dict[str, bool]) -> None:
    descs = [descriptor(8), descriptor(4)]
    assert list(manager(descs, **options).graphs) == descs


@pytest.mark.parametrize("kind", StepKind)
def test_a_step_replays_the_graph_of_its_kind(patched: None, kind: StepKind) -> None:
    desc = descriptor(8)
    made = manager([desc, descriptor(8, uniform=None)])
    with step_kind.announced(kind):
        made.run_fullgraph(desc)
    replayed = [key for key, graph in made.graphs.items() if graph.num_replays]
    own = desc if kind is StepKind.MIXED else graphs.KindDescriptor.of(desc, kind)
    assert replayed == [own]
    with step_kind.announced(kind):
        made.run_fullgraph(descriptor(8, uniform=None))
    assert made.graphs[descriptor(8, uniform=None)].num_replays == 1


def test_what_is_captured_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, StepKind]] = []

    def capture(self: Any, create_forward_fn: Any) -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            create_forward_fn(desc, warmup=False)

    monkeypatch.setattr(CudaGraphManager, "capture", capture)
    for name in ("_init_candidates", "run_fullgraph"):
        monkeypatch.setattr(CudaGraphManager, name, getattr(CudaGraphManager, name))
    graphs.patch_graph_manager()
    made = manager([descriptor(8)])
    made.capture(lambda desc, warmup: seen.append((desc, step_kind.current())))
    assert [kind for _, kind in seen] == [StepKind.MIXED, StepKind.COMPRESSED, StepKind.FULL]
    assert step_kind.current() is StepKind.MIXED


def test_a_promise_travels_to_other_processes() -> None:
    from vllm.v1.core.sched.output import SchedulerOutput

    output = SchedulerOutput.make_empty()
    step_kind.attach(output, StepKind.COMPRESSED)
    assert step_kind.attached(pickle.loads(pickle.dumps(output))) is StepKind.COMPRESSED


def test_a_step_without_a_promise_is_mixed() -> None:
    output = SimpleNamespace()
    assert step_kind.attached(output) is StepKind.MIXED
    step_kind.attach(output, StepKind.FULL)
    assert step_kind.attached(output) is StepKind.FULL
