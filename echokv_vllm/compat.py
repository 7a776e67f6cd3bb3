"""Every patch of vLLM, and what differs between the versions that are supported.

Each patch says symptom, cause and removal condition, and is applied once per process. Those of
vLLM's graph manager are in worker/gpu/graphs.py and what we use of its FlashAttention in
worker/gpu/flash.py, which only GPU workers import. Names that are relied on are in hooks.py.
"""

from __future__ import annotations

import copyreg
import functools
import sys
import weakref
from typing import Any

from echokv_vllm.hooks import BEAM_HOOKS, logger, vllm_version

BACKEND = "ECHOKV"
BACKEND_PATH = "echokv_vllm.worker.backend.EchoKVBackend"


def register_backend_name() -> bool:
    """Makes ``--attention-backend echokv`` a known value; whether it is one now."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND in AttentionBackendEnum.__members__:
        return True
    if hasattr(AttentionBackendEnum, "register"):
        register_backend(BACKEND, BACKEND_PATH)
    else:
        # vLLM 0.31 cannot add members; a second name for its CUSTOM member does the same
        # and pickles as CUSTOM. Remove with 0.31.
        custom = AttentionBackendEnum.CUSTOM
        if custom.is_overridden() and custom.get_path() != BACKEND_PATH:
            logger.warning(
                "EchoKV: --attention-backend echokv is not available: vLLM %s has one place for "
                "other backends, and %s took it. Uninstall one of the two plugins, or use vLLM "
                "0.32 or later.", vllm_version(), custom.get_path(),
            )  # fmt: skip
            return False
        register_backend(custom, BACKEND_PATH)
        AttentionBackendEnum._member_map_[BACKEND] = custom
    # Symptom: spawned engine processes die with "not a valid AttentionBackendEnum".
    # Cause: the config is pickled by value and unpickled before plugins are loaded there.
    # Pickled as a call into this module, the member registers itself on arrival.
    # Remove when vLLM pickles registered backends by name.
    copyreg.pickle(AttentionBackendEnum, _reduce_member)
    return True


def _reduce_member(member: Any) -> tuple[Any, tuple[Any, ...]]:
    if member.name == BACKEND:
        return _restore_member, ()
    return type(member), (member.value,)


def _restore_member() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from echokv_vllm.plugin import register

    register()
    return AttentionBackendEnum[BACKEND]


def is_selected(vllm_config: Any) -> bool:
    """Whether a server's configuration names the echokv backend."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = getattr(vllm_config.attention_config, "backend", None)
    return backend is not None and backend is AttentionBackendEnum.__members__.get(BACKEND)


def is_patched(owner: type, name: str) -> bool:
    """Whether a method is already wrapped by us, for re-entrant registration."""
    return hasattr(getattr(owner, name), "_echokv")


def patch_cpu_platform() -> None:
    """CPU only. Symptom: ``--attention-backend echokv`` is ignored. Cause: the CPU platform
    returns its own backend whatever is asked; the CUDA one honours the choice. Remove when
    the CPU platform does."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if is_patched(CpuPlatform, "get_attn_backend_cls"):
        return
    original = CpuPlatform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if selected_backend is AttentionBackendEnum.__members__[BACKEND]:
            from echokv_vllm.worker.refusals import check_attention_type

            check_attention_type(attn_selector_config)
            return BACKEND_PATH
        return original(cls, selected_backend, attn_selector_config, *args, **kwargs)

    get_attn_backend_cls._echokv = True  # type: ignore[attr-defined]
    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def patch_scheduler() -> None:
    """Symptom: KV cache managers cannot know a request's mode and how long it may become. Cause:
    vLLM hands them request ids only. Remove when they see the request."""
    from vllm.v1.core.sched.request_queue import SchedulingPolicy
    from vllm.v1.core.sched.scheduler import Scheduler

    if is_patched(Scheduler, "add_request"):
        return
    add = Scheduler.add_request

    @functools.wraps(add)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from echokv_vllm.scheduler.link import find_link

        link = find_link(self.kv_cache_manager.block_pool)
        # What comes under a known id continues a session of streamed inputs.
        if link is not None and request.request_id not in self.requests:
            mode = requested_mode(request.sampling_params)
            link.add_request(request, mode, self.max_model_len)
            link.by_priority = self.policy == SchedulingPolicy.PRIORITY
            if not link.strict and (mode or link.default_mode) == "full":
                # Shared blocks may be inexact, and a full-mode answer must not be.
                request.skip_reading_prefix_cache = True
        return add(self, request, *args, **kwargs)

    add_request._echokv = True  # type: ignore[attr-defined]
    Scheduler.add_request = add_request


def patch_lookup() -> None:
    """Symptom: a KV cache manager cannot know whose prompt it looks up in the prefix cache, nor
    spare the lookup. Cause: vLLM hands it hashes only. Remove when it sees the request."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    if is_patched(KVCacheManager, "get_computed_blocks"):
        return
    original = KVCacheManager.get_computed_blocks

    @functools.wraps(original)
    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from echokv_vllm.scheduler.link import find_link

        link = find_link(self.block_pool)
        if link is None or link.residual is None:
            return original(self, request, *args, **kwargs)
        skips = request.skip_reading_prefix_cache
        link.looked_up = request
        # Not worth a lookup if the request will be held back whatever is found.
        held_back = link.residual.outlook.still_refuses(request.request_id)
        request.skip_reading_prefix_cache = skips or held_back
        try:
            return original(self, request, *args, **kwargs)
        finally:
            request.skip_reading_prefix_cache = skips
            link.looked_up = None

    get_computed_blocks._echokv = True  # type: ignore[attr-defined]
    KVCacheManager.get_computed_blocks = get_computed_blocks


