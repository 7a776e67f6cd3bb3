"""The HTTP back end against a small server in this process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from echokv_vllm.eval import endpoint
from echokv_vllm.eval.endpoint import EndpointBackend, EndpointError
from echokv_vllm.eval.tasks import TaskPrompt

PROMPTS = [TaskPrompt("vt", f"prompt {index}", ("x",), 3 + index) for index in range(6)]


class FakeServer:
    """Answers completions with the prompt in capitals and remembers the bodies."""

    def __init__(self):
        self.bodies = []
        self.metrics = "echokv:pool_pages 3\n"
        self.models = {"data": [{"id": "first"}, {"id": "second"}]}
        self.completion = None  # (status, text) to answer instead
        self.failures = []  # (status, text) of the next completions, which are fine afterwards
        self.key = None  # what it wants to see before it answers
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                pages = {"/metrics": outer.metrics, "/v1/models": json.dumps(outer.models)}
                self.reply(200 if self.path in pages else 404, pages.get(self.path, "no page"))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                text = json.dumps({"choices": [{"text": body["prompt"].upper()}]})
                failure = outer.failures.pop(0) if outer.failures else outer.completion
                if failure == "dropped":
                    self.close_connection = True
                    return
                self.reply(*(failure or (200, text)))

            def reply(self, status, text):
                said = self.headers.get("Authorization")
                if outer.key is not None and said != f"Bearer {outer.key}":
                    status, text = 401, "Unauthorized"
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()


@pytest.mark.parametrize("suffix", ["", "/v1", "/v1/"])
def test_answers_come_in_order_with_the_mode_in_the_request(server, suffix):
    backend = EndpointBackend(server.url + suffix)
    assert backend.modes == ("full", "compressed") and backend.model == "first"
    expected = [prompt.text.upper() for prompt in PROMPTS]
    assert backend.complete(PROMPTS) == {"full": expected, "compressed": expected}
    del server.bodies[0]  # looked at the server's metrics after it
    for mode, bodies in (("full", server.bodies[:6]), ("compressed", server.bodies[6:])):
        assert {body["prompt"] for body in bodies} == {prompt.text for prompt in PROMPTS}
        for body in bodies:
            assert body["vllm_xargs"] == {"echokv": mode} and body["cache_salt"] == mode
            assert body["temperature"] == 0 and body["model"] == "first"
            assert body["max_tokens"] == 3 + int(body["prompt"].split()[1])


def test_as_is_sends_no_mode_and_needs_no_echokv(server):
    server.metrics = "vllm:num_requests_running 0\n"
    backend = EndpointBackend(server.url, "as-is", "second")
    assert backend.modes == ("as-is",)
    backend.complete(PROMPTS)
    assert all("vllm_xargs" not in body and body["model"] == "second" for body in server.bodies)


def test_a_prompt_with_special_tokens_of_its_own_gets_no_others(server):
    prompts = [PROMPTS[0], TaskPrompt("qasper", "<s>chat", ("x",), 3, special_tokens=False)]
    EndpointBackend(server.url, "as-is", concurrency=1).complete(prompts)
    assert [body.get("add_special_tokens") for body in server.bodies] == [None, False]


def test_a_server_that_ignores_the_mode_is_found_out(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_METRICS_WAIT", 0.0)
    server.metrics = "vllm:num_requests_running 0\n"
    with pytest.raises(EndpointError, match=r"no echokv metrics.*--attention-backend.*as-is"):
        EndpointBackend(server.url).complete(PROMPTS)
    assert len(server.bodies) == 1, "found out before the work"


@pytest.mark.parametrize("mode", ["compressed", "as-is"])
def test_the_models_sampling_defaults_are_overruled(server, mode):
    """Some generation_config.json have a repetition penalty; vLLM applies it where none is sent."""
    EndpointBackend(server.url, mode).complete(PROMPTS[:1])
    for body in server.bodies:
        assert body["repetition_penalty"] == 1
        assert body["presence_penalty"] == body["frequency_penalty"] == 0


def test_a_key_is_read_from_the_environment(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.key = "secret"
    with pytest.raises(EndpointError, match=r"HTTP 401: Unauthorized; set .*OPENAI_API_KEY"):
        EndpointBackend(server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert EndpointBackend(server.url).complete(PROMPTS[:1])["full"] == ["PROMPT 0"]


@pytest.mark.parametrize("failure", [(503, "busy"), (502, "bad gateway"), "dropped"])
def test_a_request_that_fails_once_is_asked_again(server, monkeypatch, failure):
    monkeypatch.setattr(endpoint, "_RETRY_WAITS", (0.0, 0.0))
    server.failures = [failure, failure]
    answers = EndpointBackend(server.url, "as-is", concurrency=1).complete(PROMPTS)
    assert answers["as-is"] == [prompt.text.upper() for prompt in PROMPTS]
    server.failures = [failure] * 3
    with pytest.raises(EndpointError, match=r"HTTP 50|does not answer"):
        EndpointBackend(server.url, "as-is", concurrency=1).complete(PROMPTS)


def test_a_failure_does_not_wait_for_the_other_prompts(server):
    server.completion = (400, "too long")
    with pytest.raises(EndpointError, match="too long"):
        EndpointBackend(server.url, "as-is", concurrency=1).complete(PROMPTS * 100)
    assert len(server.bodies) < 100


def test_a_slow_server_is_not_asked_twice(server, monkeypatch):
    backend = EndpointBackend(server.url, "as-is", concurrency=1)
    monkeypatch.setattr(endpoint, "_TIMEOUT", 0.2)
    waiting = threading.Event()
    asked = []

    def hold(*_):
        asked.append(1)
        waiting.wait(5)

    monkeypatch.setattr(server.http.RequestHandlerClass, "do_POST", hold)
    try:
        with pytest.raises(EndpointError, match=r"has not answered .*--concurrency"):
            backend.complete(PROMPTS[:1])
    finally:
        waiting.set()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ((400, "echokv mode unknown"), r"HTTP 400: echokv mode unknown; check"),
        ((200, "<html>"), "no JSON"),
        ((200, '{"choices": []}'), "no completion"),
    ],
)
def test_bad_answers_are_explained(server, completion, words):
    backend = EndpointBackend(server.url)
    server.completion = completion
    with pytest.raises(EndpointError, match=words):
        backend.complete(PROMPTS)


def test_bad_addresses_are_explained(server):
    server.models = {"data": []}
    with pytest.raises(EndpointError, match="lists no model; name one"):
        EndpointBackend(server.url)
    with pytest.raises(EndpointError, match=r"'localhost:8000' is no HTTP address; write"):
        EndpointBackend("localhost:8000")
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(EndpointError, match=r"does not answer .*start a server there"):
        EndpointBackend(server.url)
