"""`generate_tokens.py` on the interpreted GPU path: python interpreted_engine.py JOB.json"""

from __future__ import annotations

import interpreted_gpu  # first: it sets what Triton reads at import

if __name__ == "__main__":
    import generate_tokens

    interpreted_gpu.install()
    generate_tokens.main()
