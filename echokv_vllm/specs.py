"""KV cache specs of the two groups: R (retained heads) and D (discarded, "residual" heads).

vLLM builds one cache group per spec type, so the two types are what makes two groups over
one block pool. Both carry the scheduler's settings as a JSON string: specs must stay
hashable, and they are the only data that reaches the KV cache managers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from echokv_vllm.config import SchedulerSettings


@dataclass(frozen=True, kw_only=True)
class EchoRetainedSpec(FullAttentionSpec):
    """Pages of the retained heads: every layer that keeps at least one, every token."""

    echo_settings: str

    @classmethod
    def merge(cls, specs: list[EchoRetainedSpec]) -> EchoRetainedSpec:
        """The common spec of equal layers.

        FullAttentionSpec.merge builds a new object from the fields it knows and would
        lose the settings.
        """
        assert all(spec == specs[0] for spec in specs[1:]), "echokv: unequal retained specs"
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class EchoResidualSpec(AttentionSpec):
    """Pages of the discarded heads, for tokens that are still exact. Reclaimable.

    Deliberately not a FullAttentionSpec: vLLM would fuse the group with R.
    """

    echo_settings: str

    @property
    def prefix_cacheable(self) -> bool:
        """Residual pages take part in prefix caching: a full-mode hit needs both groups."""
        return True

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes one request of the longest length can always claim, for vLLM's capacity.

        Residuals beyond the sink page and the recent window can be dropped at any time,
        so only those count, unless the server never compresses.
        """
        settings = SchedulerSettings.from_json(self.echo_settings)
        num_tokens = vllm_config.model_config.max_model_len
        if settings.mode == "full":
            num_pages = -(-num_tokens // self.block_size)
        else:
            num_pages = settings.floor_pages(num_tokens, vllm_config.max_concurrent_batches)
        return num_pages * self.page_size_bytes


SpecT = TypeVar("SpecT", bound=AttentionSpec)


def spec_like(spec: AttentionSpec, cls: type[SpecT], **changes: Any) -> SpecT:
    """A ``cls`` with the fields it shares with ``spec``, except for ``changes``."""
    known = {field.name for field in fields(cls) if field.init}
    values = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name in known}
    return cls(**{**values, **changes})


def register_specs() -> None:
    """Tells vLLM which manager serves which spec. May be called again."""
    from echokv_vllm.scheduler.residual import EchoResidualManager
    from echokv_vllm.scheduler.retained import EchoRetainedManager

    # The registry fills itself only while it is empty: ours must come second, or
    # vLLM's own specs would not resolve in processes that registered nothing yet.
    KVCacheSpecRegistry._ensure_registered()
    for spec, manager in (
        (EchoRetainedSpec, EchoRetainedManager),
        (EchoResidualSpec, EchoResidualManager),
    ):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


register_specs()
