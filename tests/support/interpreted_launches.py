"""Notes kernels on the interpreted GPU path: python interpreted_launches.py JOB.json

The job is that of `generate_tokens.py`. JOB.json.launches lists which variants (kernels with their
compile-time constants) serving launched, and which of them the warm-up had launched before.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import interpreted_gpu  # first: it sets what Triton reads at import


def note_launches() -> tuple[set[str], set[str]]:
    """Filled while the engine runs: variants of the warm-up, and of all that follows."""
    from triton.runtime.interpreter import InterpretedFunction

    from echokv_vllm.worker.gpu.attention import GpuAttention

    warm: set[str] = set()
    served: set[str] = set()
    current = served
    run, warm_up = InterpretedFunction.run, GpuAttention.warm_up

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        constants = sorted((k, repr(v)) for k, v in options.items() if k not in ("grid", "warmup"))
        current.add(f"{self.fn.__name__} {constants}")
        return run(self, *args, **options)

    def warming(*args: Any) -> None:
        nonlocal current
        current = warm
        warm_up(*args)
        current = served

    InterpretedFunction.run, GpuAttention.warm_up = noting, warming
    return warm, served


def shrink_tiles() -> None:
    """Makes two requests of a tiny model as many as hundreds of a real one."""
    from echokv_kernels.gpu import decode

    decode.REDUCE = dataclasses.replace(decode.REDUCE, few=1)
    decode.COMBINE = dataclasses.replace(decode.COMBINE, wide_from=3)


if __name__ == "__main__":
    import generate_tokens

    interpreted_gpu.install()
    shrink_tiles()
    warm, served = note_launches()
    generate_tokens.main()
    Path(f"{sys.argv[1]}.launches").write_text(
        json.dumps({"served": sorted(served), "warm": sorted(served & warm)})
    )
