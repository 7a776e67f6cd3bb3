"""Where a run writes: what would fail at its end, or lose something, is refused at its start."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.durable import try_folder
from echokv_vllm.train import TrainOptions, train


@pytest.fixture
def options(model_folder, corpus, tmp_path):
    return TrainOptions(
        model=model_folder,
        data=corpus,
        out=str(tmp_path / "checkpoint"),
        plan="local-0.5",
        sequence_len=64,
        max_position=256,
        device="cpu",
        stage2="none",
        progress=False,
    )


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be read or computed before the refusal."""

    def work(*arguments):
        raise AssertionError("work was begun")

    for name in ("load_config", "load_tokens", "load_model"):
        monkeypatch.setattr(f"echokv_vllm.train.run.{name}", work)


@pytest.mark.parametrize("name", ["curves", "tensorboard"])
@pytest.mark.parametrize("inside", ["", "/losses", "/deep/losses", "/../linked/losses"])
def test_curves_in_the_checkpoint_folder_are_refused(options, tmp_path, no_work, name, inside):
    (tmp_path / "linked").symlink_to(options.out)
    changes = {name: options.out + inside}
    with pytest.raises(ValueError, match="replaced as a whole") as caught:
        train(dataclasses.replace(options, **changes))
    for word in (f"{name}={options.out + inside!r}", f"out={options.out!r}", "outside"):
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["linked"]


def test_curves_file_where_a_folder_must_be_is_refused(options, tmp_path, no_work):
    out, curves = str(tmp_path / "runs" / "checkpoint"), str(tmp_path / "runs")
    with pytest.raises(ValueError, match="name another file") as caught:
        train(dataclasses.replace(options, out=out, curves=curves))
    assert repr(out) in str(caught.value) and repr(curves) in str(caught.value)


def test_curves_beside_the_checkpoint_are_written(options, tmp_path):
    changes = {"curves": f"{options.out}.csv", "stage2": "o-mse", "stage2_steps": 1}
    train(dataclasses.replace(options, **changes, recent_tokens=8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "checkpoint.csv"]


def test_mount_points_are_refused(options, no_work):
    with pytest.raises(ValueError, match=r"'/proc' is a mount point.*'/proc/checkpoint'"):
        train(dataclasses.replace(options, out="/proc"))


@pytest.mark.parametrize("out", ["/proc/checkpoint", "/proc/absent/checkpoint"])
def test_unwritable_places_are_refused(options, no_work, out):
    with pytest.raises(OSError, match=r"nothing was started.*parent can be written to") as caught:
        train(dataclasses.replace(options, out=out))
    assert caught.value.filename == out


@pytest.mark.parametrize("which", ["checkpoint", "trial"])
def test_folders_that_cannot_be_renamed_are_refused(options, tmp_path, monkeypatch, which):
    """As over a mount that is not recognised, or in an object store that is mounted."""
    train(options)
    rename = Path.rename

    def refuse(self, target):
        if (self.name == "checkpoint") == (which == "checkpoint"):
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr("echokv_vllm.train.run.load_model", None)
    with pytest.raises(OSError, match=r"busy; .*nothing was started; .*can be renamed"):
        train(dataclasses.replace(options, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    EchoCheckpoint.load(options.out)


def test_a_folder_that_cannot_be_renamed_back_is_named(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    rename = Path.rename

    def refuse(self, target):
        if ".old-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="what was there is now") as caught:
        try_folder(tmp_path / "checkpoint", "the checkpoint")
    (left,) = tmp_path.iterdir()
    assert str(left) in str(caught.value)


def test_the_trial_leaves_no_trace(tmp_path):
    present = tmp_path / "present"
    present.mkdir()
    (present / "file").write_text("kept")
    before = present.stat().st_ino
    for target in (present, tmp_path / "absent", tmp_path / "deep" / "absent"):
        try_folder(target, "the checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["present"]
    assert (present / "file").read_text() == "kept" and present.stat().st_ino == before


def test_a_link_is_followed(options, tmp_path):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    result = train(dataclasses.replace(options, out=str(link)))
    assert result.folder == real and link.is_symlink()
    train(dataclasses.replace(options, out=str(link), overwrite=True, rotation_block=1))
    assert EchoCheckpoint.load(link).rotation_block == 1 and link.resolve() == real
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_a_link_that_leads_nowhere_is_refused(options, tmp_path, no_work):
    os.symlink(tmp_path / "b", tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="leads back to itself"):
        train(dataclasses.replace(options, out=str(tmp_path / "a")))
