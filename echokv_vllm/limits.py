"""How long a request pinned to full mode may become.

Other requests shrink when memory is short, so vLLM checks ``max_model_len`` against the compressed
capacity. A pinned request cannot shrink: one that outgrows the pool would wait for ever, at the
head of the queue. It is refused when it arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from echokv_vllm.config import EchoConfig, EchoConfigError


@dataclass(frozen=True)
class FullModeLimit:
    """Room for one request in full mode.

    Attributes:
        retained_block_size: Tokens per R page.
        residual_block_size: Tokens per D page.
        num_pages: Pages of one engine's pool.
    """

    retained_block_size: int
    residual_block_size: int
    num_pages: int

    def pages(self, num_tokens: int) -> int:
        """Pages of both groups that ``num_tokens`` need."""
        return -(-num_tokens // self.retained_block_size) - (
            -num_tokens // self.residual_block_size
        )

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest request that fits."""
        low, high = 0, self.num_pages * self.retained_block_size
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.pages(middle) <= self.num_pages else (low, middle - 1)
            )
        return low

    def check(self, num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
        """Refuses a request whose full cache can outgrow the pool.

        Raises:
            EchoConfigError: Names both lengths and the ways out.
        """
        longest = min(num_prompt_tokens + max_tokens, max_model_len)
        if self.pages(longest) > self.num_pages:
            raise EchoConfigError(
                f"The request is pinned to full mode and may reach {longest} tokens (prompt "
                f"{num_prompt_tokens}, max_tokens {max_tokens}); this server's KV cache holds "
                f"{self.max_tokens} tokens in full mode. Lower max_tokens, leave "
                "vllm_xargs.echokv out (auto), or give the server more KV memory."
            )


def full_mode_limit(vllm_config: Any) -> FullModeLimit:
    """The limit of a started server, from the process that takes its requests."""
    from echokv_kernels.layout import PlanLayout
    from echokv_vllm.checkpoint import EchoCheckpoint

    config = EchoConfig.parse(vllm_config.additional_config)
    checkpoint = EchoCheckpoint.load(config.checkpoint, config.revision)
    # The whole model's heads: ranks hold equal shares, and block sizes follow from the ratio.
    sizes = PlanLayout(
        tuple(len(layer.retained) for layer in checkpoint.plan.layers),
        checkpoint.plan.num_kv_heads,
        checkpoint.fingerprint.head_dim,
        vllm_config.model_config.dtype.itemsize,
    ).block_sizes()
    # vLLM adds up the pools of the data-parallel engines this process talks to; a request lives in
    # one of them.
    parallel = vllm_config.parallel_config
    num_engines = parallel.data_parallel_size
    if parallel.local_engines_only:
        num_engines = parallel.data_parallel_size_local
    num_blocks = vllm_config.cache_config.num_gpu_blocks // num_engines
    return FullModeLimit(sizes.retained, sizes.residual, num_blocks - 1)
