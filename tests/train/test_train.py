"""Whole training runs on tiny models: what is written, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from echokv_vllm.checkpoint import CONFIG_FILE, REPORT_FILE, TENSOR_FILE, EchoCheckpoint
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.presets import preset_plan
from echokv_vllm.rope import rotary_from_config
from echokv_vllm.train import TrainOptions, train
from echokv_vllm.train.data import load_tokens


@pytest.fixture
def options(model_folder, corpus, tmp_path):
    return TrainOptions(
        model=model_folder,
        data=corpus,
        out=str(tmp_path / "checkpoint"),
        plan="local-0.5",
        rotation_block=16,
        sequence_len=64,
        max_position=256,
        seed=4,
        device="cpu",
        progress=False,
    )


def test_run_writes_a_checkpoint_that_loads(options, tmp_path, model_folder, corpus):
    result = train(options, command="echokv train ...")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    loaded = EchoCheckpoint.load(options.out)
    assert loaded.plan == preset_plan("local-0.5", 3, 4)
    assert (loaded.rotation_block, loaded.recent_tokens) == (16, 128)
    for layer, maps in result.checkpoint.maps.items():
        assert torch.equal(loaded.maps[layer].key, maps.key)
        assert maps.key.dtype == torch.float32
    loaded.check_model(
        ModelFingerprint.from_config(AutoConfig.from_pretrained(model_folder), model_folder)
    )
    assert loaded.fingerprint.weights_sha256 is not None

    record = loaded.provenance
    with open(corpus, "rb") as file:
        assert record["data"]["file_sha256"] == hashlib.sha256(file.read()).hexdigest()
    assert record["data"]["num_tokens"] == 126 * 64
    assert result.num_fit_tokens + result.num_heldout_tokens == 126 * 64
    assert result.num_heldout_tokens == 13 * 64
    assert record["command"] == "echokv train ..." and record["options"]["seed"] == 4
    assert set(record["versions"]) == {"echokv_vllm", "torch", "transformers"}
    assert record["errors"]["2"] == dataclasses.asdict(result.errors[2])
    assert record["max_position"] == 256

    table = (result.folder / REPORT_FILE).read_text()
    assert table == result.report
    assert f"| 1 | 2 of 4 | 2 | {result.errors[1].key:.4f} |" in table
    assert f"| mean | | | {result.mean_key_error:.4f} | {result.mean_value_error:.4f} |" in table
    assert 0 < result.mean_key_error < 1 and 0 < result.mean_value_error < 1


@pytest.mark.parametrize(("plan", "shards"), [("local-0.5", 2), ("paper-0.5", 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_written_maps_rebuild_heads_as_the_contract_says(options, plan, shards, bias):
    """Head by head, with plain indexing: the errors reported are those of the maps on disk."""
    # One offset only (0), so that positions are those of the forward pass.
    options = dataclasses.replace(options, plan=plan, shards=shards, bias=bias, max_position=64)
    result = train(options)
    loaded = EchoCheckpoint.load(options.out)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    _, heldout = load_tokens(options.data, tokenizer, 64, options.num_tokens).split()
    with torch.inference_mode():
        cache = model(heldout.long(), use_cache=True).past_key_values.layers
    rotary = rotary_from_config(model.config)
    back = -(torch.arange(64) // 16 * 16).expand(len(heldout), 64)
    keys = [rotary.rotate(layer.keys.transpose(1, 2), back) for layer in cache]
    values = [layer.values.transpose(1, 2) for layer in cache]
    for layer, maps in loaded.maps.items():
        found = []
        for heads, weights, offset in (
            (keys, maps.key, maps.key_bias),
            (values, maps.value, maps.value_bias),
        ):
            wrong = total = 0.0
            for row, head in enumerate(loaded.plan.discarded(layer)):
                shard = head // (4 // shards)
                features = torch.cat(
                    [heads[s][:, :, h] for s, h in loaded.plan.source_heads(layer, shard)], -1
                )
                rebuilt = features @ weights[row]
                assert (offset is not None) == bias
                if offset is not None:
                    rebuilt = rebuilt + offset[row]
                wrong += (heads[layer][:, :, head] - rebuilt).square().sum().item()
                total += heads[layer][:, :, head].square().sum().item()
            found.append(wrong / total)
        assert found == pytest.approx([result.errors[layer].key, result.errors[layer].value], 1e-3)


def _tensor_sha(folder):
    with open(f"{folder}/{TENSOR_FILE}", "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def test_same_seed_same_bytes_other_seed_other_bytes(options, tmp_path):
    shas = []
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        out = str(tmp_path / name)
        train(dataclasses.replace(options, out=out, seed=seed))
        shas.append(_tensor_sha(out))
    assert shas[0] == shas[1] != shas[2]


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2", "Qwen3"])
def test_other_architectures(options, tiny_model, save_model, tmp_path, architecture):
    model = save_model(tiny_model(architecture), tmp_path / "model")
    result = train(dataclasses.replace(options, model=model, dtype="bfloat16"))
    assert result.checkpoint.fingerprint.architecture == f"{architecture}ForCausalLM"
    assert all(found.key < 1 and found.value < 1 for found in result.errors.values())


@pytest.mark.parametrize("stage2", ["none", "o-mse", "kl"])
def test_pruned_heads(options, tiny_model, save_model, tmp_path, stage2):
    """The only source is a head of zeros: nothing to solve for, and whitening has no scale."""
    model = tiny_model()
    for layer in model.get_decoder().layers:
        with torch.no_grad():
            for name in ("k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight[:8] = 0
    changes = {"plan": "local-0.25", "stage2": stage2, "stage2_steps": 2, "recent_tokens": 4}
    result = train(
        dataclasses.replace(options, model=save_model(model, tmp_path / "model"), **changes)
    )
    assert result.mean_key_error == result.mean_value_error == pytest.approx(1.0)
    for maps in result.checkpoint.maps.values():
        assert not maps.key.any() and not maps.value.any()


def test_plan_file(options, tmp_path):
    plan = preset_plan("paper-0.7", 3, 4)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    result = train(dataclasses.replace(options, plan=str(path)))
    assert result.checkpoint.plan == plan and list(result.errors) == [1]


def test_overwrite_must_be_asked_for(options):
    train(options)
    before = _tensor_sha(options.out)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        train(dataclasses.replace(options, rotation_block=1))
    assert _tensor_sha(options.out) == before
    train(dataclasses.replace(options, rotation_block=1, overwrite=True))
    assert EchoCheckpoint.load(options.out).rotation_block == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": "local-2"}, ["'2'", "between 0 and 1"]),
        ({"plan": "local-0.25", "shards": 4}, ["1 of 4", "shards=4", "divide"]),
        ({"sequence_len": 512, "max_position": None}, ["sequence_len=512", "256", "lower"]),
        ({"data": "absent.txt"}, ["absent.txt", "does not exist"]),
        ({"num_tokens": 100}, ["num_tokens=100", "two sequences"]),
        ({"sequence_len": 8, "num_tokens": 16}, ["8 tokens", "16 features", "more text"]),
        ({"device": "cuda:77"}, ["cuda:77", "device=cpu"]),
        ({"device": "gpu"}, ["'gpu'", "auto, cpu, cuda"]),
        ({"device": "meta"}, ["'meta'", "auto, cpu, cuda"]),
    ],
)
def test_bad_requests_write_nothing(options, tmp_path, changes, words):
    with pytest.raises(ValueError) as caught:
        train(dataclasses.replace(options, **changes))
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotation_block": -1}, ["rotation_block=-1", "at least 0"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"ridge": float("nan")}, ["ridge=nan"]),
        ({"ridge": -1.0}, ["ridge=-1"]),
        ({"dtype": "int8"}, ["'int8'", "bfloat16"]),
        ({"seed": 2**64}, ["seed=18446744073709551616", "at most 18446744073709551615"]),
        ({"max_position": 63}, ["max_position=63", "sequence_len=64"]),
    ],
)
def test_bad_options(options, changes, words):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(options, **changes)
    for word in words:
        assert word in str(caught.value)


def _unsupported(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=["GPT2LMHeadModel"])
    (folder / "config.json").write_text(json.dumps(config))


def _quantized(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    (folder / "config.json").write_text(json.dumps(config))


def _dynamic_rope(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"].update(rope_type="dynamic", factor=2.0)
    (folder / "config.json").write_text(json.dumps(config))


def _partial_rotary(folder):
    """vLLM would honour the factor, transformers' Llama ignores it: they rotate differently."""
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"].update(partial_rotary_factor=0.5)
    (folder / "config.json").write_text(json.dumps(config))


