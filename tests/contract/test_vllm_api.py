"""What EchoKV expects of vLLM, checked against the version that is installed."""

from __future__ import annotations

import ast
import base64
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  sets vLLM's environment, so it must come before vLLM
import pytest

from echokv_vllm import compat, hooks, plugin


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


def test_every_hook_is_present():
    assert hooks.missing_hooks() == []
    assert hooks.missing_hooks(hooks.BEAM_HOOKS) == []
    assert hooks.is_tested(hooks.vllm_version())


def patched_functions() -> dict[str, Any]:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor

    return {
        "get_attn_backend_cls": CpuPlatform.get_attn_backend_cls.__func__,
        "add_request": Scheduler.add_request,
        "get_computed_blocks": KVCacheManager.get_computed_blocks,
        "allocate_slots": KVCacheManager.allocate_slots,
        "cache_blocks": KVCacheManager.cache_blocks,
        "process_inputs": InputProcessor.process_inputs,
        "__init__": InputProcessor.__init__,
    }


def test_registering_again_changes_nothing():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    before = dict(AttentionBackendEnum.__members__), patched_functions()
    plugin.register()
    assert (dict(AttentionBackendEnum.__members__), patched_functions()) == before
    for name, function in patched_functions().items():
        assert not hasattr(function.__wrapped__, "_echokv"), f"{name} is wrapped twice"


