"""`vllm bench` in this process, and what its engine counted meanwhile, as JSON.

    python benchmarks/counted_bench.py COUNTS.json throughput --model MODEL ...

COUNTS.json gets the highest value of each count, looked at ten times a second: `running` (requests
in a step), `preemptions` and, under EchoKV, its counters. Warm-ups count too. The rest of the
command is that of `vllm bench`; one that hides vLLM's metrics ends in an error, not in zeros.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.1
METRICS = {
    "running": "vllm:num_requests_running",
    "preemptions": "vllm:num_preemptions_total",
}


def metric(name: str) -> int | None:
    """A vLLM metric of this process, summed over its labels; None where there is no such metric."""
    from prometheus_client import REGISTRY

    values = [
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == name
    ]
    return int(sum(values)) if values else None


class Watch(threading.Thread):
    """Notes the highest value of every count: the engine takes them along when it ends.

    Attributes:
        highest: By name.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest: dict[str, int] = {}
        self._stopped = threading.Event()

    def run(self) -> None:
        from echokv_vllm.metrics import read_totals

        while not self._stopped.wait(SECONDS_BETWEEN_LOOKS):
            metrics = {name: metric(of) for name, of in METRICS.items()}
            shown = {name: value for name, value in metrics.items() if value is not None}
            for name, value in (shown | read_totals()).items():
                self.highest[name] = max(value, self.highest.get(name, 0))

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self.join()


def main() -> None:
    path = Path(sys.argv[1])
    sys.argv[:2] = ["vllm", "bench"]
    from vllm.entrypoints.cli.main import main as vllm

    watch = Watch()
    watch.start()
    vllm()
    watch.stop()
    if missing := [of for name, of in METRICS.items() if name not in watch.highest]:
        sys.exit(f"vLLM showed no metric {missing[0]}; leave out --disable-log-stats")
    path.write_text(json.dumps(watch.highest), encoding="utf-8")


if __name__ == "__main__":
    main()
