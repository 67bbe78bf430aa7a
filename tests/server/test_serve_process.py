"""`hermes-async serve` as a process: how it starts, ends and refuses, and its options as environment variables."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
import typer.main

from hermes_async.cli.commands import app
from hermes_async.demo import MODEL_PATH
from tests.cli.forked import ForkedCommand, ForkedCommands
from tests.cli.test_commands import hermes

Serving = Callable[..., AbstractContextManager[tuple[ForkedCommand, str]]]

SLOW = {"messages": [{"role": "user", "content": "Speak."}], "max_tokens": 900, "ignore_eos": True, "stream": True}
SHORT = {"messages": [{"role": "user", "content": "Speak."}], "max_tokens": 2, "temperature": 0}


@pytest.fixture
def serving(forked: ForkedCommands) -> Serving:
    """Starts a server's process; tells the address that it says it listens on."""

    @contextlib.contextmanager
    def serving(*args: object, env: dict[str, str] | None = None) -> Iterator[tuple[ForkedCommand, str]]:
        with forked.start("serve", MODEL_PATH, "--memory", "16MiB", *args, env=env) as process:
            said = [process.stderr.readline().decode()]
            while "listening on" not in said[-1]:
                assert said[-1], said
                said.append(process.stderr.readline().decode())
            yield process, said[-1].split("listening on ")[1].strip()

    return serving


# --- the end ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_running_answers_end_and_new_ones_are_refused(number: signal.Signals, serving: Serving) -> None:
    serves = serving("--port", 0, "--shutdown-timeout", 3600)
    with serves as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/chat/completions", json=SLOW | {"max_tokens": 200}) as answer:
            lines = answer.iter_lines()
            assert answer.status_code == 200, next(lines)
            next(lines)
            process.send_signal(number)
            with pytest.raises(httpx.HTTPError) as ended:
                while True:  # until the signal was handled; then, and until the end, no answer begins
                    httpx.post(f"{url}/v1/chat/completions", json=SHORT, timeout=60).raise_for_status()
            if isinstance(ended.value, httpx.HTTPStatusError):
                assert ended.value.response.status_code == 503
                assert ended.value.response.json()["error"]["type"] == "server_error"
            rest = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait() == 0
        assert b"Traceback" not in process.stderr.read()


def test_answers_that_take_too_long_are_ended(serving: Serving) -> None:
    with serving("--port", 0, "--shutdown-timeout", 0) as (process, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=SLOW, timeout=60) as answer:
            lines = answer.iter_lines()
            assert answer.status_code == 200, next(lines)
            next(lines)
            process.terminate()
            rest = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "abort"
        assert process.wait() == 0


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_at_once(numbers: tuple[signal.Signals, ...], serving: Serving) -> None:
    with serving("--port", 0, "--shutdown-timeout", 3600) as (process, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=SLOW | {"n": 8}, timeout=60) as answer:
            lines = answer.iter_lines()
            assert answer.status_code == 200, next(lines)
            next(lines)
            process.send_signal(numbers[0])
            while httpx.get(f"{url}/ready", timeout=60).status_code == 200:
                pass
            process.send_signal(numbers[1])
            rest = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert rest[-1] == "[DONE]"
        assert process.wait() == 0


def test_an_idle_server_ends_with_a_connection_open(serving: Serving) -> None:
    with serving("--port", 0) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/v1/models").status_code == 200
        process.terminate()
        assert process.wait() == 0


# --- addresses, keys and options ---


def test_a_unix_domain_socket(tmp_path: Path, serving: Serving) -> None:
    path = tmp_path / "hermes.sock"
    with serving("--uds", path) as (process, address):
        assert address == f"unix:{path}"
        assert path.stat().st_mode & 0o077 == 0
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://hermes", timeout=60) as client:
            assert client.post("/v1/chat/completions", json=SHORT).status_code == 200
        process.terminate()
        assert process.wait() == 0
    assert not path.exists()


def test_options_as_environment_variables(serving: Serving) -> None:
    """A value for each of the options that a client can see."""
    env = {
        "API_KEY": "secret", "PORT": "0", "SERVED_MODEL_NAME": "of-the-environment", "DEFAULT_MAX_TOKENS": "3",
        "HOST": "0.0.0.0", "ROOT_PATH": "/llm", "PAGE": "false", "MAX_WAITING": "0", "REQUEST_TIMEOUT": "0.0001",
    }  # fmt: skip
    with serving(env={f"HERMES_ASYNC_{name}": value for name, value in env.items()}) as (process, url):
        port = url.rpartition(":")[2]
        assert url == f"http://0.0.0.0:{port}"
        headers = {"authorization": "Bearer secret"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).status_code == 401
            assert client.get("/v1/models").json()["data"][0]["id"] == "of-the-environment"
            assert client.get("/").status_code == 404
            assert client.get("/health", headers={"authorization": ""}).status_code == 200
            late = client.post("/v1/chat/completions", json=SHORT)
            assert (late.status_code, late.json()["error"]["code"]) in ((504, "deadline_exceeded"), (429, "queue_full"))
        process.terminate()
        assert process.wait() == 0


def test_every_option_has_an_environment_variable() -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    own = {"MODEL", "MEMORY", "HOST", "PORT", "UDS", "API_KEY", "NO_AUTH", "ALLOWED_HOST", "SERVED_MODEL_NAME",
           "MAX_WAITING", "REQUEST_TIMEOUT", "SHUTDOWN_TIMEOUT", "DEFAULT_MAX_TOKENS", "ROOT_PATH", "PAGE"}  # fmt: skip
    for param in serve.params:
        if param.name.upper() in own:
            assert param.envvar == f"HERMES_ASYNC_{param.name.upper()}"
    assert own <= {param.name.upper() for param in serve.params}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--host", "::"), "--no-auth"),
        (("--port", 1, "--no-auth", "--host", "no.such.host.invalid"), "cannot listen on"),
        (("--uds", "/no/such/folder/socket"), "cannot listen on"),
        (("--api-key", ""), "api_key"),
        (("--request-timeout", -1), "request_timeout_s"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_one_line(args: tuple[object, ...], said: str) -> None:
    check_refused(said, *args)


def test_a_port_that_is_taken_is_refused_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check_refused("cannot listen on", "--port", taken.getsockname()[1])


def check_refused(said: str, *args: object) -> None:
    ended = hermes("serve", MODEL_PATH, "--memory", "8MiB", *args)
    assert ended.exit_code == 1
    error = ended.stderr.splitlines()[-1]
    assert error.startswith("hermes-async: error: ") and said in error
