"""Error table, vLLM versions: a missing hook stops who selects the backend, and nobody else."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from echokv_vllm import compat, hooks, plugin

GONE = "vllm.v1.core.block_pool:BlockPool.no_such_method"


@pytest.fixture
def messages():
    """Log records of EchoKV; vLLM's logger does not hand them on to pytest's."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    hooks.logger.addHandler(handler)
    yield records
    hooks.logger.removeHandler(handler)


def test_this_version_has_every_hook(messages):
    hooks.require_supported()
    assert messages == []
    assert hooks.missing_hooks(hooks.GRAPH_HOOKS) == []
    assert hooks.missing_hooks(hooks.BEAM_HOOKS) == []


def test_missing_hook_is_named(monkeypatch):
    monkeypatch.setattr(hooks, "HOOKS", (*hooks.HOOKS, GONE, "vllm.no_module:x"))
    with pytest.raises(hooks.UnsupportedVllmError) as caught:
        hooks.require_supported()
    message = str(caught.value)
    assert f"lacks {GONE}, vllm.no_module:x" in message
    assert hooks.vllm_version() in message
    assert "Install a tested vLLM (0.31, 0.32, 0.33)" in message


def test_untested_version_warns_and_goes_on(monkeypatch, messages):
    monkeypatch.setattr(hooks, "vllm_version", lambda: "0.99.1")
    hooks.require_supported()
    (message,) = messages
    assert "0.31, 0.32, 0.33" in message and "0.99.1" in message


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.0", True), ("0.32.1.dev3+cpu", True), ("0.34.0", False), ("0.3.2", False)],
)
def test_minor_release_counts(version, tested):
    assert hooks.is_tested(version) is tested


def test_plugin_without_the_name_hooks_only_warns(monkeypatch, messages):
    monkeypatch.setattr(hooks, "missing_hooks", lambda: [hooks.NAME_HOOKS[1]])
    monkeypatch.setattr(
        compat, "register_backend_name", lambda: pytest.fail("cannot be registered")
    )
    plugin.register()
    (message,) = messages
    assert hooks.NAME_HOOKS[1] in message


def test_one_place_for_other_backends_is_not_taken_from_another_plugin(monkeypatch, messages):
    """vLLM 0.31 has the member CUSTOM and can add none."""
    calls = []
    registry = SimpleNamespace(
        AttentionBackendEnum=SimpleNamespace(
            __members__={},
            CUSTOM=SimpleNamespace(is_overridden=lambda: True, get_path=lambda: "other.Backend"),
        ),
        register_backend=lambda *arguments: calls.append(arguments),
    )
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", registry)
    assert not compat.register_backend_name()
    assert calls == []
    (message,) = messages
    assert "other.Backend took it" in message and "not available" in message


def test_nothing_is_patched_for_a_name_that_cannot_be_had(monkeypatch):
    """A patched CPU platform would look the name up for users of every backend."""
    monkeypatch.setattr(compat, "register_backend_name", lambda: False)
    for name in ("cpu_platform", "scheduler", "lookup", "schedule", "input_processor"):
        monkeypatch.setattr(compat, f"patch_{name}", lambda: pytest.fail("must not be patched"))
    plugin.register()


def test_steps_go_past_workers_with_the_first_ray_executor_alone(monkeypatch):
    def reach(executor, value=None):
        if value is not None:
            monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", value)
        config = SimpleNamespace(distributed_executor_backend=executor)
        return compat.executor_hands_on_steps(config)

    assert reach("uni") and reach("mp") and reach(None) and reach("ray", "1")
    assert not reach("ray", "0")


@pytest.mark.slow
def test_a_vllm_without_the_step_hooks_still_serves():
    script = """
import sys
from echokv_vllm import compat, hooks
hooks.STEP_HOOKS += ("vllm.no_module:x",)
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.core.sched.scheduler import Scheduler
assert compat.is_patched(Scheduler, "add_request")
assert not compat.is_patched(Scheduler, "schedule")
assert "vllm.v1.worker.gpu.cudagraph_utils" not in sys.modules  # a GPU worker's
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_other_backends_are_undisturbed_and_selecting_ours_names_the_hook():
    """T24: an exception in a plugin would end every vLLM command at argument parsing."""
    script = f"""
from echokv_vllm import hooks
hooks.HOOKS += ({GONE!r},)
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.core.sched.scheduler import Scheduler
import torch
assert not hasattr(Scheduler.add_request, "_echokv"), "patched a vLLM that does not fit"
config = AttentionSelectorConfig(
    head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=16
)
other = AttentionBackendEnum["CPU_ATTN"]
print("other:", current_platform.get_attn_backend_cls(other, config))
try:
    path = current_platform.get_attn_backend_cls(AttentionBackendEnum["ECHOKV"], config)
except hooks.UnsupportedVllmError as error:
    print("ours:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "other: vllm." in done.stdout
    assert f"lacks {GONE}" in done.stdout.split("ours:")[1]
    assert f"lacks {GONE}; --attention-backend echokv is not available" in done.stdout + done.stderr
