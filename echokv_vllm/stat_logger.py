"""vLLM stat-logger plugin: puts the scheduler's EchoKV counters on ``/metrics``."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from echokv_vllm.compat import is_selected
from echokv_vllm.metrics import FIELDS, read_totals

_HELP = {
    "admitted_full": "Requests that started with the full cache.",
    "admitted_compressed": "Requests that started compressed.",
    "held_back": "Requests that waited for what the running ones are expected to need.",
    "demoted": "auto requests that gave up residuals after a full start.",
    "restored": "Times a compressed auto request went back to keeping residuals.",
    "pages_dropped": "Residual pages taken from running requests under memory pressure.",
    "window_pages_dropped": "Residual pages that left a compressed request's recent window.",
    "hits_unpaired": "Requests whose prefix hit was cut short: R and D of two requests.",
    "pool_pages": "Pages of the pool.",
    "residual_pages": "Residual pages held by requests.",
}


class EchoStatLogger(StatLoggerBase):
    """Sets one gauge per counter whenever vLLM records an iteration.

    Gauges, not counters: the totals are kept by the scheduler process, which may restart.
    Under another attention backend nothing is registered.
    """

    _gauges: dict[str, Gauge] | None = None

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.active = is_selected(vllm_config)

    @classmethod
    def _named_gauges(cls) -> dict[str, Gauge]:
        if cls._gauges is None:
            cls._gauges = {
                name: Gauge(
                    f"echokv:{name}", _HELP[name], registry=REGISTRY, multiprocess_mode="mostrecent"
                )
                for name in FIELDS
            }
        return cls._gauges

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Reads the counters; arguments are vLLM's own statistics, not needed here."""
        if not self.active:
            return
        gauges = self._named_gauges()
        for name, value in read_totals().items():
            gauges[name].set(value)

    def log_engine_initialized(self) -> None:
        """Nothing to log: the D manager reports the capacity."""