@pytest.mark.parametrize(("name", "ours"), [(compat.BACKEND, True), ("CPU_ATTN", False)])
def test_the_selected_backend_is_recognised(name, ours):
    """On vLLM 0.31 the name is a second one of another member."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from echokv_vllm.stat_logger import EchoStatLogger

    backend = AttentionBackendEnum[name]
    config = SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
    assert compat.is_selected(config) is ours
    assert EchoStatLogger(config).active is ours
    config.attention_config.backend = None
    assert compat.is_selected(config) is False


@pytest.mark.parametrize(
    ("name", "leading"),
    [
        ("get_attn_backend_cls", ["cls", "selected_backend", "attn_selector_config"]),
        ("add_request", ["self", "request"]),
        ("get_computed_blocks", ["self", "request"]),
        ("allocate_slots", ["self", "request", "num_new_tokens"]),
        ("cache_blocks", ["self", "request", "num_computed_tokens"]),
        ("process_inputs", ["self", "request_id", "prompt", "params"]),
        ("__init__", ["self", "vllm_config"]),
    ],
)
def test_patched_functions_start_with_the_arguments_we_read(name, leading):
    original = patched_functions()[name].__wrapped__
    assert list(inspect.signature(original).parameters)[: len(leading)] == leading


def in_fresh_process(script: str) -> str:
    """Output of a script in a process where vLLM has loaded no plugin."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env={**os.environ, "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_backend_and_specs_work_in_a_process_that_loaded_no_plugin():
    """T1: the backend arrives pickled before plugins are loaded. T2: vLLM's registry of specs
    fills itself only while it is empty."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    members = [AttentionBackendEnum[compat.BACKEND], AttentionBackendEnum["CPU_ATTN"]]
    text = base64.b64encode(pickle.dumps(members)).decode()
    output = in_fresh_process(
        "import base64, pickle\n"
        f"ours, other = pickle.loads(base64.b64decode({text!r}))\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as Enum\n"
        "assert other is Enum['CPU_ATTN']\n"
        "from echokv_vllm import compat, plugin\n"
        "plugin.register()  # as vLLM does later in every process\n"
        "assert ours is Enum['ECHOKV'] and ours is not other\n"
        "assert pickle.loads(pickle.dumps(ours)) is ours\n"
        "print(ours.get_path())\n"
        "import echokv_vllm.specs as specs\n"
        "from vllm.v1 import kv_cache_interface as builtin\n"
        "from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry as registry\n"
        "import torch\n"
        "sizes = dict(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)\n"
        "full = builtin.FullAttentionSpec(**sizes)\n"
        "window = builtin.SlidingWindowSpec(**sizes, sliding_window=64)\n"
        "ours = [kind(**sizes, echo_settings='{}') for kind in\n"
        "        (specs.EchoRetainedSpec, specs.EchoResidualSpec)]\n"
        "print(*(registry.get_manager_class(spec).__name__ for spec in [full, window, *ours]))\n"
    )
    path, managers = output.splitlines()[-2:]
    assert path == compat.BACKEND_PATH
    assert managers.split() == [
        "FullAttentionManager", "SlidingWindowManager", "EchoRetainedManager",
        "EchoResidualManager",
    ]  # fmt: skip


def accepts(ours: Any, theirs: Any) -> str | None:
    """Why ``ours`` cannot be called with every argument that ``theirs`` takes; None if it can.

    By position and by name: vLLM's callers do either.
    """
    own = inspect.signature(ours).parameters
    base = inspect.signature(theirs).parameters
    kinds = {parameter.kind for parameter in own.values()}
    star = inspect.Parameter.VAR_POSITIONAL in kinds
    star_star = inspect.Parameter.VAR_KEYWORD in kinds
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in own.values() if p.kind not in variadic]
    wanted = [p for p in base.values() if p.kind not in variadic]
    for place, parameter in enumerate(wanted):
        if parameter.name in own:
            keyword_only = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            if not keyword_only and named.index(own[parameter.name]) != place:
                return f"{parameter.name} is at another place"
        elif not (star_star and (star or parameter.kind is inspect.Parameter.KEYWORD_ONLY)):
            return f"{parameter.name} is not accepted"
    given = {parameter.name for parameter in wanted}
    for parameter in named:
        if parameter.default is inspect.Parameter.empty and parameter.name not in given:
            return f"{parameter.name} is required but never given"
    return None


def overrides() -> list[Any]:
    """(our function, theirs) for every method of vLLM that a class of ours overrides."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
    from vllm.v1.core.single_type_kv_cache_manager import (
        FullAttentionManager,
        SingleTypeKVCacheManager,
    )
    from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
    from vllm.v1.metrics.loggers import StatLoggerBase

    from echokv_vllm.scheduler.residual import EchoResidualManager
    from echokv_vllm.scheduler.retained import EchoRetainedManager
    from echokv_vllm.specs import EchoResidualSpec, EchoRetainedSpec
    from echokv_vllm.stat_logger import EchoStatLogger
    from echokv_vllm.worker.backend import EchoKVBackend, EchoMetadataBuilder
    from echokv_vllm.worker.topology import ResidualCacheLayer

    pairs = [
        (EchoRetainedManager, FullAttentionManager),
        (EchoResidualManager, SingleTypeKVCacheManager),
        (EchoRetainedSpec, FullAttentionSpec),
        (EchoResidualSpec, AttentionSpec),
        (EchoKVBackend, AttentionBackend),
        (EchoMetadataBuilder, AttentionMetadataBuilder),
        (ResidualCacheLayer, AttentionLayerBase),
        (EchoStatLogger, StatLoggerBase),
    ]
    found = []
    for own, base in pairs:
        for name, value in vars(own).items():
            function = inspect.unwrap(getattr(value, "__func__", value))
            theirs = getattr(base, name, None)
            # Constructors have a test of their own; other such methods are the dataclasses'.
            if inspect.isfunction(function) and callable(theirs) and not name.startswith("__"):
                found.append(pytest.param(getattr(own, name), theirs, id=f"{own.__name__}.{name}"))
    return found


@pytest.mark.parametrize(("ours", "theirs"), overrides())
def test_override_takes_what_vllm_passes(ours, theirs):
    assert accepts(ours, theirs) is None


