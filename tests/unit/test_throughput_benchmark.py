"""`benchmarks/benchmark_throughput.py`: what it runs and prints; a real run at night."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "benchmark_throughput.py"


def load(path: Path) -> ModuleType:
    """A script of the benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(SCRIPT)


def test_runs_differ_in_the_backend_alone(script: ModuleType) -> None:
    runs = script.runs("DIR", ["auto", "compressed"], ["fp8"])
    assert list(runs) == ["stock", "stock fp8", "echokv auto", "echokv compressed"]
    assert runs["stock"] == [] and runs["stock fp8"] == ["--kv-cache-dtype", "fp8"]
    backend, settings = runs["echokv compressed"][:2], runs["echokv compressed"][3]
    assert backend == ["--attention-backend", "echokv"]
    assert json.loads(settings) == {"echokv": {"checkpoint": "DIR", "mode": "compressed"}}


def test_ratios_are_to_stock(script: ModuleType) -> None:
    counts = {"running": 5, "preemptions": 3, "pages_dropped": 0}
    stock = {"requests_per_second": 2.0, "tokens_per_second": 800.0, "counts": counts}
    auto = {
        "requests_per_second": 3.0, "tokens_per_second": 1200.0,
        "counts": {"running": 8, "preemptions": 0, "pages_dropped": 151},
    }  # fmt: skip
    lines = script.table({"stock": stock, "echokv auto": auto}).splitlines()
    assert lines[1].split() == ["stock", "2.000", "800.0", "1.00x", "5", "3", "0"]
    assert lines[2].split() == ["echokv", "auto", "3.000", "1200.0", "1.50x", "8", "0", "151"]


def test_a_run_that_fails_does_not_take_the_others_along(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A peer's KV cache dtype that the machine lacks, or a run out of memory."""
    bench = tmp_path / "bench.py"
    bench.write_text(
        "import json, os, signal, sys\n"
        "if 'fp8' in sys.argv: sys.exit(3)\n"
        'if \'"mode": "full"\' in sys.argv[-1]: os.kill(os.getpid(), signal.SIGKILL)\n'
        "counts = {'running': 5, 'preemptions': 3, 'pages_dropped': 0}\n"
        "json.dump(counts, open(sys.argv[1], 'w'))\n"
        "result = {'requests_per_second': 2.0, 'tokens_per_second': 800.0}\n"
        "json.dump(result, open(sys.argv[sys.argv.index('--output-json') + 1], 'w'))\n"
    )
    monkeypatch.setattr(script, "COUNTED_BENCH", bench)
    answer = tmp_path / "answer.json"
    arguments = ["MODEL", "--checkpoint", "DIR", "--peers", "fp8", "--modes", "full,auto"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--json", str(answer)])
    assert script.main() == 1
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].split()[:4] == ["stock", "2.000", "800.0", "1.00x"]
    assert lines[1].split() == ["stock", "fp8", "FAILED,", "exit", "code", "3"]
    assert lines[2].split()[2:] == ["FAILED,", "killed", "by", "signal", "9"]
    assert lines[3].split()[:5] == ["echokv", "auto", "2.000", "800.0", "1.00x"]
    results = json.loads(answer.read_text(encoding="utf-8"))
    assert results["stock fp8"] == {"failure": "exit code 3"}
    results["stock"] = {"failure": "exit code 1"}
    assert script.table(results).splitlines()[4].split()[4] == "-", "no ratio without stock"


def test_options_behind_the_dashes_are_the_benchmarks(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    own, others = script.split_options(["MODEL", "--checkpoint", "DIR", "--", "--seed", "1"])
    assert (own, others) == (["MODEL", "--checkpoint", "DIR"], ["--seed", "1"])
    assert script.parse_args(own).modes == ["auto"]
    with pytest.raises(SystemExit):
        script.parse_args([*own, "--modes", "auto,small"])
    assert "'small' is none of auto, full, compressed" in capsys.readouterr().err


def test_counts_that_vllm_does_not_show_are_no_zeros(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = tmp_path / "counts.json"
    counted_bench = load(script.COUNTED_BENCH)
    monkeypatch.setattr("vllm.entrypoints.cli.main.main", lambda: None)
    monkeypatch.setattr(counted_bench, "metric", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["counted_bench.py", str(counts), "throughput"])
    with pytest.raises(SystemExit, match="num_requests_running; leave out --disable-log-stats"):
        counted_bench.main()
    assert sys.argv == ["vllm", "bench", "throughput"] and not counts.exists()


@pytest.mark.nightly
def test_a_short_cache_holds_more_requests_and_preempts_none(tmp_path: Path) -> None:
    model = ROOT / "examples" / "tiny_model"
    answer = tmp_path / "answer.json"
    command = [
        sys.executable, str(SCRIPT), str(model), "--checkpoint", str(model / "echokv-local-0.5"),
        "--json", str(answer), "--", "--random-input-len", "600", "--random-output-len", "60",
        "--num-prompts", "12", "--max-model-len", "1024", "--kv-cache-memory-bytes", "20M",
        "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "16",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout[-800:])
    results = json.loads(answer.read_text(encoding="utf-8"))
    stock, auto = results["stock"]["counts"], results["echokv auto"]["counts"]
    assert auto["running"] > stock["running"] > 0
    assert stock["preemptions"] > 0 and auto["preemptions"] == 0
    assert auto["pages_dropped"] > 0
