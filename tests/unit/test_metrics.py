"""The files through which the scheduler process reports to the API server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from echokv_vllm import metrics
from echokv_vllm.scheduler.ledger import Counters


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path / "metrics"))
    return tmp_path / "metrics"


def counters(**changes):
    return Counters(**changes)


def test_nothing_is_read_before_an_engine_has_started(folder):
    assert set(metrics.read_totals().values()) == {0}
    assert not folder.exists(), "reading must not create the folder"


def test_written_numbers_are_read_under_their_names(folder):
    writer = metrics.MetricsWriter()
    writer.write(counters(admitted_full=3, hits_unpaired=2**40), pool_pages=100, residual_pages=7)
    totals = metrics.read_totals()
    assert set(totals) == set(metrics.FIELDS)
    expected = dict(admitted_full=3, hits_unpaired=2**40, pool_pages=100, residual_pages=7)
    assert {name: value for name, value in totals.items() if value} == expected


def test_every_number_has_a_text_for_the_metrics_page():
    from echokv_vllm import stat_logger

    assert tuple(stat_logger._HELP) == metrics.FIELDS


def test_a_later_write_replaces_the_numbers(folder):
    writer = metrics.MetricsWriter()
    writer.write(counters(demoted=5), 10, 9)
    writer.write(counters(demoted=6), 10, 0)
    totals = metrics.read_totals()
    assert (totals["demoted"], totals["residual_pages"]) == (6, 0)


def test_engines_of_one_server_add_up(folder):
    for pages in (10, 32):
        metrics.MetricsWriter().write(counters(restored=1), pages, 0)
    totals = metrics.read_totals()
    assert (totals["pool_pages"], totals["restored"]) == (42, 2)


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1], lambda data: b"ECHO\x09" + data[5:], lambda data: b""]
)
def test_files_of_another_format_do_not_count(folder, spoil):
    writer = metrics.MetricsWriter()
    writer.write(counters(), 10, 0)
    foreign = folder / "foreign.bin"
    foreign.write_bytes(spoil(writer.path.read_bytes()))
    assert metrics.read_totals()["pool_pages"] == 10


def test_a_killed_engines_folder_goes_with_the_process_that_named_it(tmp_path):
    script = (
        "import os, subprocess, sys\n"
        "from echokv_vllm import metrics\n"
        "metrics.announce_folder(); metrics.announce_folder()\n"
        "engine = 'from echokv_vllm import metrics; metrics.announce_folder();'\n"
        "engine += 'metrics.MetricsWriter(); import os; os.kill(os.getpid(), 9)'\n"
        "subprocess.run([sys.executable, '-c', engine])\n"
        "folder = os.environ[metrics.FOLDER_VARIABLE]\n"
        "print(folder, len(os.listdir(folder)))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != metrics.FOLDER_VARIABLE}
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    name, num_files = done.stdout.split()
    assert Path(name).parent == tmp_path
    assert num_files == "1", "the killed engine leaves its file behind"
    assert list(tmp_path.iterdir()) == []


def test_two_servers_have_two_folders(tmp_path, monkeypatch):
    names = set()
    for _ in range(2):
        monkeypatch.delenv(metrics.FOLDER_VARIABLE, raising=False)
        metrics.announce_folder()
        names.add(os.environ[metrics.FOLDER_VARIABLE])
    assert len(names) == 2