def patch_allocation() -> None:
    """Symptom: with hundreds of requests, scheduling takes longer than the GPU's step. Cause: vLLM
    asks every group of every request in every step, and EchoKV has two. Remove when vLLM asks
    only about requests that need pages."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from echokv_vllm.scheduler.link import find_link
    from echokv_vllm.scheduler.shortcut import needs_nothing, publishes

    if is_patched(KVCacheManager, "allocate_slots"):
        return
    allocate, cache = KVCacheManager.allocate_slots, KVCacheManager.cache_blocks

    @functools.wraps(allocate)
    def allocate_slots(
        self: Any,
        request: Any,
        num_new_tokens: int,
        *args: Any,
        num_lookahead_tokens: int = 0,
        **kwargs: Any,
    ) -> Any:
        # Requests that run come without further arguments.
        link = None if args or kwargs else find_link(self.block_pool)
        manager = None if link is None else link.residual
        if manager is not None and needs_nothing(
            manager, request, num_new_tokens, num_lookahead_tokens, self.max_model_len
        ):
            return self.empty_kv_cache_blocks
        return allocate(
            self, request, num_new_tokens, *args, num_lookahead_tokens=num_lookahead_tokens,
            **kwargs,
        )  # fmt: skip

    @functools.wraps(cache)
    def cache_blocks(self: Any, request: Any, num_computed_tokens: int) -> None:
        link = find_link(self.block_pool)
        manager = None if link is None else link.residual
        if manager is None or publishes(manager, request, num_computed_tokens):
            cache(self, request, num_computed_tokens)

    allocate_slots._echokv = True  # type: ignore[attr-defined]
    KVCacheManager.allocate_slots = allocate_slots
    KVCacheManager.cache_blocks = cache_blocks


def patch_schedule() -> None:
    """Symptom: workers learn on the device only which requests are compressed. Cause: KV cache
    managers, which know before, have no field in the scheduler's output. Remove when they do."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if is_patched(Scheduler, "schedule"):
        return
    original = Scheduler.schedule

    @functools.wraps(original)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        from echokv_vllm import step_kind
        from echokv_vllm.scheduler.link import find_link

        output = original(self, *args, **kwargs)
        link = find_link(self.kv_cache_manager.block_pool)
        if link is not None:
            step_kind.attach(output, link.step_kind(output.num_scheduled_tokens))
        return output

    schedule._echokv = True  # type: ignore[attr-defined]
    Scheduler.schedule = schedule


def patch_worker() -> None:
    """Symptom: metadata builders do not see the scheduler's output, which says what kind of step
    it is. Cause: runners pass on what vLLM's own backends need. Remove when builders see it."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if is_patched(WorkerWrapperBase, "execute_model"):
        return
    original = WorkerWrapperBase.execute_model

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        from echokv_vllm import step_kind

        with step_kind.announced(step_kind.attached(scheduler_output)):
            return original(self, scheduler_output, *args, **kwargs)

    execute_model._echokv = True  # type: ignore[attr-defined]
    WorkerWrapperBase.execute_model = execute_model


def executor_hands_on_steps(parallel_config: Any) -> bool:
    """Whether steps reach the model runner by way of `WorkerWrapperBase.execute_model`: not with
    the first of vLLM's two Ray executors."""
    from vllm import envs

    executor = parallel_config.distributed_executor_backend
    return executor != "ray" or bool(getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", False))


def patch_input_processor() -> None:
    """Symptom: a bad mode would only be noticed in the engine process, where an error ends
    the server. Cause: vLLM does not let plugins check request parameters. Remove when it
    does.

    It is also where a server whose EchoKV options nothing would read is refused: every front end
    makes one before it starts an engine."""
    from vllm.v1.engine.input_processor import InputProcessor

    from echokv_vllm.config import EchoConfig, EchoConfigError

    if is_patched(InputProcessor, "process_inputs"):
        return
    original, build = InputProcessor.process_inputs, InputProcessor.__init__
    limits: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: Any, prompt: Any, params: Any, *a: Any, **k: Any
    ) -> Any:
        if not is_selected(self.vllm_config):
            return original(self, request_id, prompt, params, *a, **k)
        try:
            mode = requested_mode(params)
            request = original(self, request_id, prompt, params, *a, **k)
            if mode == "full":
                _check_length(self.vllm_config, limits.setdefault(self, {}), request)
        except EchoConfigError as error:
            raise _as_client_error(error) from None
        return request

    @functools.wraps(build)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if is_selected(vllm_config):
            patch_beam_search()
        else:
            EchoConfig.refuse_unused(vllm_config.additional_config)
        build(self, vllm_config, *args, **kwargs)

    process_inputs._echokv = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs
    InputProcessor.__init__ = __init__


