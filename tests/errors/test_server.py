"""Real servers: bad requests, start-up errors, and the metrics page."""

from pathlib import Path

import pytest
from servers import server, temporary_folder
from tiny_models import write_checkpoint, write_model

pytestmark = pytest.mark.slow

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder():
    with temporary_folder() as name:
        folder = Path(name)
        write_model(folder / "m", num_layers=2)
        write_checkpoint(folder / "c", folder / "m", recent_tokens=32)
        yield folder


@pytest.fixture(scope="module")
def served(folder):
    logs = folder / "s"
    logs.mkdir()
    with server(
        folder / "m", logs, folder / "c",
        arguments=["--chat-template", TEMPLATE, "--served-model-name", "tiny"],
    ) as running:  # fmt: skip
        yield running
    assert list(logs.glob("echokv-*")) == [], "the metrics files stay behind"


def complete(served, mode=None, length=100, num_new=3, **more):
    body = {"model": "tiny", "prompt": "x" * length, "max_tokens": num_new, "ignore_eos": True}
    body |= more
    if mode is not None:
        body["vllm_xargs"] = {"echokv": mode}
    return served.post("/v1/completions", body)


def chat(served, mode, **more):
    messages = [{"role": "user", "content": "hello"}]
    return served.post(
        "/v1/chat/completions",
        {
            "model": "tiny", "messages": messages, "max_tokens": 3, **more,
            "vllm_xargs": {} if mode is None else {"echokv": mode},
        },
    )  # fmt: skip


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize("mode", ["fast", 3])
def test_bad_mode_is_a_bad_request_and_the_server_lives(served, ask, mode):
    status, answer = ask(served, mode)
    assert status == 400, answer
    message = answer["error"]["message"]
    assert f"vllm_xargs.echokv is {mode!r}" in message
    assert "'auto', 'full' and 'compressed'" in message and "Leave it out" in message
    status, answer = ask(served, "full")
    assert status == 200, answer


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_mode_beside_beam_search_is_a_bad_request(served, ask):
    """vLLM's beam search would not hand it on."""
    status, answer = ask(served, "full", use_beam_search=True, n=2)
    assert status == 400, answer
    message = answer["error"]["message"]
    assert "vllm_xargs.echokv is 'full', and use_beam_search is on" in message
    assert "Leave one of the two out" in message
    status, answer = ask(served, None, use_beam_search=True, n=2)
    assert status == 200 and len(answer["choices"]) == 2, answer


def test_metrics_follow_the_requests(served):
    """One full and one compressed request, whose prompt fills 10 pages of 16 tokens."""
    complete(served, "full")
    before = served.metrics("echokv:")
    assert before["echokv:pool_pages"] > 100
    for mode in ("full", "compressed"):
        assert complete(served, mode, length=160)[0] == 200
    after = served.metrics("echokv:")
    moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    # Exact: sink page and the last 32 tokens, two or three pages; the others left the window.
    dropped = moved.pop("echokv:window_pages_dropped", 0)
    assert moved == {"echokv:admitted_full": 1, "echokv:admitted_compressed": 1}
    assert 0 <= dropped <= 10
    assert after["echokv:residual_pages"] == 0, "an idle server holds no pages"


def test_stock_server_shows_no_echokv_metrics(folder):
    logs = folder / "t"
    logs.mkdir()
    with server(folder / "m", logs, arguments=["--served-model-name", "tiny"]) as running:
        status, answer = complete(running, "fast")
        assert status == 200, answer
        assert running.metrics("vllm:")
        assert running.metrics("echokv") == {}


def test_start_up_error_is_printed(folder):
    logs = folder / "f"
    logs.mkdir()
    with server(folder / "m", logs, folder / "c", {"recent": 3}, ready=False) as running:
        assert running.process.wait(timeout=600) != 0
    assert "Unknown echokv option 'recent'; allowed are checkpoint, revision" in running.log
