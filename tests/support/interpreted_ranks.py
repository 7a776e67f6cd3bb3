"""`gpu_engine.py JOB.json` with the interpreted GPU path on every rank."""

from __future__ import annotations

import interpreted_gpu  # first: it sets what Triton reads at import

# Not below: ranks are spawned processes, which import this file again.
interpreted_gpu.install()

if __name__ == "__main__":
    import gpu_engine

    gpu_engine.main()
