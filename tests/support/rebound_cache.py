"""Binds a second cache, on the interpreted GPU path: python rebound_cache.py JOB.json

As vLLM does after it has measured the memory of graphs with a small first one. The job is that of
`generate_tokens.py`. The answer: tokens with the first cache, tokens with the second, and whether
the first was free when the second was allocated.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import interpreted_gpu  # first: it sets what Triton reads at import
import torch
from torch.multiprocessing.reductions import StorageWeakRef


def bind_another_cache(llm: Any) -> bool:
    """vLLM's clean-up after profiling, then its start; whether the old cache's memory was free."""
    from vllm.v1.worker import gpu_model_runner

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context.values()
    old = {StorageWeakRef(layer.kv_cache.untyped_storage()) for layer in layers}
    config = copy.deepcopy(runner.kv_cache_config)
    # What they do on a GPU, a CPU has not.
    torch.accelerator.synchronize = torch.accelerator.empty_cache = lambda *args: None
    runner._cleanup_profiling_kv_cache()
    free: list[bool] = []
    allocate = gpu_model_runner.allocate_kv_cache

    def noting(*args: Any, **kwargs: Any) -> Any:
        free.append(all(storage.expired() for storage in old))
        return allocate(*args, **kwargs)

    gpu_model_runner.allocate_kv_cache = noting
    runner.initialize_kv_cache(config)
    (was_free,) = free
    return was_free


def main() -> None:
    """Reads the job, generates twice, writes the answer."""
    import engines

    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    with engines.engine(
        Path(job["model"]), Path(job["checkpoint"]), job["echokv"], **job["options"]
    ) as llm:

        def generate() -> list[list[int]]:
            outputs = engines.generate(llm, job["prompts"], job["modes"], job["max_tokens"])
            return engines.tokens(outputs)

        first = generate()
        was_free = bind_another_cache(llm)
        Path(f"{path}.out").write_text(json.dumps([first, generate(), was_free]))


if __name__ == "__main__":
    interpreted_gpu.install()
    main()
