"""The `echokv` command line: parsing, exit codes and one-line errors."""

import subprocess
import sys

import pytest

from echokv_vllm.checkpoint import EchoCheckpoint
from echokv_vllm.cli import main as cli
from echokv_vllm.train import options as train_options


def _arguments(model_folder, corpus, out, *more):
    return [
        "train", model_folder, "--data", corpus, "--out", str(out), "--sequence-len", "64",
        "--device", "cpu", *more,
    ]  # fmt: skip


def test_train_command(model_folder, corpus, tmp_path, capsys, monkeypatch):
    arguments = _arguments(
        model_folder, corpus, tmp_path / "out", "--plan", "paper-0.5", "--rotation-block", "8",
        "--recent-tokens", "32", "--bias",
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["echokv", *arguments])
    assert cli.main() == 0
    printed = capsys.readouterr()
    assert "| mean |" in printed.out and str(tmp_path / "out") in printed.out
    assert "batch" in printed.err, "progress bar"
    loaded = EchoCheckpoint.load(tmp_path / "out")
    assert (loaded.rotation_block, loaded.recent_tokens) == (8, 32)
    assert loaded.plan.name == "paper-0.5" and loaded.maps[1].key_bias is not None
    assert loaded.provenance["command"].startswith("echokv train ")

    assert cli.main([*arguments, "--overwrite", "--quiet", "--rotation-block", "0"]) == 0
    printed = capsys.readouterr()
    assert "| mean |" not in printed.out and "batch" not in printed.err
    assert EchoCheckpoint.load(tmp_path / "out").rotation_block == 0


def test_every_option_is_on_the_command_line_with_its_default(monkeypatch):
    parser = cli.build_parser()
    parsed = parser.parse_args(["train", "MODEL", "--data", "DATA", "--out", "OUT"])
    expected = train_options.TrainOptions(model="MODEL", data="DATA", out="OUT")
    for name, value in vars(expected).items():
        assert getattr(parsed, name) == value, name
    assert expected.plan == "auto"
    assert (expected.searched_ratio, expected.searches_uniform) == (0.5, True)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--plan", "local-9"], ["'9'", "between 0 and 1"]),
        (["--num-tokens", "5"], ["num_tokens=5"]),
        (["--ridge", "-1"], ["ridge=-1"]),
        (["--stage2-steps", "5"], ["stage2_steps=5", "auto, here none", "--stage2 kl"]),
        (["--learning-rate", "1e-3"], ["learning_rate=0.001", "stage1=closed-form"]),
        (["--stage1-steps", "5"], ["stage1_steps=5", "--stage1 sgd"]),
        (["--stage1", "sgd", "--residual-bits", "2"], ["residual_bits=2", "stage2"]),
        (["--stage2", "kl", "--num-queries", "5"], ["num_queries=5", "stage2=kl", "o-mse"]),
        (["--stage2", "o-mse", "--checkpoint-activations"], ["checkpoint_activations=True"]),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    model_folder, corpus, tmp_path, capsys, more, words
):
    arguments = _arguments(model_folder, corpus, tmp_path / "out", *more)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("echokv: error: ") and error.count("\n") == 1
    for word in words:
        assert word in error
    with pytest.raises(ValueError, match=words[0]):
        cli.main(["--debug", *arguments])


def test_system_errors_are_one_line_too(model_folder, corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(_arguments(model_folder, corpus, tmp_path / "file" / "out")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("echokv: error: ")


def test_wrong_usage_exits_with_2(capsys):
    for arguments in ([], ["train"], ["train", "m", "--data", "d", "--out", "o", "--dtype", "x"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_help_and_training_package_import_neither_torch_nor_vllm():
    code = (
        "import sys, echokv_vllm.train\n"
        "from echokv_vllm.cli.main import build_parser\n"
        "text = build_parser().format_help()\n"
        "assert 'train' in text\n"
        "print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_never_imports_vllm():
    code = (
        "import sys, echokv_vllm.train.run, echokv_vllm.checkpoint\n"
        "print([name for name in sys.modules if name == 'vllm' or name.startswith('vllm.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
