"""The checkpoint on disk: round trip, atomic writing, and a refusal for everything damaged."""

import dataclasses
import hashlib
import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from echokv_vllm.checkpoint import (
    CONFIG_FILE,
    REPORT_FILE,
    TENSOR_FILE,
    CheckpointError,
    EchoCheckpoint,
    LayerMaps,
)
from echokv_vllm.fingerprint import ModelFingerprint
from echokv_vllm.presets import preset_plan

_FINGERPRINT = ModelFingerprint(
    architecture="LlamaForCausalLM",
    num_layers=4,
    num_attention_heads=8,
    num_kv_heads=4,
    head_dim=8,
    hidden_size=64,
    rope={"rope_type": "default", "rope_theta": 1e4, "rotary_dim": 8},
    weights_sha256="ab" * 32,
)


def _checkpoint(plan_name="local-0.5", shards=1, bias=False, dtype=torch.float32, **changes):
    plan = preset_plan(plan_name, 4, 4, shards)
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    maps = {}
    for layer in range(4):
        num_discarded = len(plan.discarded(layer))
        if num_discarded:
            shape = num_discarded, len(plan.source_heads(layer, 0)) * 8, 8
            maps[layer] = LayerMaps(
                random(*shape),
                random(*shape),
                random(num_discarded, 8) if bias else None,
                random(num_discarded, 8) if bias else None,
            )
    settings = dict(
        plan=plan,
        rotation_block=64,
        maps=maps,
        fingerprint=_FINGERPRINT,
        recent_tokens=100,
        provenance={"command": "echokv train", "seed": 3},
    )
    return EchoCheckpoint(**{**settings, **changes})


def _rewrite_config(folder, **changes):
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def _rewrite_tensors(folder, change):
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE)
    payload = (folder / TENSOR_FILE).read_bytes()
    _rewrite_config(folder, tensors_sha256=hashlib.sha256(payload).hexdigest())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"plan_name": "paper-0.5"},
        {"plan_name": "paper-0.7", "bias": True},
        {"shards": 2, "dtype": torch.bfloat16},
        {"rotation_block": 0},
    ],
)
def test_round_trip(tmp_path, settings):
    saved = _checkpoint(**settings)
    folder = saved.save(tmp_path / "checkpoint", report="# table\n")
    assert {p.name for p in folder.iterdir()} == {CONFIG_FILE, TENSOR_FILE, REPORT_FILE}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"], "temporary folder left behind"
    loaded = EchoCheckpoint.load(folder)
    for name in ("plan", "rotation_block", "recent_tokens", "fingerprint", "provenance"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert sorted(loaded.maps) == sorted(saved.maps)
    for layer, maps in saved.maps.items():
        found = loaded.maps[layer].named()
        assert sorted(found) == sorted(maps.named())
        for name, tensor in maps.named().items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_tensor_bytes_are_as_documented(tmp_path):
    _checkpoint().save(tmp_path / "c")
    tensors = load_file(tmp_path / "c" / TENSOR_FILE)
    # 4 layers, K and V, 2 discarded heads, 2 source heads of 8, float32
    assert sum(t.nbytes for t in tensors.values()) == 4 * 2 * 2 * 16 * 8 * 4


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / CONFIG_FILE).unlink(), ["no echokv.json", "echokv train"]),
        (lambda f: (f / TENSOR_FILE).unlink(), ["no echokv.safetensors", "incomplete"]),
        (lambda f: (f / CONFIG_FILE).write_text("{"), ["echokv.json", "damaged"]),
        (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), ["damaged"]),
        (lambda f: (f / CONFIG_FILE).write_text("[]"), ["not of format 'echokv'"]),
        (lambda f: _rewrite_config(f, format="other"), ["not of format 'echokv'"]),
        (lambda f: _rewrite_config(f, format_version=2), ["format_version 2", "reads 1"]),
        (lambda f: _rewrite_config(f, surprise=1), ["surprise"]),
        (lambda f: _rewrite_config(f, plan=...), ["has keys"]),
        (lambda f: _rewrite_config(f, plan={}), ["bad plan", "missing keys"]),
        (lambda f: _rewrite_config(f, fingerprint={}), ["fingerprint"]),
        (lambda f: _rewrite_config(f, provenance=3), ["provenance"]),
        (lambda f: _rewrite_config(f, rotation_block=-1), ["rotation_block=-1"]),
        (lambda f: _rewrite_config(f, rotation_block="64"), ["rotation_block='64'"]),
        (lambda f: _rewrite_config(f, recent_tokens=1.5), ["recent_tokens=1.5"]),
        (
            lambda f: (f / TENSOR_FILE).write_bytes((f / TENSOR_FILE).read_bytes()[:-1] + b"\x07"),
            ["SHA-256", "damaged"],
        ),
        (
            lambda f: (
                (f / TENSOR_FILE).write_bytes(b"junk"),
                _rewrite_config(f, tensors_sha256=hashlib.sha256(b"junk").hexdigest()),
            ),
            ["not a safetensors file"],
        ),
        (
            lambda f: _rewrite_tensors(f, lambda t: t.pop("layers.2.value")),
            ["layer 2 lacks ['value']"],
        ),
        (
            lambda f: _rewrite_tensors(
                f, lambda t: [t.pop("layers.2.value"), t.pop("layers.2.key")]
            ),
            ["layers [0, 1, 2, 3]", "[0, 1, 3]"],
        ),
        (
            lambda f: _rewrite_tensors(f, lambda t: t.update(stray=torch.zeros(1))),
            ["foreign tensor 'stray'"],
        ),
        (
            lambda f: _rewrite_tensors(
                f, lambda t: t.update({"layers.1.key": torch.zeros(2, 8, 8)})
            ),
            ["layer 1 key", "(2, 8, 8)", "(2, 16, 8)"],
        ),
        (
            lambda f: _rewrite_tensors(
                f, lambda t: t.update({"layers.1.key": t["layers.1.key"].double()})
            ),
            ["layer 1 key", "float64"],
        ),
        (
            lambda f: _rewrite_tensors(f, lambda t: t["layers.3.value"].fill_(float("nan"))),
            ["layer 3 value", "NaN"],
        ),
        (
            lambda f: _rewrite_tensors(
                f, lambda t: t["layers.3.value"].view(-1)[5:6].fill_(float("inf"))
            ),
            ["layer 3 value", "infinite"],
        ),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage, words):
    folder = _checkpoint().save(tmp_path / "c")
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        EchoCheckpoint.load(folder)
    for word in words:
        assert word in str(caught.value)


