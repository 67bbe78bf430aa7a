"""Plain HTTP against a real server: what is on the wire, comments while a request waits, and concurrent clients."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from hermes_async.server import ServerSettings
from hermes_async.server.streams import COMMENT
from tests.server.running import MODEL, RunningServer, counts_of, running_server

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "Speak, good friends."}]


def greedy(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 10, "temperature": 0, **fields}


def data_of(lines: list[str]) -> list[Any]:
    """The data of an answer's events, which are one line each."""
    assert [line for line in lines if line and not line.startswith(("data: ", ":"))] == []
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_what_curl_gets(server: RunningServer) -> None:
    own = server.complete(MESSAGES, max_tokens=10, temperature=0)
    body = json.dumps(greedy(stream=True, stream_options={"include_usage": True}))
    url = f"{server.url}/v1/chat/completions"
    ended = subprocess.run(
        ["curl", "-sS", "-N", "-i", url, "-H", "content-type: application/json", "-d", body],
        capture_output=True,
        check=True,
    )
    head, _, stream = ended.stdout.decode().partition("\r\n\r\n")
    status, *headers = head.lower().split("\r\n")
    assert status == "http/1.1 200 ok"
    assert "content-type: text/event-stream; charset=utf-8" in headers
    assert {"cache-control: no-store", "x-accel-buffering: no", "transfer-encoding: chunked"} <= set(headers)
    assert stream.endswith("\n\ndata: [DONE]\n\n")
    *lines, done = data_of(stream.split("\n"))
    assert done == "[DONE]"
    first, *deltas, last, usage = map(json.loads, lines)
    same = {"object": "chat.completion.chunk", "model": MODEL, "id": first["id"], "created": first["created"]}
    for chunk in (first, *deltas, last, usage):
        assert {name: chunk[name] for name in same} == same
    none = {"logprobs": None, "index": 0, "finish_reason": None}
    assert first["choices"] == [{"delta": {"role": "assistant", "content": ""}, **none}]
    text = "".join(delta["choices"][0]["delta"]["content"] for delta in deltas)
    assert deltas == [
        {**same, "choices": [{"delta": {"content": delta["choices"][0]["delta"]["content"]}, **none}], "usage": None}
        for delta in deltas
    ]
    assert text == own.text
    assert last["choices"] == [{**none, "delta": {}, "finish_reason": "length"}]
    assert usage["choices"] == []
    counts = (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"], usage["usage"]["total_tokens"])
    assert counts == (own.usage.prompt_tokens, 10, own.usage.prompt_tokens + 10)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_streams_at_once_are_the_engines_own_answers(server: RunningServer, path: str) -> None:
    prompts = [f"{word} is the word" for word in ("War", "Rome", "Corn", "Peace", "Honour", "Fire")]

    def asked(prompt: str) -> dict[str, Any]:
        if path == "/v1/completions":
            return {"prompt": prompt, "max_tokens": 10, "temperature": 0, "stream": True}
        return {"messages": [{"role": "user", "content": prompt}], "max_tokens": 10, "temperature": 0, "stream": True}

    def own(prompt: str) -> str:
        whole: Any = prompt if path == "/v1/completions" else [{"role": "user", "content": prompt}]
        return server.complete(whole, max_tokens=10, temperature=0).text

    texts: dict[str, str] = {}

    async def ask(client: httpx.AsyncClient, prompt: str) -> None:
        async with client.stream("POST", path, json=asked(prompt)) as answer:
            lines = [line async for line in answer.aiter_lines()]
        choices = [choice for line in data_of(lines)[:-1] for choice in json.loads(line)["choices"]]
        texts[prompt] = "".join(choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices)

    async with httpx.AsyncClient(base_url=server.url) as client, anyio.create_task_group() as tasks:
        for prompt in prompts:
            tasks.start_soon(ask, client, prompt)
    assert texts == {prompt: await anyio.to_thread.run_sync(own, prompt) for prompt in prompts}


def test_the_id_of_a_client(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        asked: Any = {"url": "/v1/chat/completions", "headers": {"x-request-id": "twice"}}
        with server.held(), client.stream("POST", json=greedy(stream=True), **asked) as running:
            lines = running.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["id"] == "chatcmpl-twice"
            refused = client.post(json=greedy(), **asked)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "duplicate_request_id")
        server.until(lambda now: now.num_running == 0)
        assert client.post(json=greedy(), **asked).json()["id"] == "chatcmpl-twice"


# --- a request that waits ---


@pytest.fixture(scope="module")
def narrow() -> Iterator[RunningServer]:
    """A server that runs one request at a time, and lets one wait."""
    settings = ServerSettings(served_model_name=MODEL, keep_alive_s=0.01)
    with running_server(settings, max_sequences=1, max_waiting=1) as running:
        yield running
        running.check_nothing_is_left()


def test_comments_while_a_request_waits(narrow: RunningServer) -> None:
    own = narrow.complete(MESSAGES, max_tokens=10, temperature=0)
    with httpx.Client(base_url=narrow.url) as client:
        with narrow.held(), client.stream("POST", "/v1/chat/completions", json=greedy(stream=True)) as first:
            narrow.until(lambda now: now.num_running == 1)
            second = client.send(
                client.build_request("POST", "/v1/chat/completions", json=greedy(stream=True)), stream=True
            )
            lines = second.iter_lines()
            waiting = list(itertools.islice(lines, 8))
            assert json.loads(waiting[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
            assert waiting[2:8:2] == [COMMENT.decode().strip()] * 3
            refused = client.post("/v1/chat/completions", json=greedy())
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"] == "5"
            comments = (line for line in first.iter_lines() if line.startswith(":"))  # also while a prompt is computed
            assert next(comments) == COMMENT.decode().strip()
        rest = [json.loads(line) for line in data_of(list(lines))[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in rest) == own.text


def test_a_request_that_waits_ends_with_its_client(narrow: RunningServer) -> None:
    with httpx.Client(base_url=narrow.url) as client, narrow.held():
        client.send(client.build_request("POST", "/v1/chat/completions", json=greedy(stream=True)), stream=True)
        narrow.until(lambda now: now.num_running == 1)
        with client.stream("POST", "/v1/chat/completions", json=greedy(stream=True)):
            narrow.until(lambda now: (now.num_running, now.num_waiting) == (1, 1))
        narrow.until(lambda now: (now.num_running, now.num_waiting) == (1, 0))
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=greedy(), timeout=0.05)
        narrow.until(lambda now: (now.num_running, now.num_waiting) == (1, 0))


def test_a_request_that_takes_too_long() -> None:
    settings = ServerSettings(served_model_name=MODEL, request_timeout_s=0.2)
    with running_server(settings) as running:
        with running.held(), httpx.Client(base_url=running.url) as client:
            whole = client.post("/v1/chat/completions", json=greedy())
            assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
            with client.stream("POST", "/v1/chat/completions", json=greedy(stream=True)) as streamed:
                lines = data_of(list(streamed.iter_lines()))
            assert json.loads(lines[-2])["error"]["code"] == "deadline_exceeded"
            assert lines[-1] == "[DONE]"
        running.check_nothing_is_left()


def test_metrics_count_what_was_answered(narrow: RunningServer) -> None:
    def counts() -> dict[str, float]:
        return counts_of(httpx.get(f"{narrow.url}/metrics").text)

    before = counts()
    httpx.post(f"{narrow.url}/v1/chat/completions", json=greedy()).raise_for_status()
    after = counts()
    length = 'hermes_async_answers_total{finish_reason="length"}'
    assert after[length] == before.get(length, 0) + 1
    assert after["hermes_async_tokens_generated_total"] == before["hermes_async_tokens_generated_total"] + 10
    assert after["hermes_async_num_running"] == 0
    assert all(after[f'hermes_async_loop_lag_seconds{{quantile="{share}"}}'] >= 0 for share in ("0.5", "0.99", "1"))
    httpx.get(f"{narrow.url}/no-such-path-7")
    httpx.get(f"{narrow.url}/v1/models/no-such-model-7")
    requests = {name for name in counts() if name.startswith("hermes_async_requests_total")}
    assert 'hermes_async_requests_total{route="other",status="404"}' in requests
    assert 'hermes_async_requests_total{route="/v1/models/{model:path}",status="404"}' in requests
    assert 'hermes_async_requests_total{route="/v1/chat/completions",status="200"}' in requests
    assert not any("-7" in name for name in requests)  # a client cannot make any number of them
