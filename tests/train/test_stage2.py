"""Whole runs with gradient descent: losses fall, runs repeat, resume and fail as they should."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import resource
import shutil
import sys

import pytest
import torch

from echokv_vllm.checkpoint import CURVES_FILE, TENSOR_FILE, EchoCheckpoint
from echokv_vllm.cli import main as cli
from echokv_vllm.fingerprint import weights_sha256
from echokv_vllm.presets import preset_plan
from echokv_vllm.train import TrainOptions, train
from echokv_vllm.train import run as train_run
from echokv_vllm.train.descent import DivergenceError, Training
from echokv_vllm.train.stages import tensor_cores

STATE = ".checkpoint.training"


@pytest.fixture
def options(model_folder, corpus, tmp_path):
    return TrainOptions(
        model=model_folder,
        data=corpus,
        out=str(tmp_path / "checkpoint"),
        plan="local-0.5",
        rotation_block=16,
        sequence_len=64,
        num_tokens=64 * 60,
        max_position=256,
        recent_tokens=8,
        stage2="o-mse",
        stage2_steps=40,
        learning_rate=2e-2,
        num_queries=24,
        save_every=10,
        seed=4,
        device="cpu",
        progress=False,
    )


def _sha(folder):
    with open(f"{folder}/{TENSOR_FILE}", "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({}, 0.97),
        ({"whiten": False}, 0.97),
        ({"bias": True, "plan": "paper-0.5"}, 0.97),
        ({"stage2": "kl"}, 0.99),
        ({"stage2": "kl", "checkpoint_activations": True, "step_size": 2}, 0.99),
        ({"stage2": "kl", "kv_cache_dtype": "int4"}, 0.99),
        ({"stage2": "o-mse", "residual_bits": 2}, 1.0),
        ({"stage2": "o-mse", "kv_cache_dtype": "fp8", "plan": "local-0.5", "shards": 2}, 0.97),
        ({"stage2": "qk-kl"}, 0.997),
        ({"dtype": "bfloat16"}, 0.98),
    ],
)
def test_stage2_lowers_the_heldout_loss(options, changes, least):
    options = dataclasses.replace(options, **changes)
    if options.stage2 in ("kl", "qk-kl"):  # steeper where the model is random
        options = dataclasses.replace(options, learning_rate=3e-3)
    result = train(options)
    (descent,) = result.descents
    assert (descent.loss, descent.steps) == (options.stage2, 40)
    assert descent.mean_final <= least * descent.mean_initial
    for group, final in descent.final.items():
        assert final <= descent.initial[group]
    assert f"II, {options.stage2}, 40 steps" in result.checkpoint.provenance["stage"]
    record = result.checkpoint.provenance["descents"][0]
    assert record == dataclasses.asdict(descent)
    assert f"| {next(iter(descent.initial))} |" in result.report
    assert EchoCheckpoint.load(options.out).provenance["stage"].startswith("I, closed form; II")


def test_curves_are_in_the_checkpoint_and_in_a_file_of_their_own(options, tmp_path):
    curves = tmp_path / "deeper" / "curves.csv"
    result = train(dataclasses.replace(options, curves=str(curves)))
    text = curves.read_text()
    assert text == (result.folder / CURVES_FILE).read_text()
    rows = list(csv.DictReader(text.splitlines()))
    training = [row for row in rows if row["tokens"] == "training"]
    assert [int(row["step"]) for row in training] == list(range(40))
    assert float(training[0]["learning_rate"]) == pytest.approx(2e-2)
    assert float(training[20]["learning_rate"]) == pytest.approx(1e-2)
    heldout = [row for row in rows if (row["tokens"], row["group"]) == ("held-out", "layer 2")]
    assert [int(row["step"]) for row in heldout] == [0, 20, 40]
    final = result.descents[0].final["layer 2"]
    assert min(float(row["value"]) for row in heldout) == final


def test_maps_that_get_worse_are_not_kept(options, tmp_path):
    first = train(dataclasses.replace(options, stage2="none", out=str(tmp_path / "first")))
    worse = train(dataclasses.replace(options, stage2="kl", learning_rate=3.0))
    assert worse.descents[0].best_step == {"model": 0}
    for layer, maps in first.checkpoint.maps.items():
        torch.testing.assert_close(maps.key, worse.checkpoint.maps[layer].key, rtol=1e-4, atol=1e-5)
    assert worse.mean_value_error == pytest.approx(first.mean_value_error, rel=1e-4)


def test_stage1_by_descent_approaches_the_closed_form(options, tmp_path):
    exact = train(dataclasses.replace(options, stage2="none"))
    options = dataclasses.replace(options, stage1="sgd", stage2="none", stage1_steps=300)
    result = train(dataclasses.replace(options, out=str(tmp_path / "sgd")))
    (descent,) = result.descents
    assert descent.loss == "kv-mse" and descent.mean_initial == pytest.approx(2.0, rel=1e-4)
    both = result.mean_key_error + result.mean_value_error
    assert descent.mean_final == pytest.approx(both, rel=0.1)
    assert both == pytest.approx(exact.mean_key_error + exact.mean_value_error, rel=0.1)
    assert result.checkpoint.provenance["stage"] == "I, kv-mse, 300 steps"
    assert result.checkpoint.provenance["ridges"] == {}


def test_ridge_is_chosen_on_heldout_tokens(options, tmp_path):
    options = dataclasses.replace(options, stage2="none")
    chosen = train(options)
    ridges = chosen.checkpoint.provenance["ridges"]
    assert sorted(ridges) == ["0", "1", "2"]
    for ridge in (1e-7, 1e-4, 1e-1):
        fixed = train(dataclasses.replace(options, ridge=ridge, out=str(tmp_path / f"r{ridge}")))
        for layer, found in chosen.errors.items():
            assert found.key <= fixed.errors[layer].key * (1 + 1e-6)
            assert found.value <= fixed.errors[layer].value * (1 + 1e-6)


@pytest.mark.parametrize("stage2", ["o-mse", "kl"])
def test_same_seed_same_bytes(options, tmp_path, stage2):
    shas = []
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        out = str(tmp_path / name)
        train(dataclasses.replace(options, out=out, seed=seed, stage2=stage2, stage2_steps=12))
        shas.append(_sha(out))
    assert shas[0] == shas[1] != shas[2]


def _interrupt(monkeypatch, stage, at):
    """Let the run stop before step `at` of a stage; returns the way to undo it."""
    original = Training._take

    def take(self, step):
        if (self._settings.stage, step) == (stage, at):
            raise KeyboardInterrupt
        return original(self, step)

    context = monkeypatch.context()
    patch = context.__enter__()
    patch.setattr(Training, "_take", take)
    return lambda: context.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("changes", "stage", "at"),
    [
        ({}, "II", 17),
        ({}, "II", 0),
        ({"stage2": "kl"}, "II", 39),
        ({"stage2": "qk-kl", "whiten": False}, "II", 25),
        ({"stage1": "sgd", "stage1_steps": 30}, "I", 23),
        ({"stage1": "sgd", "stage1_steps": 30, "bias": True}, "II", 12),
    ],
)
def test_resumed_runs_end_like_uninterrupted_ones(
    options, tmp_path, monkeypatch, changes, stage, at
):
    options = dataclasses.replace(options, **changes)
    whole = train(dataclasses.replace(options, out=str(tmp_path / "whole")))
    undo = _interrupt(monkeypatch, stage, at)
    with pytest.raises(KeyboardInterrupt):
        train(options)
    undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [STATE, "whole"]
    resumed = train(dataclasses.replace(options, resume=True, progress=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "whole"]
    assert _sha(options.out) == _sha(tmp_path / "whole")
    assert resumed.descents == whole.descents and resumed.errors == whole.errors
    assert (resumed.folder / CURVES_FILE).read_text() == (
        tmp_path / "whole" / CURVES_FILE
    ).read_text()
    assert resumed.checkpoint.provenance["ridges"] == whole.checkpoint.provenance["ridges"]


@pytest.fixture
def interrupted(options, monkeypatch):
    undo = _interrupt(monkeypatch, "II", 15)
    with pytest.raises(KeyboardInterrupt):
        train(options)
    undo()
    return options


def test_other_options_cannot_resume(interrupted, corpus, tmp_path):
    resume = dataclasses.replace(interrupted, resume=True)
    for changes, words in (
        ({"learning_rate": 0.5}, ["learning_rate was 0.02 and is now 0.5"]),
        ({"stage2": "kl"}, ["stage2 was 'o-mse' and is now 'kl'"]),
        ({"num_tokens": 2048, "bias": True}, ["num_tokens", "bias", "data tokens"]),
    ):
        with pytest.raises(ValueError) as caught:
            train(dataclasses.replace(resume, **changes))
        for word in [*words, "overwrite"]:
            assert word in str(caught.value)
    # What does not touch the result may change.
    train(dataclasses.replace(resume, save_every=7, curves=str(tmp_path / "curves.csv")))
    assert (tmp_path / "curves.csv").read_text().count("training") == 40


def test_an_edited_plan_file_cannot_resume(options, tmp_path, monkeypatch):
    """Maps that were trained so far belong to the heads of the plan as it was."""
    file = tmp_path / "plan.json"
    options = dataclasses.replace(options, plan=str(file))
    content = preset_plan("local-0.5", 3, 4).to_dict()
    file.write_text(json.dumps(content))
    undo = _interrupt(monkeypatch, "II", 15)
    with pytest.raises(KeyboardInterrupt):
        train(options)
    undo()
    edited = json.loads(json.dumps(content))
    edited["layers"][1] = {"retained": [2, 3], "sources": [{"layer": 1, "heads": [2, 3]}]}
    file.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"\(plan content .* was '\w+' and is now '\w+'\)"):
        train(dataclasses.replace(options, resume=True))
    file.write_text(json.dumps(content, indent=2))  # the same plan, written otherwise
    train(dataclasses.replace(options, resume=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "plan.json"]


def test_an_unfinished_run_is_not_lost_by_accident(interrupted, tmp_path):
    with pytest.raises(ValueError, match=r"unfinished training run.*resume.*overwrite"):
        train(interrupted)
    assert (tmp_path / STATE).exists()
    train(dataclasses.replace(interrupted, overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_damaged_states_are_named(interrupted, tmp_path):
    (tmp_path / STATE).write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"training state .* cannot be read"):
        train(dataclasses.replace(interrupted, resume=True))


def test_resume_without_a_state_starts_anew(options, capsys):
    options = dataclasses.replace(options, resume=True, progress=True, stage2_steps=2)
    train(options)
    assert "starting anew" in capsys.readouterr().err


def test_weights_that_come_with_the_model_are_known(
    options, tmp_path, tiny_model, save_model, monkeypatch
):
    """A repo id on first use: config and tokenizer are fetched first, weights when it is loaded."""
    model = tmp_path / "model"
    save_model(tiny_model(), model)
    (model / "model.safetensors").rename(tmp_path / "hub.safetensors")
    options = dataclasses.replace(options, model=str(model))
    load = train_run.load_model

    def fetch_and_load(*arguments):
        shutil.copy(tmp_path / "hub.safetensors", model / "model.safetensors")
        return load(*arguments)

    monkeypatch.setattr(train_run, "load_model", fetch_and_load)
    undo = _interrupt(monkeypatch, "II", 15)
    with pytest.raises(KeyboardInterrupt):
        train(options)
    undo()
    resumed = train(dataclasses.replace(options, resume=True))
    assert resumed.checkpoint.fingerprint.weights_sha256 == weights_sha256(model, 3) is not None


def _nan_at(monkeypatch, step):
    from echokv_vllm.train.layerwise import LayerwiseAttention

    original, calls = LayerwiseAttention.losses, []

    def losses(self, ids, offsets, generator, learn):
        found = original(self, ids, offsets, generator, learn)
        calls.append(learn)
        if calls.count(True) > step:
            found["layer 1"] = found["layer 1"] * float("nan")
        return found

    monkeypatch.setattr(LayerwiseAttention, "losses", losses)


def test_divergence_is_an_error_and_leaves_nothing(options, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _nan_at(patch, 12)
        with pytest.raises(DivergenceError) as caught:
            train(options)
        for word in ("stage II", "o-mse of the layer 1 is nan", "12 steps", "learning_rate=0.02"):
            assert word in str(caught.value)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(DivergenceError, match=r"diverged"):
        train(dataclasses.replace(options, learning_rate=1e30))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_last_state(options, tmp_path, monkeypatch):
    """First while the state is saved, then while the checkpoint is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="training state was not saved"):
            train(options)
        assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EchoCheckpoint, "save", refuse)
        with pytest.raises(OSError, match="No space left"):
            train(options)
    assert [p.name for p in tmp_path.iterdir()] == [STATE]
    train(dataclasses.replace(options, resume=True))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage1": "adam"}, ["stage1='adam'", "closed-form, sgd"]),
        ({"stage2": "mse"}, ["stage2='mse'", "qk-kl"]),
        ({"stage2_steps": 0}, ["stage2_steps=0"]),
        ({"learning_rate": 0.0}, ["learning_rate=0.0"]),
        ({"kv_cache_dtype": "int3"}, ["'int3'", "fp8"]),
        ({"residual_bits": 4}, ["residual_bits=4"]),
        ({"recent_tokens": 60}, ["sequence_len=64", "recent_tokens=60", "stage2=none"]),
    ],
)
def test_bad_options(options, tmp_path, changes, words):
    with pytest.raises(ValueError) as caught:
        train(dataclasses.replace(options, **changes))
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_must_be_installed(options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("echokv_vllm.train.run.load_model", None)  # said before it is loaded
    with pytest.raises(ValueError, match=r"needs the package tensorboard"):
        train(dataclasses.replace(options, tensorboard=str(tmp_path / "board")))
    assert list(tmp_path.iterdir()) == []


def test_tensor_cores_are_for_stage2_on_a_gpu_alone(options, monkeypatch):
    seen = []
    run = Training.run

    def noting(self, *args):
        seen.append((self._settings.stage, torch.get_float32_matmul_precision()))
        return run(self, *args)

    monkeypatch.setattr(Training, "run", noting)
    options = dataclasses.replace(
        options, stage1="sgd", stage1_steps=1, stage2_steps=1, whiten=False
    )
    train(dataclasses.replace(options, stage2="kl"))
    assert seen == [("I", "highest"), ("II", "highest")], "a CPU stays exact"
    with pytest.raises(RuntimeError), tensor_cores(True):
        assert torch.get_float32_matmul_precision() == "high"
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "highest"


def test_auto_is_no_stage2_on_a_cpu(options):
    result = train(dataclasses.replace(options, stage2="auto"))
    assert result.descents == () and result.checkpoint.provenance["stage"] == "I, closed form"
    assert not (result.folder / CURVES_FILE).exists()


def test_command_line(options, model_folder, corpus, tmp_path, capsys):
    arguments = [
        "train", model_folder, "--data", corpus, "--out", options.out, "--sequence-len", "64",
        "--device", "cpu", "--stage1", "sgd", "--stage1-steps", "2", "--stage2", "kl",
        "--stage2-steps", "2", "--recent-tokens", "8", "--learning-rate", "1e-3", "--no-whiten",
        "--resume",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "stage II, kl" in printed.err and "step" in printed.err
    assert "# Held-out loss: kl, 2 steps" in printed.out
    record = json.loads((tmp_path / "checkpoint" / "echokv.json").read_text())["provenance"]
    assert record["stage"] == "I, kv-mse, 2 steps; II, kl, 2 steps"
    assert record["options"]["learning_rate"] == 1e-3
