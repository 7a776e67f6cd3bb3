"""Real ``vllm serve`` processes on 127.0.0.1, always stopped at the end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

START_SECONDS = 600  # 30 s of work; the machine may be busy


class Server:
    """One server process and its output.

    Attributes:
        process: The API server.
        url: Its address.
        log_path: Where standard output and error of all its processes go.
    """

    def __init__(self, model: Path, arguments: list[str], log_path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", "TMPDIR": str(log_path.parent),
        }  # fmt: skip
        # Set for in-process engines of this test process; a server is several processes.
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "ECHOKV_METRICS_DIR"):
            environment.pop(name, None)
        command = [
            *_serve(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
            "--max-model-len", "512", "--enforce-eager", *arguments,
        ]  # fmt: skip
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT,
                cwd=log_path.parent, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        """Everything printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self) -> None:
        """Returns when /health answers; fails with the log's end when the server gives up."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log[-4000:]}"
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise AssertionError(f"not ready after {START_SECONDS} s:\n{self.log[-4000:]}")

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and decoded answer of one JSON request."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Samples of /metrics whose name starts with ``prefix``, without labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if line.startswith(prefix)]
        return {name.split("{")[0]: float(value) for name, value in samples}

    def stop(self) -> None:
        """Ends the server as Ctrl+C does, and every process of its session if that fails."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _serve(model: Path) -> list[str]:
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # vllm-cpu without the metadata of install_cpu.py: its `vllm` command cannot start.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]


@contextmanager
def server(
    model: Path, folder: Path, checkpoint: Path | None = None, echokv: dict[str, Any] | None = None,
    arguments: list[str] | None = None, ready: bool = True,
) -> Iterator[Server]:  # fmt: skip
    """A server of ``model``; with ``checkpoint``, on the echokv backend.

    Args:
        model: Model folder.
        folder: Empty folder for its log and temporary files.
        checkpoint: EchoKV checkpoint folder; None serves with stock vLLM.
        echokv: Further echokv options.
        arguments: Further command-line arguments.
        ready: Wait until it answers.
    """
    options = list(arguments or [])
    if checkpoint is not None:
        section = {"checkpoint": str(checkpoint), **(echokv or {})}
        options += ["--attention-backend", "echokv"]
        options += ["--additional-config", json.dumps({"echokv": section})]
    running = Server(model, options, folder / "server.log")
    try:
        if ready:
            running.wait_until_ready()
        yield running
    finally:
        running.stop()


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder with a short name: sockets in TMPDIR must stay below 108 characters."""
    return tempfile.TemporaryDirectory(prefix="ek")