def test_absent_folder_and_foreign_names(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no checkpoint folder .*owner/name"):
        EchoCheckpoint.load(tmp_path / "absent")
    folder = _checkpoint().save(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"revision='main'.*drop the revision"):
        EchoCheckpoint.load(folder, revision="main")


def test_repo_ids_go_to_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    saved = _checkpoint()
    folder = saved.save(tmp_path / "c")
    calls = []

    def download(repo_id, revision=None, allow_patterns=None):
        calls.append((repo_id, revision, allow_patterns))
        if repo_id != "owner/maps":
            raise LocalEntryNotFoundError("offline")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert EchoCheckpoint.load("owner/maps", revision="v1").plan == saved.plan
    assert calls == [("owner/maps", "v1", [CONFIG_FILE, TENSOR_FILE])]
    with pytest.raises(CheckpointError, match=r"owner/none.*hub: offline"):
        EchoCheckpoint.load("owner/none")


def test_check_model_names_both_values(tmp_path):
    checkpoint = _checkpoint()
    checkpoint.check_model(_FINGERPRINT)
    checkpoint.check_model(dataclasses.replace(_FINGERPRINT, weights_sha256=None))
    other = dataclasses.replace(
        _FINGERPRINT, hidden_size=128, rope={"rope_type": "linear"}, weights_sha256="cd" * 32
    )
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_model(other)
    for word in ("hidden_size: checkpoint 64, model 128", "linear", "abab", "cdcd"):
        assert word in str(caught.value)
    assert "head_dim" not in str(caught.value)


def test_plan_of_another_shape_is_refused():
    with pytest.raises(CheckpointError, match=r"num_layers=4 .* num_layers=5"):
        _checkpoint(fingerprint=dataclasses.replace(_FINGERPRINT, num_layers=5))


def test_save_never_destroys(tmp_path):
    checkpoint = _checkpoint()
    folder = tmp_path / "c"
    folder.mkdir()
    checkpoint.save(folder)  # an empty folder is fine
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        checkpoint.save(folder)
    _checkpoint(rotation_block=7).save(folder, overwrite=True)
    assert EchoCheckpoint.load(folder).rotation_block == 7
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"other files \(thesis\.txt\)"):
        checkpoint.save(folder, overwrite=True)
    assert (folder / "thesis.txt").exists()
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.save(folder / "thesis.txt")


def test_links_and_the_working_directory_name_the_folder(tmp_path, monkeypatch):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    assert _checkpoint().save(link) == real
    _checkpoint(rotation_block=7).save(link, overwrite=True)
    assert EchoCheckpoint.load(real).rotation_block == 7
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]

    monkeypatch.chdir(real)
    assert _checkpoint(rotation_block=9).save(".", overwrite=True) == real
    monkeypatch.chdir(tmp_path)
    assert EchoCheckpoint.load(real).rotation_block == 9


def test_mount_points_cannot_be_replaced():
    with pytest.raises(CheckpointError, match=r"'/proc' is a mount point.* inside it"):
        _checkpoint().save("/proc", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk_leaves_no_half_checkpoint(tmp_path, overwrite):
    folder = tmp_path / "c"
    if overwrite:
        _checkpoint(rotation_block=7).save(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Stops the write inside the tensor file with a real OSError of the operating system.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint"):
            _checkpoint().save(folder, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == (["c"] if overwrite else [])
    if overwrite:
        assert EchoCheckpoint.load(folder).rotation_block == 7


def test_failed_rename_restores_the_old_checkpoint(tmp_path, monkeypatch):
    folder = _checkpoint(rotation_block=7).save(tmp_path / "c")
    path_class = type(folder)
    rename = path_class.rename

    def refuse_new(self, target):
        if ".new-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(path_class, "rename", refuse_new)
    with pytest.raises(OSError, match="Input/output error"):
        _checkpoint().save(folder, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert EchoCheckpoint.load(folder).rotation_block == 7
