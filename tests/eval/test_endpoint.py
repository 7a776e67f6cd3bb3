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
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                pages = {"/metrics": outer.metrics, "/v1/models": json.dumps(outer.models)}
                self.reply(200 if self.path in pages else 404, pages.get(self.path, "no page"))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                text = json.dumps({"choices": [{"text": body["prompt"].upper()}]})
                self.reply(*(outer.completion or (200, text)))

            def reply(self, status, text):
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
