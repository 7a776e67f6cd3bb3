"""Fingerprints tell base models apart without loading them."""

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from echokv_vllm.fingerprint import ModelFingerprint, weights_sha256


def _save_model(folder, seed=0, hidden_size=32, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder, **settings)
    return folder


def _fingerprint(folder):
    return ModelFingerprint.from_config(AutoConfig.from_pretrained(folder), folder)


def test_fields_and_json_round_trip(tmp_path):
    found = _fingerprint(_save_model(tmp_path / "model"))
    assert found.architecture == "LlamaForCausalLM"
    shape = (found.num_layers, found.num_attention_heads, found.num_kv_heads, found.head_dim)
    assert shape == (3, 4, 2, 8) and found.hidden_size == 32
    assert ModelFingerprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_weight_hash_is_over_the_first_and_last_k_and_v_projections(tmp_path):
    folder = _save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 2) for p in "kv"]
    raw = b"".join(weights[name].numpy().tobytes() for name in names)
    assert weights_sha256(folder, 3) == hashlib.sha256(raw).hexdigest()


def test_only_the_first_64_kib_of_a_tensor_count(tmp_path):
    folder = _save_model(tmp_path / "model", hidden_size=256)
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert weights[name].nbytes > 64 * 1024
    before = weights_sha256(folder, 3)
    weights[name].view(-1)[-1] += 1
    save_file(weights, path)
    assert weights_sha256(folder, 3) == before
    weights[name].view(-1)[16 * 1024 - 1] += 1
    save_file(weights, path)
    assert weights_sha256(folder, 3) != before


def test_one_file_and_many_give_the_same_hash(tmp_path):
    single = _save_model(tmp_path / "single")
    many = _save_model(tmp_path / "many", max_shard_size="8KB")
    assert (many / "model.safetensors.index.json").exists()
    assert weights_sha256(single, 3) == weights_sha256(many, 3) is not None
    assert weights_sha256(_save_model(tmp_path / "other", seed=1), 3) != weights_sha256(single, 3)


def test_absent_weights_give_no_hash(tmp_path, monkeypatch):
    folder = _save_model(tmp_path / "model")
    assert weights_sha256(folder, 9) is None, "tensor of layer 8 does not exist"
    (folder / "model.safetensors").unlink()
    assert weights_sha256(folder, 3) is None
    assert weights_sha256("nobody/no-such-model", 3) is None
    assert weights_sha256("not a repo id", 3) is None
    assert ModelFingerprint.from_config(AutoConfig.from_pretrained(folder)).weights_sha256 is None


def test_a_repo_id_is_looked_up_in_the_local_cache(tmp_path, monkeypatch):
    folder = _save_model(tmp_path / "model")
    import huggingface_hub

    def lookup(repo_id, filename, revision=None):
        path = folder / filename
        known = repo_id == "owner/model" and revision == "main" and path.exists()
        return str(path) if known else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lookup)
    assert weights_sha256("owner/model", 3, "main") == weights_sha256(folder, 3)
    assert weights_sha256("owner/model", 3, "other") is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantized_weights_give_no_hash(tmp_path, dtype):
    """Codes under the names of the weights they stand for: a quantized copy of the base model."""
    base = _fingerprint(_save_model(tmp_path / "base"))
    path = _save_model(tmp_path / "quantized") / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.2.self_attn.v_proj.weight"
    weights[name] = (weights[name] * 64).to(dtype)
    save_file(weights, path)
    quantized = _fingerprint(path.parent)
    assert quantized.weights_sha256 is None
    assert base.differences(quantized) == {}


@pytest.mark.parametrize(
    "payload", [b"", b"version https://git-lfs", (10).to_bytes(8, "little") + b"{not json}"]
)
def test_damaged_weights_are_an_error(tmp_path, payload):
    (tmp_path / "model.safetensors").write_bytes(payload)
    with pytest.raises(ValueError, match=r"model\.safetensors.*fetch the model again"):
        weights_sha256(tmp_path, 3)


def test_truncated_weights_are_an_error(tmp_path):
    path = _save_model(tmp_path / "model") / "model.safetensors"
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    path.write_bytes(data[: 8 + header + 16])
    with pytest.raises(ValueError, match="ends inside"):
        weights_sha256(path.parent, 3)


def test_config_without_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture"):
        ModelFingerprint.from_config(LlamaConfig())


def test_differences_name_fields_and_skip_an_unknown_hash(tmp_path):
    found = _fingerprint(_save_model(tmp_path / "model"))
    assert found.differences(found) == {}
    assert found.differences(dataclasses.replace(found, weights_sha256=None)) == {}
    other = dataclasses.replace(found, head_dim=16, weights_sha256="0")
    assert found.differences(other) == {
        "head_dim": (8, 16),
        "weights_sha256": (found.weights_sha256, "0"),
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(extra=1),
        lambda d: d.pop("rope"),
        lambda d: d.update(num_layers="3"),
        lambda d: d.update(weights_sha256=5),
    ],
)
def test_from_dict_is_strict(tmp_path, change):
    data = _fingerprint(_save_model(tmp_path / "model")).to_dict()
    change(data)
    with pytest.raises(ValueError, match="fingerprint"):
        ModelFingerprint.from_dict(data)
    with pytest.raises(ValueError, match="JSON object"):
        ModelFingerprint.from_dict(None)
