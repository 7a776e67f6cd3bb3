"""Plan search for `--plan auto`. Never imports vLLM."""

from __future__ import annotations

from echokv_vllm.train.search.options import SearchOptions

__all__ = ["SearchOptions"]
