"""Runs an engine in processes of its own: ``python generate_tokens.py JOB.json``.

The job names model, checkpoint (or null), echokv options, engine options, prompts, mode and
max_tokens; the answer, a list of token lists, is written beside it as JOB.json.out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Reads the job, generates, writes the answer."""
    import engines  # not at the top: spawned engine processes import this file again

    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    checkpoint = job["checkpoint"] and Path(job["checkpoint"])
    with engines.engine(Path(job["model"]), checkpoint, job["echokv"], **job["options"]) as llm:
        outputs = engines.generate(llm, job["prompts"], job["modes"], job["max_tokens"])
        Path(f"{path}.out").write_text(json.dumps(engines.tokens(outputs)))


if __name__ == "__main__":
    main()
