"""vLLM names outside its public API that EchoKV relies on, and the versions it was tested with.

Reference: vLLM 0.32; 0.31 and 0.33 pass the same contract tests (tests/contract). A missing
hook is an error that names it, raised when the backend is used: vLLM loads plugins in every
process, also for users of other backends, and must not fail there.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

TESTED_VERSIONS = ("0.31", "0.32", "0.33")

# What it takes to make the backend's name known.
NAME_HOOKS = (
    "vllm.v1.attention.backends.registry:AttentionBackendEnum",
    "vllm.v1.attention.backends.registry:register_backend",
)
HOOKS = (
    *NAME_HOOKS,
    "vllm.v1.attention.backend:AttentionBackend.customize_spec",
    "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts",
    "vllm.v1.attention.backend:AttentionImplBase.process_weights_after_loading",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
    "vllm.v1.attention.backend:AttentionMetadataBuilder._init_reorder_batch_threshold",
    "vllm.v1.kv_cache_interface:FullAttentionSpec",
    "vllm.v1.kv_cache_interface:AttentionSpec",
    "vllm.v1.kv_cache_interface:KVCacheLayout.BLHNC",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.new_step_starts",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.remove_skipped_blocks",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.add_local_computed_blocks",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.pop_blocks_for_free",
    "vllm.v1.core.block_pool:BlockPool.get_cached_block",
    "vllm.v1.core.block_pool:BlockPool.evict_blocks",
    "vllm.v1.core.kv_cache_utils:resolve_block_hashes",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.cache_blocks",
    "vllm.v1.core.sched.request_queue:SchedulingPolicy.PRIORITY",
    "vllm.v1.core.sched.scheduler:Scheduler.add_request",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "vllm.v1.request:Request.num_output_tokens",
    "vllm.v1.request:RequestStatus.FINISHED_LENGTH_CAPPED",
    "vllm.v1.request:RequestStatus.RUNNING",
    "vllm.v1.request:RequestStatus.WAITING",
    "vllm.v1.request:RequestStatus.WAITING_FOR_STREAMING_REQ",
    "vllm.exceptions:VLLMClientError",
    "vllm.forward_context:get_forward_context",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.bind_kv_cache",
    "vllm.model_executor.models.utils:extract_layer_index",
)

# What it takes to tell workers the kind of a step. Every vLLM process looks at these, so they are
# apart from those that would import a GPU worker's modules.
STEP_HOOKS = ("vllm.v1.core.sched.scheduler:Scheduler.schedule",)

# What it takes to capture graphs per kind of step; without them one graph serves all kinds.
GRAPH_HOOKS = (
    *STEP_HOOKS,
    "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.run_fullgraph",
    "vllm.v1.worker.worker_base:WorkerWrapperBase.execute_model",
)

# What it takes to refuse a mode named with beam search. They would import the HTTP server.
BEAM_HOOKS = (
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params",
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params",
)

logger = logging.getLogger("vllm.echokv")


class UnsupportedVllmError(RuntimeError):
    """This vLLM lacks something EchoKV is built on."""


def missing_hooks(hooks: tuple[str, ...] | None = None) -> list[str]:
    """The entries of a list, by default :data:`HOOKS`, this vLLM does not have."""
    return [hook for hook in (HOOKS if hooks is None else hooks) if not _exists(hook)]


def _exists(hook: str) -> bool:
    module_name, _, path = hook.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError:
        return False
    for name in path.split("."):
        if not hasattr(target, name):
            return False
        target = getattr(target, name)
    return True


def vllm_version() -> str:
    """Version of the installed vLLM."""
    return str(importlib.import_module("vllm").__version__)


def is_tested(version: str) -> bool:
    """Whether the contract tests were run against this version's minor release."""
    return ".".join(version.split(".")[:2]) in TESTED_VERSIONS


def require_supported() -> None:
    """Called when the backend is used.

    Raises:
        UnsupportedVllmError: A hook is missing.
    """
    version = vllm_version()
    tested = ", ".join(TESTED_VERSIONS)
    missing = missing_hooks()
    if missing:
        raise UnsupportedVllmError(
            f"vLLM {version} lacks {', '.join(missing)}, which EchoKV needs. Install a tested "
            f"vLLM ({tested}), or an EchoKV release for this one."
        )
    if not is_tested(version):
        logger.warning(
            "EchoKV was tested with vLLM %s, not with %s. Every hook it needs is present; run "
            "its contract tests before you rely on it.", tested, version,
        )  # fmt: skip
