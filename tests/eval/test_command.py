"""`echokv eval` from the command line to its files."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import write_checkpoint, write_model

from echokv_vllm.cli import main as cli
from echokv_vllm.eval import EvalOptions

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_model"


def run(subject, *more):
    return cli.main(["eval", str(subject.model_folder), "--quiet", "--device", "cpu", *more])


def test_divergence_and_tasks_in_one_report(subject, corpus, tmp_path, capsys):
    code = run(
        subject, "--checkpoint", str(subject.checkpoint_folder), "--data", corpus, "--samples", "3",
        "--length", "64", "--offset-max", "1000", "--tasks", "vt", "--task-lengths", "700,800",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "eval.json").read_text())
    assert (tmp_path / "eval.md").read_text() in printed
    measures = [(row["measure"], row["length"]) for row in report["rows"]]
    assert measures == [
        ("perplexity", 64), ("perplexity increase", 64), ("top-1 agreement", 64),
        ("KL(full, echo)", 64), ("vt", 700), ("vt", 800), ("mean of 2 tasks and lengths", 800),
    ]  # fmt: skip
    for row in report["rows"]:
        assert (row["plan"], row["key_space"], row["ratio"]) == ("local-0.5", "B = 8", 0.5)
        assert row["samples"] == (6 if "mean" in row["measure"] else 3)
        assert row["bytes_per_token"] > row["retained_bytes_per_token"]
    assert report["rows"][3]["score"]["value"] > 0.01
    assert report["rows"][4]["full"] is not None
    assert report["options"]["offset_max"] == 1000
    assert report["settings"]["exact tokens"] == "4 sink, 8 recent"


def test_same_seed_same_report(subject, corpus, tmp_path):
    options = ("--checkpoint", str(subject.checkpoint_folder), "--data", corpus, "--samples", "2")
    rows = []
    for name in ("one", "two"):
        assert run(subject, *options, "--length", "40", "--out", str(tmp_path / name)) == 0
        rows.append(json.loads((tmp_path / name / "eval.json").read_text())["rows"])
    assert rows[0] == rows[1]


def test_without_a_checkpoint_the_full_cache_is_measured(subject, corpus, tmp_path):
    code = run(subject, "--data", corpus, "--samples", "2", "--length", "40", "--out",
               str(tmp_path))  # fmt: skip
    assert code == 0
    (row,) = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert (row["measure"], row["plan"], row["full"]) == ("perplexity", "full cache", None)


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="examples/tiny_model is not there")
def test_the_tiny_model_answers_with_either_cache(tmp_path):
    """A window smaller than the prompt, so that most needles lie in rebuilt tokens."""
    code = cli.main(
        ["eval", str(EXAMPLE), "--checkpoint", str(EXAMPLE / "echokv-local-0.5"), "--tasks",
         "needle", "--task-lengths", "500", "--samples", "8", "--quiet", "--device", "cpu",
         "--out", str(tmp_path)]
    )  # fmt: skip
    assert code == 0
    (row,) = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert row["full"]["value"] >= 0.75 and row["score"]["value"] >= 0.75


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["nothing to measure", "--data"]),
        (["--tasks", "qa_3"], ["unknown task 'qa_3'", "niah_single_1"]),
        (["--tasks", "qa_1"], ["task 'qa_1' needs data", "--squad"]),
        (["--tasks", "vt", "--essays", str(EXAMPLE)], ["essay file", "is a folder", ".txt"]),
        (["--tasks", "vt", "--task-lengths", "100"], ["task 'vt' needs", "raise the task length"]),
        (["--tasks", "vt", "--task-lengths", "4096"], ["4096", "context of 2048"]),
        (["--tasks", "vt", "--endpoint", "http://127.0.0.1:9"], ["does not answer", "vllm serve"]),
        (["--data", "nowhere.txt"], ["nowhere.txt", "does not exist"]),
        (["--data", "x.txt", "--length", "64", "--skip-tokens", "63"], ["nothing to score"]),
        (["--data", "x.txt", "--samples", "1"], ["samples=1", "at least 2"]),
        (["--data", "x.txt", "--out", __file__], ["--out", "is a file; name a folder"]),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(subject, capsys, more, words):
    assert run(subject, *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("echokv: error: ")
    for word in words:
        assert word in error


def test_lengths_that_are_no_numbers_are_named(subject, capsys):
    with pytest.raises(SystemExit) as caught:
        run(subject, "--tasks", "vt", "--task-lengths", "1k")
    assert caught.value.code == 2
    assert "'1k' is not a comma list of whole numbers" in capsys.readouterr().err


def test_running_out_of_memory_says_what_to_lower(subject, corpus, monkeypatch, capsys):
    def load_model(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr("echokv_vllm.eval.run.load_model", load_model)
    assert run(subject, "--data", corpus, "--samples", "2", "--length", "40") == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("ran out of memory", "--dtype bfloat16", "(now 4)"))
    assert "--endpoint" not in error
    assert run(subject, "--tasks", "vt", "--samples", "2", "--dtype", "bfloat16") == 2
    error = capsys.readouterr().err
    assert "--endpoint" in error and "bfloat16" not in error and "batch-size" not in error


def test_an_endpoint_that_is_not_there_shows_before_the_divergence(
    subject, corpus, monkeypatch, capsys
):
    monkeypatch.setattr("echokv_vllm.eval.run.load_model", lambda *_: pytest.fail("loaded"))
    code = run(subject, "--data", corpus, "--samples", "2", "--length", "40", "--tasks", "vt",
               "--endpoint", "http://127.0.0.1:9")  # fmt: skip
    assert code == 2 and "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "named", "row"),
    [
        ("compressed", True, ("local-0.5", 0.5)),
        ("auto", True, ("local-0.5, auto", 0.5)),
        ("as-is", True, ("endpoint, as-is", None)),  # any server: the checkpoint says nothing of it
        ("as-is", False, ("endpoint, as-is", None)),
    ],
)
def test_rows_of_a_server_say_what_is_known_of_it(subject, tmp_path, monkeypatch, mode, named, row):
    modes = ("as-is",) if mode == "as-is" else ("full", mode)
    backend = SimpleNamespace(
        modes=modes, complete=lambda prompts: {name: ["x"] * len(prompts) for name in modes}
    )
    monkeypatch.setattr("echokv_vllm.eval.run.EndpointBackend", lambda *_, **__: backend)
    checkpoint = subject.checkpoint_folder
    more = ["--checkpoint", str(checkpoint)] if named else []
    assert cli.main(
        ["eval", str(subject.model_folder), *more, "--tasks", "vt", "--samples", "2", "--endpoint", "http://h",
         "--endpoint-mode", mode, "--out", str(tmp_path), "--quiet"]
    ) == 0  # fmt: skip
    report = json.loads((tmp_path / "eval.json").read_text())
    assert (report["rows"][0]["plan"], report["rows"][0]["ratio"]) == row
    assert ("checkpoint" in report["settings"]) == (mode != "as-is")
    assert ("bytes/token" in report["settings"]["exact tokens of answers"]) == (
        mode == "compressed"
    )


def test_a_checkpoint_of_another_model_is_refused(subject, corpus, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "c", write_model(tmp_path / "m", num_layers=3))
    assert run(subject, "--checkpoint", str(other), "--data", corpus) == 2
    assert "made for another model (num_layers: checkpoint 3, model 4" in capsys.readouterr().err


def test_every_option_is_on_the_command_line_with_its_default():
    parsed = cli.build_parser().parse_args(["eval", "MODEL", "--data", "DATA"])
    for name, value in vars(EvalOptions(model="MODEL", data="DATA")).items():
        assert getattr(parsed, name) == value, name


def test_evaluation_never_imports_vllm_and_starts_light():
    code = (
        "import sys, echokv_vllm.eval\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'light until it runs'\n"
        "sys.modules['vllm'] = None\n"
        "import importlib, pkgutil\n"
        "for entry in pkgutil.walk_packages(echokv_vllm.eval.__path__, 'echokv_vllm.eval.'):\n"
        "    importlib.import_module(entry.name)\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
