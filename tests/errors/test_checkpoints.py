"""Error table, checkpoints: what is wrong, both values where two differ, the way out."""

import json
import shutil
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
from tiny_models import write_checkpoint, write_model

from echokv_vllm.checkpoint import CheckpointError, EchoCheckpoint
from echokv_vllm.fingerprint import ModelFingerprint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint-errors")
    model = write_model(folder / "model", num_layers=2)
    write_checkpoint(folder / "checkpoint", model)
    return folder


@pytest.fixture
def checkpoint(source, tmp_path):
    return shutil.copytree(source / "checkpoint", tmp_path / "checkpoint")


def message_of(folder, revision=None):
    with pytest.raises(CheckpointError) as caught:
        EchoCheckpoint.load(folder, revision)
    return str(caught.value)


def edit(folder, **changes):
    path = folder / "echokv.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_folder(tmp_path):
    message = message_of(str(tmp_path / "nowhere"))
    assert "nowhere" in message and "echokv train" in message and "owner/name" in message


def test_unreachable_repository(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = message_of("echokv-tests/no-such-repository")
    assert "'echokv-tests/no-such-repository'" in message and "Hugging Face" in message


def test_proxy_that_refuses(monkeypatch, tmp_path):
    """The hub client passes such an error of its HTTP library on as it is."""
    import huggingface_hub.constants
    from huggingface_hub.utils import close_session

    with refusing_proxy() as address:
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, address)
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        close_session()  # its connections know the proxy of the time they were made
        try:
            message = message_of("echokv-tests/no-such-repository")
        finally:
            close_session()
    assert "Hugging Face" in message and "403" in message


@contextmanager
def refusing_proxy():
    """Address of an HTTP proxy that answers 403 to whatever is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # closed
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_revision_of_a_folder(checkpoint):
    message = message_of(checkpoint, "v2")
    assert "'v2'" in message and "drop the revision" in message


def test_folder_without_a_checkpoint(tmp_path):
    message = message_of(tmp_path)
    assert "no echokv.json" in message and "echokv train" in message


def test_missing_tensors(checkpoint):
    (checkpoint / "echokv.safetensors").unlink()
    message = message_of(checkpoint)
    assert "no echokv.safetensors" in message and "fetch or train it again" in message


def test_corrupt_tensors(checkpoint):
    path = checkpoint / "echokv.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    message = message_of(checkpoint)
    assert "SHA-256" in message and "damaged" in message and "fetch or train it again" in message


def test_truncated_json(checkpoint):
    path = checkpoint / "echokv.json"
    path.write_text(path.read_text()[:100])
    message = message_of(checkpoint)
    assert "is damaged" in message and "fetch or train it again" in message


def test_foreign_format(checkpoint):
    edit(checkpoint, format="lora")
    assert "not of format 'echokv'" in message_of(checkpoint)


def test_later_format_version(checkpoint):
    edit(checkpoint, format_version=99)
    message = message_of(checkpoint)
    assert "99" in message and "reads 1" in message and "matching version" in message


def test_unknown_key(checkpoint):
    edit(checkpoint, colour="red")
    assert "colour" in message_of(checkpoint)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("architecture", "Qwen3ForCausalLM"),
        ("head_dim", 64),
        ("hidden_size", 256),
        ("weights_sha256", "0" * 64),
    ],
)
def test_another_model_names_both_values(source, field, other):
    checkpoint = EchoCheckpoint.load(source / "checkpoint")
    served = replace(checkpoint.fingerprint, **{field: other})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_model(served)
    message = str(caught.value)
    assert field in message and str(other) in message
    assert str(getattr(checkpoint.fingerprint, field)) in message


def test_plan_for_other_heads_than_the_models(source):
    checkpoint = EchoCheckpoint.load(source / "checkpoint")
    with pytest.raises(CheckpointError) as caught:
        replace(checkpoint, fingerprint=replace(checkpoint.fingerprint, num_kv_heads=8))
    message = str(caught.value)
    assert "num_kv_heads=4" in message and "num_kv_heads=8" in message and "train" in message


def test_own_model_passes(source):
    from transformers import AutoConfig

    model = source / "model"
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model), model)
    assert fingerprint.weights_sha256 is not None
    EchoCheckpoint.load(source / "checkpoint").check_model(fingerprint)
