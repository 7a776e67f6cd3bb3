"""Decode graphs of their own for steps that are wholly full or wholly compressed.

vLLM captures one graph per batch size. A graph that serves every step holds the kernels of full and
of compressed requests, and those with nothing to do still cost their launch, in every layer. So
each decode size is captured once more per kind of step, under a descriptor that vLLM's dispatch
never returns, and replayed where the scheduler announced that kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from echokv_kernels.step_plan import StepKind
from echokv_vllm import compat, step_kind
from echokv_vllm.config import EchoConfig


@dataclass(frozen=True)
class KindDescriptor(BatchExecutionDescriptor):
    """A decode batch all of whose requests are of one kind.

    Attributes:
        kind: Not MIXED, which vLLM's own descriptor stands for.
    """

    kind: StepKind = StepKind.MIXED

    @classmethod
    @functools.cache  # asked in every step
    def of(cls, desc: Any, kind: StepKind) -> KindDescriptor:
        """The same batch, of a kind."""
        values = {f.name: getattr(desc, f.name) for f in fields(BatchExecutionDescriptor)}
        return cls(**values, kind=kind)


def add_kinds(descs: list[Any]) -> list[Any]:
    """Descriptors to capture, with those of every kind behind each decode batch.

    Args:
        descs: vLLM's, of full graphs, largest first.
    """
    found = []
    for desc in descs:
        found.append(desc)
        if desc.uniform_token_count == 1 and desc.num_ubatches == 1:
            # vLLM takes the second graph's memory for that of all later ones: the larger kind.
            kinds = (StepKind.COMPRESSED, StepKind.FULL)
            found += [KindDescriptor.of(desc, kind) for kind in kinds]
    return found


def patch_graph_manager() -> None:
    """Symptom: kernels without work cost 1 to 3 % of a step. Cause: vLLM's graphs differ by batch
    size only, and what a step needs is not asked of the backend. Remove when backends can add to
    the graphs' keys."""
    if compat.is_patched(CudaGraphManager, "run_fullgraph"):
        return
    init, capture, run = (
        CudaGraphManager._init_candidates,
        CudaGraphManager.capture,
        CudaGraphManager.run_fullgraph,
    )

    @functools.wraps(init)
    def _init_candidates(self: Any) -> None:
        init(self)
        wanted = compat.is_selected(self.vllm_config) and (
            EchoConfig.parse(self.vllm_config.additional_config).step_kinds
        )
        if wanted and CUDAGraphMode.FULL in self._capture_descs:
            descs = self._capture_descs[CUDAGraphMode.FULL]
            self._capture_descs[CUDAGraphMode.FULL] = add_kinds(descs)

    @functools.wraps(capture)
    def capture_kinds(self: Any, create_forward_fn: Callable[..., Any], *a: Any, **k: Any) -> Any:
        def create(desc: Any, *args: Any, **kwargs: Any) -> Any:
            # Attention looks at the metadata, which is built here; running it later needs no more.
            with step_kind.announced(getattr(desc, "kind", StepKind.MIXED)):
                return create_forward_fn(desc, *args, **kwargs)

        return capture(self, create, *a, **k)

    @functools.wraps(run)
    def run_fullgraph(self: Any, desc: Any) -> Any:
        own = KindDescriptor.of(desc, step_kind.current())
        return run(self, own if own in self.graphs else desc)

    run_fullgraph._echokv = True  # type: ignore[attr-defined]
    CudaGraphManager._init_candidates = _init_candidates
    CudaGraphManager.capture = capture_kinds
    CudaGraphManager.run_fullgraph = run_fullgraph
