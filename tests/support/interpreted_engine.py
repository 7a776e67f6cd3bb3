"""`generate_tokens.py` on the interpreted GPU path: python interpreted_engine.py JOB.json

Beside the answer, JOB.json.kinds names the kinds of the steps that had decodes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import interpreted_gpu  # first: it sets what Triton reads at import


def note_kinds() -> set[str]:
    """Filled while the engine runs."""
    from echokv_vllm.worker.gpu.step import GpuStepBuilder

    kinds: set[str] = set()
    complete = GpuStepBuilder.complete

    def noting(self: Any, common: Any) -> Any:
        step = complete(self, common)
        if step.num_decodes:
            kinds.add(step.kind.name)
        return step

    GpuStepBuilder.complete = noting
    return kinds


if __name__ == "__main__":
    import generate_tokens

    interpreted_gpu.install()
    seen = note_kinds()
    generate_tokens.main()
    Path(f"{sys.argv[1]}.kinds").write_text(json.dumps(sorted(seen)))
