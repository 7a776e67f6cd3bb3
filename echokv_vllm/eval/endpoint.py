"""Answers of an OpenAI-compatible server, such as a running `vllm serve`."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from echokv_vllm.eval.tasks import TaskPrompt

_TIMEOUT = 600.0  # seconds for one answer
_METRICS_WAIT = 10.0  # seconds until a server shows its gauges after a first step
AS_IS = "as-is"


class EndpointError(ValueError):
    """An endpoint that cannot be reached or refuses a request."""


class EndpointBackend:
    """Greedy completions over HTTP.

    Args:
        url: Base URL, with or without the final `/v1`.
        mode: EchoKV mode to compare with `full`, or `as-is` to send none.
        model: Model name there; None asks for the list and takes the first.
        concurrency: Requests in flight.
        progress: Wraps the iteration over prompts.

    Raises:
        EndpointError: If nobody answers there.
    """

    def __init__(
        self,
        url: str,
        mode: str = "compressed",
        model: str | None = None,
        *,
        concurrency: int = 4,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise EndpointError(
                f"endpoint {url!r} is no HTTP address; write for example http://localhost:8000/v1"
            )
        self._root = url.rstrip("/").removesuffix("/v1")
        self._mode = mode
        self._concurrency = concurrency
        self._progress = progress
        self._checked = mode == AS_IS
        self.model = model or self._first_model()

    @property
    def modes(self) -> tuple[str, ...]:
        """What to compare, the full cache first."""
        return (AS_IS,) if self._mode == AS_IS else ("full", self._mode)

    def complete(self, prompts: Sequence[TaskPrompt]) -> dict[str, list[str]]:
        """Completions of the prompts, in order, by mode.

        Raises:
            EndpointError: If a request fails, or the server knows no EchoKV modes.
        """
        answers = {}
        for mode in self.modes:
            with ThreadPoolExecutor(self._concurrency) as pool:
                pending = [pool.submit(self._answer, prompt, mode) for prompt in prompts]
                done = [pending[index].result() for index in self._progress(range(len(pending)))]
            answers[mode] = done
            if not self._checked:
                self._check_echo()
        return answers

    def _answer(self, prompt: TaskPrompt, mode: str) -> str:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt.text,
            "max_tokens": prompt.max_new_tokens,
            "temperature": 0,
        }
        if not prompt.special_tokens:
            body["add_special_tokens"] = False  # vLLM's; the chat template has them
        if mode != AS_IS:
            # A salt of its own: one mode must not read what the other left in the prefix cache.
            body.update(vllm_xargs={"echokv": mode}, cache_salt=mode)
        answer = self._fetch_json("/v1/completions", body)
        try:
            return str(answer["choices"][0]["text"])
        except (KeyError, IndexError, TypeError) as error:
            raise EndpointError(
                f"{self._root}/v1/completions answered {str(answer)[:200]!r}, which is no "
                "completion; give the address of an OpenAI-compatible server"
            ) from error

    def _first_model(self) -> str:
        listed = self._fetch_json("/v1/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise EndpointError(
                f"{self._root}/v1/models lists no model; name one (--served-model)"
            ) from error

    def _check_echo(self) -> None:
        """Stock servers ignore the mode; comparing two equal runs would look like no loss."""
        deadline = time.monotonic() + _METRICS_WAIT
        while "echokv:" not in self._fetch("/metrics"):
            if time.monotonic() > deadline:
                raise EndpointError(
                    f"{self._root}/metrics shows no echokv metrics, so the server does not run "
                    "EchoKV and ignores the mode; start it with --attention-backend echokv, or "
                    "measure it as it stands (--endpoint-mode as-is)"
                )
            time.sleep(0.5)
        self._checked = True

    def _fetch_json(self, path: str, body: dict[str, Any] | None = None) -> Any:
        text = self._fetch(path, body)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise EndpointError(
                f"{self._root}{path} answered {text[:200]!r}, which is no JSON; give the address "
                "of an OpenAI-compatible server"
            ) from error

    def _fetch(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._root + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                return str(answer.read().decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")[:500]
            raise EndpointError(
                f"{self._root}{path} answered HTTP {error.code}: {said}; check the model name "
                "(--served-model), the task length against the server's --max-model-len, and that "
                "the server runs EchoKV if a mode is asked for"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(
                f"endpoint {self._root} does not answer ({error}); start a server there (vllm "
                "serve MODEL) or correct --endpoint"
            ) from error
