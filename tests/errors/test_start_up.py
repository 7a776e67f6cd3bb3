"""Error table, start-up of an engine in this process: the root message reaches the caller.

The model folders hold no weights. Every message must therefore come before weights are loaded.
"""

import shutil

import pytest
from engines import engine, generate
from tiny_models import write_checkpoint, write_model

from echokv_vllm.checkpoint import CheckpointError
from echokv_vllm.config import EchoConfigError
from echokv_vllm.worker.refusals import UnsupportedModelError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start-up")
    write_model(folder / "model", num_layers=2)
    write_model(folder / "other", num_layers=2, seed=2, hidden_size=64)
    write_checkpoint(folder / "checkpoint", folder / "model")
    return folder


def without_weights(model, target):
    return shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))


def test_checkpoint_of_another_model(folder, tmp_path):
    model = without_weights(folder / "other", tmp_path / "model")
    with pytest.raises(CheckpointError) as caught, engine(model, folder / "checkpoint"):
        pass
    message = str(caught.value)
    assert "hidden_size: checkpoint 128, model 64" in message
    assert "echokv train" in message


def test_unknown_option(folder, tmp_path):
    model = without_weights(folder / "model", tmp_path / "model")
    with (
        pytest.raises(EchoConfigError) as caught,
        engine(model, folder / "checkpoint", {"recent": 3}),
    ):
        pass
    assert "'recent'" in str(caught.value) and "recent_tokens" in str(caught.value)


def test_backend_without_options(folder, tmp_path):
    model = without_weights(folder / "model", tmp_path / "model")
    with (
        pytest.raises(EchoConfigError, match="needs a checkpoint: add --additional-config"),
        engine(model, attention_backend="echokv"),
    ):
        pass


def test_options_without_the_backend(folder, tmp_path):
    """Stock attention would serve, and every mode that a request names be ignored."""
    model = without_weights(folder / "model", tmp_path / "model")
    section = {"echokv": {"checkpoint": str(folder / "checkpoint")}}
    with (
        pytest.raises(EchoConfigError, match="Add --attention-backend echokv, or leave"),
        engine(model, additional_config=section),
    ):
        pass


def test_sliding_window_model(folder, tmp_path):
    model = without_weights(
        write_model(folder / "windowed", num_layers=2, architecture="Mistral", sliding_window=64),
        tmp_path / "model",
    )
    with pytest.raises(UnsupportedModelError) as caught, engine(model, folder / "checkpoint"):
        pass
    assert "window 64" in str(caught.value)


def test_draft_model(folder, tmp_path):
    model = without_weights(folder / "model", tmp_path / "model")
    draft = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 2}
    with (
        pytest.raises(UnsupportedModelError, match=r"draft model .*Use one of ngram"),
        engine(model, folder / "checkpoint", speculative_config=draft),
    ):
        pass


def test_cache_dtype_other_than_the_models_on_a_gpu(folder, tmp_path, monkeypatch):
    """FlashAttention and the kernels take one dtype: such a server died at its first request."""
    from echokv_vllm import compat
    from echokv_vllm.worker.gpu import worker as gpu_worker

    monkeypatch.setattr(compat, "has_gpu_kernels", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(gpu_worker, "flash_version", lambda head_dim: 3)
    model = without_weights(folder / "model", tmp_path / "model")
    options = {"dtype": "float16", "kv_cache_dtype": "bfloat16"}
    with (
        pytest.raises(UnsupportedModelError) as caught,
        engine(model, folder / "checkpoint", {"step_kinds": False}, **options),
    ):
        pass
    for fragment in ("--kv-cache-dtype bfloat16", "float16", "Leave --kv-cache-dtype at auto"):
        assert fragment in str(caught.value)


def test_loader_that_leaves_out_attention_layers(folder, monkeypatch):
    """As vLLM's tensorizer loader does, or one that another plugin registers."""
    from vllm.model_executor.model_loader import base_loader

    monkeypatch.setattr(base_loader, "process_weights_after_loading", lambda *args: None)
    with (
        pytest.raises(UnsupportedModelError, match=r"--load-format auto did not call .*Use"),
        engine(folder / "model", folder / "checkpoint", max_model_len=256),
    ):
        pass


def test_pool_too_small(folder):
    """vLLM's own check, which must count EchoKV's pages: 4 pages hold less than 512 tokens."""
    with (
        pytest.raises(ValueError) as caught,
        engine(
            folder / "model", folder / "checkpoint", max_model_len=512, num_gpu_blocks_override=4
        ),
    ):
        pass
    assert "512" in str(caught.value)


def test_bad_mode_of_a_request_is_a_value_error_and_the_engine_lives(folder):
    with engine(folder / "model", folder / "checkpoint", max_model_len=256) as llm:
        with pytest.raises(ValueError) as caught:
            generate(llm, [[1, 2, 3]], "fast", max_tokens=2)
        assert "vllm_xargs.echokv is 'fast'" in str(caught.value)
        assert "'auto', 'full' and 'compressed'" in str(caught.value)
        (output,) = generate(llm, [[1, 2, 3]], "full", max_tokens=2)
        assert len(output.outputs[0].token_ids) == 2
