"""A stand-in for the Hugging Face hub, on this machine's own loopback."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import close_session


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has read enough closes its connection, which is no error to be printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """A stand-in for the hub: serves from memory as much of a repository as `snapshot_download` asks for."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.errors: dict[str, tuple[int, str]] = {}
        self.downloads: set[str] = set()
        self.ranges: dict[str, list[str]] = {}
        self.bytes_sent: dict[str, int] = {}
        self.knows_ranges = True
        self.authorizations: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer()

            def do_HEAD(self) -> None:
                self.answer()

            def answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                if path.startswith("/api/models/") or not path.startswith("/api/"):  # not the client's own affairs
                    hub.authorizations.add(self.headers.get("Authorization"))
                status, body, headers = hub.response(path)
                asked = self.headers.get("Range")
                if status == 200 and asked and hub.knows_ranges:
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    hub.ranges.setdefault(path.rpartition("/")[2], []).append(asked)
                    status, whole = 206, len(body)
                    body = body[int(first) : int(last) + 1]
                    headers["Content-Range"] = f"bytes {first}-{int(first) + len(body) - 1}/{whole}"
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    name = path.rpartition("/")[2]
                    hub.bytes_sent[name] = hub.bytes_sent.get(name, 0) + len(body)
                    self.wfile.write(body)

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def commit(self, repo_id: str) -> str:
        return hashlib.sha1(repo_id.encode(), usedforsecurity=False).hexdigest()

    def response(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        for repo_id, (status, code) in self.errors.items():
            if f"/{repo_id}/" in path + "/":
                return status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"}
        for repo_id, files in self.files.items():
            commit = self.commit(repo_id)
            if path == f"/api/models/{repo_id}/revision/main":
                return self.json({"id": repo_id, "sha": commit, "siblings": [{"rfilename": f} for f in files]})
            if path == f"/api/models/{repo_id}/tree/{commit}":
                return self.json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": self.oid(data)}
                        for name, data in files.items()
                    ]
                )
            if path.startswith(f"/api/models/{repo_id}/revision/"):
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            prefix = f"/{repo_id}/resolve/{commit}/"
            if path.startswith(prefix):
                name = path.removeprefix(prefix)
                self.downloads.add(name)
                return 200, files[name], {"X-Repo-Commit": commit, "ETag": f'"{self.oid(files[name])}"'}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    @staticmethod
    def oid(data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    @staticmethod
    def json(value: Any) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


@pytest.fixture(name="hub")
def hub_fixture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
    template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)  # nothing here shall be taken for a hub id's directory
    close_session()  # made with the settings of before
    thread = threading.Thread(target=stand_in.server.serve_forever, args=(0.01,))
    thread.start()
    yield stand_in
    close_session()
    stand_in.server.shutdown()
    stand_in.server.server_close()
    thread.join()