def patch_beam_search() -> None:
    """Symptom: a mode named beside ``use_beam_search`` is ignored. Cause: vLLM's beam search hands
    no extra arguments on. Remove when it does. Patches only what is loaded: processes that answer
    no HTTP requests need not import them."""
    from echokv_vllm.config import EchoConfigError

    def patch(owner: Any) -> None:
        original = owner.to_beam_search_params

        @functools.wraps(original)
        def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            mode = (self.vllm_xargs or {}).get("echokv")
            if mode is not None:
                raise _as_client_error(EchoConfigError(
                    f"The request parameter vllm_xargs.echokv is {mode!r}, and use_beam_search is "
                    "on: vLLM's beam search cannot hand a mode on. Leave one of the two out, or "
                    "start the server with that mode as its default."
                ))  # fmt: skip
            return original(self, *args, **kwargs)

        to_beam_search_params._echokv = True  # type: ignore[attr-defined]
        owner.to_beam_search_params = to_beam_search_params

    for hook in BEAM_HOOKS:
        module_name, _, path = hook.partition(":")
        class_name, _, method = path.partition(".")
        owner = getattr(sys.modules.get(module_name), class_name, None)
        if owner is not None and hasattr(owner, method) and not is_patched(owner, method):
            patch(owner)


def _check_length(vllm_config: Any, cache: dict[str, Any], request: Any) -> None:
    """Refuses a request pinned to full mode that the pool can never hold.

    Args:
        vllm_config: The server's configuration.
        cache: Keeps the limit between calls.
        request: vLLM's EngineCoreRequest, its sampling parameters complete.

    Raises:
        EchoConfigError: The request is too long.
    """
    from echokv_vllm.limits import full_mode_limit

    if "limit" not in cache:
        cache["limit"] = full_mode_limit(vllm_config)
    max_model_len = vllm_config.model_config.max_model_len
    prompt = request.prompt_token_ids
    if prompt is None:
        prompt = request.prompt_embeds
    max_tokens = request.sampling_params.max_tokens
    # Inputs of a session are added up in one request, and nobody knows how many will come.
    if max_tokens is None or getattr(request, "resumable", False):
        max_tokens = max_model_len
    cache["limit"].check(len(prompt), max_tokens, max_model_len)


def _as_client_error(error: ValueError) -> Exception:
    """The same error as one that vLLM answers with HTTP 400; any other ends as a bare 500.

    It stays an EchoConfigError, and so a ValueError, for callers in the same process.
    """
    from vllm.exceptions import VLLMClientError

    class BadRequest(VLLMClientError, type(error)):  # type: ignore[misc]
        pass

    BadRequest.__name__ = BadRequest.__qualname__ = type(error).__name__
    return BadRequest(str(error))


def requested_mode(params: Any) -> str | None:
    """The mode in ``vllm_xargs`` (HTTP) or ``SamplingParams.extra_args``, if any.

    Raises:
        EchoConfigError: Not an allowed mode.
    """
    from echokv_vllm.config import check_mode

    mode = (getattr(params, "extra_args", None) or {}).get("echokv")
    if mode is None:
        return None
    return check_mode(mode, "The request parameter vllm_xargs.echokv")


def has_gpu_kernels(device: Any, dtype: Any, head_dim: int) -> bool:
    """Whether attention runs on the GPU path: CUDA, half precision, and a FlashAttention.

    Elsewhere the portable path serves, which is slow and says so at start-up.
    """
    import torch

    if torch.device(device).type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    from echokv_vllm.worker.gpu.flash import is_served

    return is_served(head_dim)


def host_seq_lens(common: Any) -> Any:
    """Bounds of the sequence lengths on the host, [>= n] int32; exact for prompt chunks.

    Only of drafts whose verdict is still out vLLM knows no better than a bound; those are refused
    (`worker.refusals`). 0.31 has ``seq_lens_cpu`` beside or instead of the name 0.32 introduced.
    """
    lens = getattr(common, "seq_lens_cpu_upper_bound", None)
    return lens if lens is not None else common.seq_lens_cpu
