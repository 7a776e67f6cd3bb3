"""Answers of an OpenAI-compatible server, such as a running `vllm serve`."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from echokv_vllm.eval.tasks import TaskPrompt

_TIMEOUT = 600.0  # seconds for one answer
# Seconds before each further try of a completion. A greedy one may be asked again, and a connection
# that drops once must not cost hours of answers.
_RETRY_WAITS = (1.0, 5.0, 20.0)
_BUSY = (429, 502, 503, 504)  # HTTP codes of a server, or the proxy before it, that may recover
_METRICS_WAIT = 10.0  # seconds until a server shows its gauges after a first step
AS_IS = "as-is"
# vLLM takes what a request leaves open from the model's generation_config.json, and some name a
# repetition penalty: it lowers every token of the prompt, the needle too.
_GREEDY = {
    "temperature": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class EndpointError(ValueError):
    """An endpoint that cannot be reached or refuses a request."""


class EndpointBackend:
    """Greedy completions over HTTP.

    The key of a server that wants one is read from the environment, `OPENAI_API_KEY`.

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
        if prompts and not self._checked:
            # A server shows its gauges after a first step; hours of answers must not come before.
            self._answer(prompts[0], self.modes[0])
            self._check_echo()
        return {mode: self._answer_all(prompts, mode) for mode in self.modes}

    def _answer_all(self, prompts: Sequence[TaskPrompt], mode: str) -> list[str]:
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            pending = [pool.submit(self._answer, prompt, mode) for prompt in prompts]
            return [pending[index].result() for index in self._progress(range(len(pending)))]
        finally:
            # After a failure or an interrupt nobody wants the answers that are left.
            pool.shutdown(cancel_futures=True)

    def _answer(self, prompt: TaskPrompt, mode: str) -> str:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt.text,
            "max_tokens": prompt.max_new_tokens,
            **_GREEDY,
        }
        if not prompt.special_tokens:
            body["add_special_tokens"] = False  # vLLM's; the chat template has them
        if mode != AS_IS:
            # A salt of its own: one mode must not read what the other left in the prefix cache.
            body.update(vllm_xargs={"echokv": mode}, cache_salt=mode)
        answer = self._fetch_json("/v1/completions", body, _RETRY_WAITS)
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

    def _fetch_json(
        self, path: str, body: dict[str, Any] | None = None, retry_waits: Sequence[float] = ()
    ) -> Any:
        text = self._fetch(path, body, retry_waits)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise EndpointError(
                f"{self._root}{path} answered {text[:200]!r}, which is no JSON; give the address "
                "of an OpenAI-compatible server"
            ) from error

    def _fetch(
        self, path: str, body: dict[str, Any] | None = None, retry_waits: Sequence[float] = ()
    ) -> str:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._root + path, data, headers)
        for wait in (*retry_waits, None):
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                    return str(answer.read().decode("utf-8", "replace"))
            except (OSError, http.client.HTTPException) as error:
                if wait is None or not _may_recover(error):
                    raise self._explained(path, error) from error
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _explained(self, path: str, error: Exception) -> EndpointError:
        if isinstance(error, urllib.error.HTTPError):
            said = error.read().decode("utf-8", "replace")[:500]
            if error.code in (401, 403):
                way_out = "set the environment variable OPENAI_API_KEY to the server's key"
            else:
                way_out = (
                    "check the model name (--served-model), the task length against the server's "
                    "--max-model-len, and that the server runs EchoKV if a mode is asked for"
                )
            return EndpointError(
                f"{self._root}{path} answered HTTP {error.code}: {said}; {way_out}"
            )
        if _is_timeout(error):
            return EndpointError(
                f"endpoint {self._root} has not answered a request within {_TIMEOUT:.0f} s; ask "
                "for less at once (--concurrency) or check the server's log"
            )
        return EndpointError(
            f"endpoint {self._root} does not answer ({error}); start a server there (vllm "
            "serve MODEL) or correct --endpoint"
        )


def _is_timeout(error: Exception) -> bool:
    return isinstance(getattr(error, "reason", error), TimeoutError)


def _may_recover(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _BUSY
    # A server that is this slow gets slower by a second copy of the request.
    return not _is_timeout(error)