def test_the_signature_check_can_fail():
    def theirs(self, a, b=1, *, c): ...

    def swapped(self, b, a, *, c): ...

    def short(self, a, b): ...

    def demanding(self, a, b, c, d): ...

    def fine(self, a, *args, **kwargs): ...

    assert accepts(swapped, theirs) == "a is at another place"
    assert accepts(short, theirs) == "c is not accepted"
    assert accepts(demanding, theirs) == "d is required but never given"
    assert accepts(fine, theirs) is None


def test_constructors_take_what_vllm_passes():
    from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
    from vllm.v1.metrics.loggers import StatLoggerBase

    from echokv_vllm.stat_logger import EchoStatLogger
    from echokv_vllm.worker.backend import EchoMetadataBuilder
    from echokv_vllm.worker.impl import EchoKVImpl

    assert accepts(EchoMetadataBuilder.__init__, AttentionMetadataBuilder.__init__) is None
    assert accepts(EchoStatLogger.__init__, StatLoggerBase.__init__) is None
    assert accepts(EchoKVImpl.forward, AttentionImpl.forward) is None
    name = "process_weights_after_loading"
    assert accepts(getattr(EchoKVImpl, name), getattr(AttentionImpl, name)) is None
    # AttentionImpl.__init__ is the documented order; further options arrive by name.
    own = list(inspect.signature(EchoKVImpl.__init__).parameters)
    theirs = list(inspect.signature(AttentionImpl.__init__).parameters)
    assert own[: len(theirs)] == theirs


def test_configuration_has_the_fields_the_start_up_checks_read():
    from vllm.config import (
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        SpeculativeConfig,
        VllmConfig,
    )
    from vllm.v1.attention.selector import AttentionSelectorConfig

    def fields(kind: Any) -> set[str]:
        return set(getattr(kind, "__dataclass_fields__", ())) | set(dir(kind))

    assert {"decode_context_parallel_size", "prefill_context_parallel_size", "use_ubatching"} <= (
        fields(ParallelConfig)
    )
    assert {"hf_config", "hf_text_config", "is_encoder_decoder", "revision", "dtype"} <= (
        fields(ModelConfig)
    )
    assert {"speculative_config", "kv_transfer_config", "additional_config"} <= fields(VllmConfig)
    assert "method" in fields(SpeculativeConfig)
    assert "async_scheduling" in fields(SchedulerConfig)
    assert {"use_mla", "use_sparse"} <= set(AttentionSelectorConfig._fields)


def test_what_the_gpu_path_reads_is_there():
    from vllm.config.attention import AttentionConfig
    from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
    from vllm.v1.attention.backends import fa_utils

    from echokv_vllm.worker.gpu.flash import flash_prefill  # noqa: F401  imports on any platform

    assert callable(fa_utils.get_flash_attn_version)
    assert callable(fa_utils.is_flash_attn_varlen_func_available)
    assert hasattr(AttentionConfig(), "flash_attn_max_num_splits_for_cuda_graph")
    names = {"seq_lens_cpu_upper_bound", "seq_lens_cpu"}
    assert any(hasattr(CommonAttentionMetadata, name) for name in names)
    assert callable(AttentionMetadataBuilder._init_reorder_batch_threshold)
    arguments = flash_attention_arguments()
    assert {
        "q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "seqused_k", "softmax_scale",
        "causal", "block_table", "return_softmax_lse", "out", "scheduler_metadata", "num_splits",
        "fa_version",
    } <= arguments["flash_attn_varlen_func"]  # fmt: skip
    assert {
        "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim",
        "cache_seqlens", "qkv_dtype", "cu_seqlens_q", "page_size", "causal", "num_splits",
    } <= arguments["get_scheduler_metadata"]  # fmt: skip


def flash_attention_arguments() -> dict[str, set[str]]:
    """Of the functions in vLLM's FlashAttention interface, which cannot be imported on a CPU."""
    import vllm

    source = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    functions = [
        node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    return {
        node.name: {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        for node in functions
    }
