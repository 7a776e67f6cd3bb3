"""A ``vllm serve`` child process on a free local port."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT = 600.0  # seconds; a cold import of vLLM in three processes on a small machine
STOP_TIMEOUT = 20.0  # seconds


class ServerError(OSError):
    """The server ended or did not answer."""


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """Context manager: starts on entry, is healthy inside, is gone after.

    Args:
        model: Model folder or repository id.
        log: File for the server's output.
        checkpoint: EchoKV checkpoint; None serves with stock attention.
        echokv: Further echokv options.
        options: Command-line options, ``max_model_len=2048`` for ``--max-model-len 2048``.

    Raises:
        ServerError: Not healthy within :data:`START_TIMEOUT`; the message names the log and the
            errors in it.
    """

    def __init__(
        self,
        model: str,
        log: Path,
        checkpoint: str | None = None,
        echokv: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model,
            "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "demo",
        ]  # fmt: skip
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            self.command += [flag] if value is True else [flag, str(value)]
        if checkpoint is not None:
            settings = {"echokv": {"checkpoint": checkpoint, **(echokv or {})}}
            self.command += [
                "--attention-backend", "echokv", "--additional-config", json.dumps(settings),
            ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        # On a CPU, vLLM would claim nearly all memory before it looks at the block count.
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "VLLM_NO_USAGE_STATS": "1"}
        with self.log.open("wb") as log:
            # A session of its own: the server starts processes that must all end with it.
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._await_health()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _await_health(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended at start-up ({self.log}): {self.causes()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # not listening yet
            time.sleep(0.5)
        raise ServerError(f"no answer within {START_TIMEOUT:.0f} s ({self.log}): {self.causes()}")

    def causes(self) -> str:
        """The errors named in the server's output; its last lines where none is."""
        lines = self.log.read_text(errors="replace").splitlines()
        named = [line for line in lines if re.search(r"\b\w+Error: ", line)]
        return "\n".join(named or lines[-10:])

    def metrics(self) -> dict[str, float]:
        """``/metrics`` as name -> value, summed over labels."""
        from prometheus_client.parser import text_string_to_metric_families

        totals: dict[str, float] = {}
        text = httpx.get(f"{self.url}/metrics", timeout=10.0).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals

    def __exit__(self, *_: Any) -> None:
        process = self._process
        if process is None:
            return
        for sign in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
            except ProcessLookupError:
                break  # every process of the session is gone
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                continue
        process.wait()
        self._process = None
