"""The driver from its command line to its report, on a tiny model."""

import json
import sys

import pytest
from tiny_models import write_model

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.quantization import bytes_per_number


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    import random

    rng = random.Random(14)
    documents = ["".join(chr(rng.randrange(33, 127)) for _ in range(300)) for _ in range(60)]
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\x1e".join(documents), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(tmp_path, corpus, monkeypatch, capsys):
    # As many hidden numbers as keys: with fewer, keys of lower rank would be exact.
    model = str(
        write_model(tmp_path / "model", num_kv_heads=8, num_attention_heads=16, hidden_size=256)
    )

    def call(only, *more):
        import compare

        out = tmp_path / "out"
        arguments = [
            "compare.py", model, "--calibration", corpus, "--heldout", corpus, "--out", str(out),
            "--device", "cpu", "--samples", "3", "--length", "48", "--offset-max", "500",
            "--num-tokens", "6000", "--calibration-tokens", "3000", "--stage2-steps", "2",
            "--train-option", "stage1_steps=2", "--train-option", "sequence_len=48",
            "--train-option", "ridge=1e-4", "--only", only, *more,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(compare, "WINDOW", compare.Window(2, 8))
        compare.main()
        capsys.readouterr()
        return out, json.loads((out / "quality.json").read_text())

    return call


@pytest.mark.slow
def test_rows_are_trained_measured_and_written(run):
    only = (
        "paper-0.5, un-rotated, closed form;low rank 0.5;eviction 0.25;nearest head 0.5;"
        "ThinK keys 0.75;: full cache;hybrid-0.5, closed form;global only 0.75, KV-MSE"
    )
    out, report = run(only)
    rows = {row["name"]: row for row in report["rows"]}
    assert not report["missing"] and len(rows) == 3 + 3 + 2 + 2 + 2 + 4 + 1 + 1
    for name, row in rows.items():
        assert 0 < row["kl"]["low"] <= row["kl"]["value"] <= row["kl"]["high"], name
        assert row["perplexity_full"] == rows["eviction 0.25"]["perplexity_full"]
    assert rows["full cache, fp8"]["kl"]["value"] < rows["full cache, int4"]["kl"]["value"]
    exact = rows["full cache, int4, exact window"]
    assert exact["kl"]["value"] < rows["full cache, int4"]["kl"]["value"]
    text = (out / "quality.md").read_text()
    assert all(f"| {name} |" in text for name in rows)

    full = 2 * 4 * 8 * 32 * 2  # bytes of a token: K and V, 4 layers, 8 heads of 32, 16 bits
    half = rows["paper-0.5, un-rotated, closed form"]
    assert (half["ratio"], half["bytes_per_token"]) == (0.5, full / 2)
    assert half["full_bytes_per_token"] == full and half["maps"] == "I, closed form"
    for part in ("keys", "values"):  # the other part is exact
        alone = rows[f"paper-0.5, un-rotated, closed form, {part} alone"]
        assert alone["ratio"] == 0.75 and alone["kl"]["value"] < half["kl"]["value"]
    int4 = rows["full cache, int4"]
    assert int4["ratio"] == bytes_per_number("int4", 32) / 2 and int4["ratio_d128"] == 68 / 256
    assert rows["ThinK keys 0.75, channels by each prompt"]["ratio"] == 0.75
    assert rows["hybrid-0.5, closed form"]["ratio"] == 0.5
    assert rows["global only 0.75, KV-MSE by AdamW"]["ratio"] == 0.75
    assert half["ratio_at_4096"] == pytest.approx(0.5 + 0.5 * 10 / 4096)

    # A second run finds the checkpoint and gives the same numbers.
    made = (out / "checkpoints" / "paper-0.5-b1-closedform" / "echokv.json").stat().st_mtime_ns
    _, again = run("paper-0.5, un-rotated, closed form;eviction 0.25")
    assert {row["name"]: row["kl"] for row in again["rows"]} == {
        row["name"]: rows[row["name"]]["kl"] for row in again["rows"]
    }
    # An earlier report is extended by what it lacks; other settings are refused.
    earlier = str(out / "quality.json")
    _, more = run("paper-0.5, un-rotated, closed form;nearest head 0.5", "--extend", earlier)
    assert [row["name"] for row in more["rows"]] == [
        "paper-0.5, un-rotated, closed form", "paper-0.5, un-rotated, closed form, keys alone",
        "paper-0.5, un-rotated, closed form, values alone", "nearest head 0.5, scaled",
        "nearest head 0.5", "eviction 0.25", "eviction 0.25, shared budgets",
    ]  # fmt: skip
    assert more["rows"][0] == again["rows"][0] and len(more["extends"]) == 1
    with pytest.raises(ValueError, match="position offsets up to 500, this run has 400"):
        run("nearest head", "--extend", earlier, "--offset-max", "400")
    stamp = (out / "checkpoints" / "paper-0.5-b1-closedform" / "echokv.json").stat().st_mtime_ns
    assert stamp == made


def test_a_training_that_fails_is_reported_and_the_others_go_on(run):
    _, report = run(
        "local-0.25, B = 64, closed form;nearest head 0.25, scaled", "--train-option", "ridge=-1"
    )
    assert [row["name"] for row in report["rows"]] == ["nearest head 0.25, scaled"]
    assert "ridge=-1" in report["missing"]["local-0.25, B = 64, closed form"]
    _, report = run("local-0.25, B = 64, closed form", "--train-seconds", "-1")
    assert "time" in report["missing"]["local-0.25, B = 64, closed form"]


def test_an_extended_report_keeps_the_tasks_of_the_earlier_one(run, monkeypatch):
    import compare

    def measure_tasks(bench, caches, essays, lengths, num_samples, seed):
        row = {
            "mean": {"value": 0.5, "low": 0.4, "high": 0.6}, "share_of_full": 1.0,
            "difference": {"value": 0.0, "low": 0.0, "high": 0.0}, "tasks": {"vt 700": 0.5},
        }  # fmt: skip
        settings = {"tasks": ["vt"], "lengths": lengths, "prompts of each": num_samples}
        settings["essay haystack"] = "generated sentences"
        yield {"settings": settings, "rows": {name: row for name in ("full", *caches)}}

    monkeypatch.setattr(compare, "measure_tasks", measure_tasks)
    tasks = ("--tasks", "--task-lengths", "700", "--task-samples", "4")
    out, first = run("eviction 0.25;eviction 0.5", *tasks, "--task-rows", "eviction 0.25")
    assert list(first["tasks"]["rows"]) == [
        "full", "eviction 0.25", "eviction 0.25, shared budgets",
    ]  # fmt: skip
    earlier = ("--extend", str(out / "quality.json"))
    _, more = run("eviction 0.5, shared", *tasks, *earlier)
    assert list(more["tasks"]["rows"]) == [
        *first["tasks"]["rows"], "eviction 0.5, shared budgets",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"have lengths \[700\], this run has \[800\]"):
        run("eviction 0.5", "--tasks", "--task-lengths", "800", "--task-samples", "4", *earlier)


def test_rows_share_plans_and_maps():
    from rows import all_rows

    rows = all_rows(10, 12, 8)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    trained = {row.maps.name: row.maps for row in rows if row.maps}
    for row in rows:
        if row.maps is None:
            continue
        assert trained[row.maps.name] == row.maps, "one name, one set of options"
        if row.maps.plan_of:
            assert trained[row.maps.plan_of].plan_of is None
    ratios = {
        plan.name: plan.ratio for plan in (m.options.get("plan") for m in trained.values())
        if not isinstance(plan, str | None)
    }  # fmt: skip
    assert ratios == {
        "local-and-global": 0.75, "global-only": 0.75, "local-only": 0.75,
    }  # fmt: skip


@pytest.mark.slow
def test_plans_of_other_maps_are_used(run, tmp_path, corpus):
    """Stage II and formats train the plan that the closed form of their ratio found."""
    from rows import Maps
    from training import ensure

    out, _ = run("local-0.25, B = 64, closed form")
    folder = out / "checkpoints"
    options = {
        "model": str(tmp_path / "model"), "data": corpus, "sequence_len": 48,
        "num_tokens": 6000, "ridge": 1e-4, "stage2": "none", "device": "cpu",
    }  # fmt: skip
    maps = Maps("other", {"plan": "local-0.5"}, "local-0.25-b64-closed")
    assert ensure([maps], folder, options, 1, 1e6) == {}
    assert EchoCheckpoint.load(folder / "other").plan.ratio == 0.25
