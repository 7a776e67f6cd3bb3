"""Bytes of a row, and the report's two forms."""

import json

import pytest
from tiny_models import write_checkpoint, write_model

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.eval.divergence import Divergence
from echokv_vllm.eval.footprint import footprint
from echokv_vllm.eval.interval import Estimate
from echokv_vllm.eval.report import (
    divergence_rows,
    key_space,
    markdown,
    mean_row,
    row_head,
    task_row,
    write,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    model = write_model(folder / "model")
    return EchoCheckpoint.load(write_checkpoint(folder / "checkpoint", model))


def test_bytes_of_a_compressed_request(checkpoint):
    """4 layers, 4 KV heads of 32, half retained, bfloat16; both groups have blocks of 16 tokens."""
    slot = 2 * 32 * 2
    size = footprint(checkpoint, 1600, 128, itemsize=2)
    assert (size.full, size.retained) == (16 * slot, 8 * slot)
    # 100 retained blocks, and 1 sink + 8 window blocks of residuals, 16 tokens each
    assert size.at_length == (100 + 9) * 16 * 8 * slot / 1600
    assert size.maps == 4 * 2 * (2 * 64 * 32) * 2
    # An odd length rounds up to blocks; the window starts inside a block that stays.
    assert footprint(checkpoint, 1601, 128, 2).at_length == (101 + 1 + 9) * 16 * 8 * slot / 1601
    # A window that covers all is the full cache, in whole blocks.
    assert footprint(checkpoint, 320, 320, 2).at_length == size.full
    assert footprint(checkpoint, 320, 10_000, 2).at_length == size.full


def report_of(rows):
    return {
        "rows": rows, "settings": {"seed": 3}, "versions": {"torch": "2"}, "git_commit": "c0ffee",
        "date": "today", "command": "echokv eval",
    }  # fmt: skip


def test_table_and_json(checkpoint, tmp_path):
    size = footprint(checkpoint, 1600, 128, itemsize=2)
    head = row_head("some/folder/model", "local-0.5", key_space(64), 0.5, size, 1600)
    result = Divergence(
        100, Estimate(5.0, 4.5, 5.5), Estimate(5.1, 4.6, 5.6), Estimate(0.02, 0.01, 0.03),
        Estimate(0.961, 0.95, 0.97), Estimate(0.0107, 0.01, 0.0115),
    )  # fmt: skip
    rows = divergence_rows(head, result, 16)
    rows.append(task_row(head, "vt", [1.0, 0.5, 0.0, 1.0], [1.0, 1.0, 0.5, 1.0], seed=0))
    rows.append(task_row(row_head("m", "endpoint", "–", None, None, 1), "vt", [1, 1], None, 0))
    report = report_of(rows)
    text = markdown(report)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 1 + 6
    assert "| model | local-0.5 | B = 64 | 0.500 | 1,116 (2,048) | 1600 | perplexity | 16 " in text
    assert "5.100 [4.600, 5.600] | 5.000 [4.500, 5.500] |" in text
    assert "96.10 % [95.00, 97.00]" in text and "0.01070 [0.01000, 0.01150]" in text
    assert "62.50 % [" in text and "87.50 % [" in text
    assert rows[4]["difference"]["value"] == -0.25 and rows[4]["scores"] == [1.0, 0.5, 0.0, 1.0]
    assert "c0ffee" in text and "- seed: 3" in text

    json_file, markdown_file = write(report, str(tmp_path / "new" / "folder"))
    assert json.loads(json_file.read_text(encoding="utf-8")) == report
    assert markdown_file.read_text(encoding="utf-8") == text


def test_names_of_key_spaces():
    assert [key_space(block) for block in (0, 1, 256)] == ["absolute", "un-rotated", "B = 256"]


def test_a_mean_weighs_groups_alike_and_compares_the_same_prompts():
    head = row_head("m", "local-0.5", "–", 0.5, None, 100)
    easy, hard = [1.0] * 90, [0.0, 1.0] * 5
    row = mean_row(head, "mean of 2 tasks", [easy, hard], [easy, [1.0] * 10], seed=0)
    assert row["score"]["value"] == pytest.approx(0.75) and row["full"]["value"] == 1
    assert row["difference"]["value"] == pytest.approx(-0.25) and row["samples"] == 100
    share = row["share_of_full"]
    assert share["value"] == pytest.approx(0.75) and 0.5 < share["low"] < 0.7 < share["high"]
    # A hundred right answers do not show that all are.
    assert row["full"]["low"] == pytest.approx(0.025 ** (1 / 20))
    text = markdown(report_of([row]))
    assert "100.00 % [83.16, 100.00]; score is 75.00 % [" in text
    # Equal answers differ by little, however much the scores spread.
    same = mean_row(head, "mean", [hard, easy], [hard, easy], seed=0)["difference"]
    assert same["value"] == 0 and -0.17 < same["low"] < 0 < same["high"] < 0.17
    nothing = mean_row(head, "mean", [[0.0] * 4], [[0.0] * 4], seed=0)
    assert "share_of_full" not in nothing
    assert mean_row(head, "mean", [hard], None, 0)["full"] is None
