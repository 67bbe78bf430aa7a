"""The Dockerfile of the server, read without Docker. `make lint` also has hadolint read it."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch

import pytest

from tests.project import ROOT

TEXT = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its arguments, continued lines joined."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def last(name: str) -> str:
    return [arguments for instruction, arguments in instructions() if instruction == name][-1]


def environment() -> dict[str, str]:
    return dict(item.split("=", 1) for item in shlex.split(last("ENV")))


def test_the_server_runs_as_an_ordinary_user() -> None:
    assert int(last("USER")) > 0  # a number, so that Kubernetes can check it
    after = [name for name, _ in instructions()][[name for name, _ in instructions()].index("USER") :]
    assert "RUN" not in after


def test_it_serves_to_other_machines_and_so_needs_a_key() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["hermes-async", "serve"]
    assert environment()["HERMES_ASYNC_HOST"] == "0.0.0.0"
    assert environment()["HERMES_ASYNC_PORT"] == last("EXPOSE")
    assert not re.search(r"KEY=|NO_AUTH|TOKEN|--no-auth", re.sub(r"(?m)^#.*$", "", TEXT))


def test_what_is_kept_lies_in_volumes() -> None:
    volumes = json.loads(last("VOLUME"))
    assert "/models" in volumes
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        assert any(environment()[name].startswith(volume) for volume in volumes)


def test_its_images_are_slim_and_of_a_known_version() -> None:
    images = [arguments for name, arguments in instructions() if name == "FROM"]
    assert {image.split()[0] for image in images} == {"python:${PYTHON_VERSION}-slim"}
    assert re.search(r"^ARG PYTHON_VERSION=3\.\d+$", TEXT, flags=re.MULTILINE)
    assert "apt-get" not in TEXT and "curl" not in TEXT


def test_pip_keeps_no_cache_and_installs_pinned_versions() -> None:
    installs = re.findall(r"pip install .*", TEXT)
    assert len(installs) == 2
    assert all("--no-cache-dir" in line and "constraints-dev.txt" in line for line in installs)
    assert "https:" not in TEXT


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = [
        source
        for name, arguments in instructions()
        if name == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    ]
    assert {"hermes_async", "pyproject.toml", "constraints-dev.txt"} <= {*copied}
    for source in copied:
        assert (ROOT / source).exists(), source
        decided = [not line.startswith("!") for line in ignored if fnmatch(source, line.removeprefix("!"))]
        assert not decided[-1], source  # the last line that matches decides
    for secret in (".git", ".env", "tests"):
        assert [not line.startswith("!") for line in ignored if fnmatch(secret, line.removeprefix("!"))][-1], secret


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/health" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_asks_the_server(status: int, code: int, server: http.server.HTTPServer) -> None:
    server.status = status  # type: ignore[attr-defined]
    _, _, command = last("HEALTHCHECK").partition(" CMD ")
    python, *arguments = json.loads(command)
    assert python == "python"
    # A proxy that is meant for the hub must not be asked.
    env = os.environ | {"HERMES_ASYNC_PORT": str(server.server_port), "http_proxy": "http://127.0.0.1:9"}
    ended = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, b"")