def _unknown_tokenizer(folder):
    """As a later release of the package tokenizers might write it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "NotYetInvented"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _foreign_tokenizer(folder):
    """Ids beyond the embeddings of the model."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["A"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _nan(weights):
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ["no readable config"]),
        (_unsupported, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        (_quantized, ["quant_method='gptq'", "unquantized base model"]),
        (_dynamic_rope, ["'dynamic'", "allowed are default"]),
        (_partial_rotary, ["rotates 8 of 8", "implies 4"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer"]),
        (_unknown_tokenizer, ["no readable tokenizer", "tokenizers release"]),
        (_foreign_tokenizer, ["vocab_size is 300", "belongs to the model"]),
        (lambda f: (f / "model.safetensors").unlink(), ["weights", "cannot be read"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), ["weights", "cannot be read"]),
        (
            lambda f: _change_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
            ["lacks 1 weights", "model.layers.1.mlp.up_proj.weight"],
        ),
        (
            lambda f: _change_weights(f, lambda w: w.update({"model.norm.weight": torch.zeros(7)})),
            ["weights", "cannot be read"],
        ),
        (lambda f: _change_weights(f, _nan), ["layer 1", "NaN"]),
    ],
)
def test_unusable_models_write_nothing(options, tiny_model, save_model, tmp_path, damage, words):
    model = tmp_path / "model"
    save_model(tiny_model(), model)
    damage(model)
    with pytest.raises(ValueError) as caught:
        train(dataclasses.replace(options, model=str(model)))
    for word in words:
        assert word in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "changes",
    [dict(plan="auto"), dict(plan="local-0.5", stage2="kl", recent_tokens=16)],
    ids=["search", "kl"],
)
def test_scores_that_are_not_finite(options, tiny_model, save_model, tmp_path, changes):
    """Keys and values of all layers are fine; only what comes after them is not."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    folder = save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"next-token scores hold NaN .* float32") as caught:
        train(dataclasses.replace(options, model=folder, **changes))
    assert "model's weights" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_kl_refuses_sources_in_later_layers_before_any_work(options, tmp_path, monkeypatch):
    plan = preset_plan("local-0.5", 3, 4).to_dict()
    plan["layers"][0]["sources"] = [{"layer": 2, "heads": [0, 1]}]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))

    def work(*arguments):
        raise AssertionError("work was begun")

    monkeypatch.setattr("echokv_vllm.train.run.load_tokens", work)
    changes = dict(plan=str(path), stage2="kl", recent_tokens=16)
    with pytest.raises(ValueError, match="rebuilds layer 0 from layer 2"):
        train(dataclasses.replace(options, **changes))


@pytest.mark.parametrize(
    ("loader", "part"), [("AutoModelForCausalLM", "weights"), ("AutoTokenizer", "tokenizer")]
)
def test_absent_packages_are_named(options, tmp_path, monkeypatch, loader, part):
    def refuse(*arguments, **settings):
        raise ImportError("Loading this needs `somepackage`:\n`pip install somepackage`")

    monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", refuse)
    with pytest.raises(
        ValueError, match=r"needs `somepackage`: `pip.*install it, or use"
    ) as caught:
        train(options)
    assert f"reading the {part} of model {options.model!r}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_absent_model(options):
    with pytest.raises(ValueError, match=r"'./nowhere' has no readable config"):
        train(dataclasses.replace(options, model="./nowhere"))


def test_full_disk_leaves_nothing_behind(options, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint was not written"):
            train(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words", "absent"),
    [
        ({}, ["batch_size=4", "sequence_len=64", "device=cpu"], ["step_size", "search"]),
        (
            {"plan": "auto", "stage2": "kl", "recent_tokens": 8},
            ["step_size=1", "checkpoint_activations", "no search, such as local-0.5"],
            [],
        ),
    ],
)
def test_running_out_of_memory_says_what_to_lower(
    options, monkeypatch, tmp_path, changes, words, absent
):
    def load_model(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("echokv_vllm.train.run.load_model", load_model)
    with pytest.raises(ValueError, match="ran out of memory") as caught:
        train(dataclasses.replace(options, **changes))
    assert all(word in str(caught.value) for word in words)
    assert not any(word in str(caught.value) for word in absent)
    assert not any(tmp_path.iterdir())


def test_config_file_is_readable_json(options):
    train(options)
    with open(f"{options.out}/{CONFIG_FILE}") as file:
        assert json.load(file)["format"] == "echokv"


@pytest.mark.nightly
def test_reference_model_errors_are_those_of_the_study(shared_dir, tmp_path):
    """Closed-form errors at B=64 with long positions: K about .13, V about .22 (method.md 3, 4)."""
    result = train(
        TrainOptions(
            model=str(shared_dir / "ref_model"),
            data=str(shared_dir / "data" / "calibration.txt.xz"),
            out=str(tmp_path / "checkpoint"),
            plan="local-0.5",
            num_tokens=12 * 1024,
            max_position=131072,
            device="cpu",
            progress=False,
        )
    )
    assert 0.09 < result.mean_key_error < 0.20
    assert 0.15 < result.mean_value_error < 0.30
