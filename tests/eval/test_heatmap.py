"""The needle heat map: cells, tables, picture, and the way to it from the command line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from echokv_vllm import needle
from echokv_vllm.cli import main as cli
from echokv_vllm.eval.heatmap import Grid, draw, even_lengths, heatmap_data, heatmap_markdown
from echokv_vllm.eval.tasks import Material

GRID = Grid((400, 800), 3, 2)


def count_tokens(text):
    return 1 + needle.estimate_tokens(text)


def test_cells_hold_the_needle_at_their_depth():
    cells = GRID.prompts(Material(count_tokens), seed=3)
    assert list(cells) == [(row, column) for row in (0, 1) for column in (0, 1, 2)]
    for (row, column), prompts in cells.items():
        assert len(prompts) == 2 and prompts[0].text != prompts[1].text
        for prompt in prompts:
            hay = prompt.text.split("\n")[1]
            place = hay.index("One of the special magic") / len(hay)
            assert place == pytest.approx(GRID.depths[column], abs=0.12)
            used = count_tokens(prompt.text) + prompt.max_new_tokens
            assert GRID.lengths[row] - 60 <= used <= GRID.lengths[row]
    assert cells[0, 0][0].references == cells[0, 2][0].references, "a column differs in depth only"
    assert cells == GRID.prompts(Material(count_tokens), seed=3)


def test_default_lengths_reach_the_context():
    assert even_lengths(4096) == (512, 1024, 1536, 2048, 2560, 3072, 3584, 4096)
    assert even_lengths(1000)[-1] == 1000 and even_lengths(1000)[0] == 64
    assert even_lengths(100) == (64, 100)


def scores():
    cells = [(row, column) for row in (0, 1) for column in (0, 1, 2)]
    return {
        cell: {"full": [1.0, 1.0], "compressed": [1.0, float(index % 2)]}
        for index, cell in enumerate(cells)
    }


def test_matrix_and_tables():
    heatmap = heatmap_data(GRID, scores(), "local-0.5")
    assert heatmap["scores"] == {
        "full": [[1.0] * 3] * 2,
        "compressed": [[0.5, 1.0, 0.5], [1.0, 0.5, 1.0]],
    }
    lines = heatmap_markdown(heatmap)
    assert "## Needle heat map, full: mean 100.00 %" in lines
    assert "## Needle heat map, compressed: mean 75.00 %" in lines
    assert (
        "| 800 | 100 | 50 | 100 |" in lines and "| length \\ depth | 0.00 | 0.50 | 1.00 |" in lines
    )


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not there")
def test_the_picture_is_a_png(tmp_path):
    draw(heatmap_data(GRID, scores(), "local-0.5"), tmp_path / "heatmap.png")
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def run(subject, *more):
    return cli.main(["eval", str(subject.model_folder), "--quiet", "--device", "cpu", *more])


def test_from_the_command_line(subject, tmp_path, capsys):
    code = run(
        subject, "--checkpoint", str(subject.checkpoint_folder), "--heatmap", "--heatmap-lengths",
        "700,560", "--heatmap-depths", "2", "--heatmap-samples", "1", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0
    report = json.loads((tmp_path / "eval.json").read_text())
    (row,) = report["rows"]
    assert (row["measure"], row["samples"], row["length"]) == ("needle heat map", 4, 700)
    assert row["full"] is not None and "difference" in row
    heatmap = report["heatmap"]
    assert heatmap["lengths"] == [560, 700] and heatmap["depths"] == [0.0, 1.0]
    assert set(heatmap["scores"]) == {"full", "compressed"} and heatmap["title"] == "local-0.5"
    assert "## Needle heat map, compressed" in capsys.readouterr().out
    assert not (tmp_path / "heatmap.png").exists()


def test_a_picture_without_matplotlib_fails_before_the_work(subject, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("echokv_vllm.eval.run.load_model", lambda *args: pytest.fail("too late"))
    assert run(subject, "--heatmap", "--heatmap-png", "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "needs the package matplotlib; install it (pip install matplotlib)" in error
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--heatmap", "--heatmap-png"], "name a folder"),
        (["--heatmap-png", "--out", "x", "--tasks", "vt"], "(--heatmap), which is not measured"),
        (["--heatmap", "--heatmap-lengths", "9999"], "longer than the model's context"),
        (["--heatmap", "--heatmap-lengths", "130"], "raise the task length"),
        (["--heatmap", "--heatmap-depths", "1"], "heatmap_depths=1 is too small"),
    ],
)
def test_user_errors(subject, capsys, more, words):
    assert run(subject, *more) == 2
    assert words in capsys.readouterr().err
