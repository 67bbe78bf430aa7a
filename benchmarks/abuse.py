"""What bad clients do to a server, and to its other clients; `python -m benchmarks.service --abuse` runs it.

The server is `hermes-async serve` with the demo model, a process of its own. Each kind of abuse is counted by what came
of it. Throughout, another client streams the same greedy answer again and again; each must be bit for bit the first
one. At the end, the engine's statistics and the process's file descriptors must be as at the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from hermes_async.demo import MODEL_PATH

_PATH = "/v1/chat/completions"
_MESSAGES = [{"role": "user", "content": "Speak, good friends, and say what you have to tell."}]
_ASKED = {"messages": _MESSAGES, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True}
_NUM_CONNECTIONS = 1000
_NUM_EACH = 20
_PATIENCE_S = 120.0


def abuse() -> dict[str, Any]:
    """Runs all kinds of abuse, and returns counts by kind and outcome."""
    print("  limit: no answer of status 5xx, no crash, no leak, and the same tokens for everybody else", flush=True)
    with _server() as (process, port):
        result = asyncio.run(_all_kinds(port, process.pid))
        result["alive"] = process.poll() is None
        process.terminate()
        result["exit_code"] = process.wait(_PATIENCE_S)
    result["met"] = bool(
        result["alive"]
        and result["exit_code"] == 0
        and result["statistics_as_at_start"]
        and result["files_as_at_start"]
        and result["neighbour"]["same"] == result["neighbour"]["answers"] > 0
        and not any(outcome.startswith("5") for counts in result["kinds"].values() for outcome in counts)
    )
    return result


@contextlib.contextmanager
def _server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "hermes_async", "serve", str(MODEL_PATH), "--memory", "16MiB", "--port", "0"]
    command += ["--log-level", "error"]  # nobody reads its lines
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while "listening on" not in line:
            if not line:
                raise SystemExit("the server has ended")
            line = process.stderr.readline()
        try:
            yield process, int(line.strip().rpartition(":")[2])
        finally:
            process.kill()


async def _all_kinds(port: int, pid: int) -> dict[str, Any]:
    kinds: dict[str, Callable[[int], Awaitable[Counter[str]]]] = {
        "malformed JSON": lambda port: _bodies(port, [b"{", b"", b"[1,", b'{"messages": [}', b"[" * 50_000]),
        "wrong types": lambda port: _bodies(port, [json.dumps({**_ASKED, **each}).encode() for each in _WRONG_TYPES]),
        "a body of 10 MB": lambda port: _bodies(port, [b'{"messages": "' + b"a" * 10_000_000 + b'"}']),
        "invalid UTF-8": lambda port: _bodies(port, [b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}']),
        "lone surrogates": lambda port: _bodies(port, [json.dumps(_ASKED).replace("Speak", r"\ud800").encode()]),
        "1,000 connections at once": _many_connections,
        "half-open connections": _half_open,
        "clients that read a byte a second": _slow_readers,
        "disconnects at each point of a stream": _disconnects,
        "the same X-Request-Id twice": _same_ids,
    }
    reference = await _answer(port)
    await _until_idle(port)
    before, files = await _statistics(port), _num_files(pid)
    counts: dict[str, Any] = {"answers": 0, "same": 0}
    kinds_counts: dict[str, dict[str, int]] = {}
    over = asyncio.Event()

    async def stream_again_and_again() -> None:
        while not over.is_set():
            counts["answers"] += 1
            counts["same"] += await _answer(port) == reference

    neighbour = asyncio.create_task(stream_again_and_again())
    for name, run in kinds.items():
        answers = counts["answers"]
        kinds_counts[name] = dict(sorted((await run(port)).items()))
        while counts["answers"] < answers + 2 and not neighbour.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        print(f"  {name}: {kinds_counts[name]}", flush=True)
    over.set()
    await neighbour
    await _until_idle(port)
    after, files_after = await _statistics(port), _num_files(pid)
    print(f"  the other client: {counts['same']} of {counts['answers']} answers bit for bit the same")
    return {
        "kinds": kinds_counts, "neighbour": counts, "before": before, "after": after,
        "statistics_as_at_start": before == after, "files": [files, files_after],
        "files_as_at_start": files_after <= files,
    }  # fmt: skip


_WRONG_TYPES: list[dict[str, Any]] = [
    {name: value}
    for name in ("messages", "max_tokens", "temperature", "n", "stop", "seed", "logit_bias", "tools", "stream_options")
    for value in ("text", 1.5, -1, [], {}, [{}], True, 10**30)
]


# --- kinds of abuse ---


async def _bodies(port: int, bodies: list[bytes]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for body in bodies:
        async with _connection(port) as (reader, writer):
            with contextlib.suppress(ConnectionError):  # it may be refused before it was sent
                writer.write(_request(body))
                await writer.drain()
            counts[await _status(reader)] += 1
    return counts


async def _many_connections(port: int) -> Counter[str]:
    """All ask at once: more than may wait, so that some are refused."""
    counts: Counter[str] = Counter()

    async def ask() -> None:
        async with _connection(port) as (reader, writer):
            writer.write(_request(json.dumps({**_ASKED, "max_tokens": 2}).encode()))
            status = await _status(reader)
            text = await reader.read()
            counts[status if status != "200" else "200" if b"[DONE]" in text else "200, cut off"] += 1

    await asyncio.gather(*(ask() for _ in range(_NUM_CONNECTIONS)))
    return counts


async def _half_open(port: int) -> Counter[str]:
    """Clients that send nothing, a part of the headers, or a part of the body, and stay; the server must close them."""
    counts: Counter[str] = Counter()
    whole = _request(json.dumps(_ASKED).encode())
    head = whole.index(b"\r\n\r\n")

    async def ask(sent: bytes, name: str) -> None:
        async with _connection(port) as (reader, writer):
            writer.write(sent)
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await reader.read()
                counts[f"{name}: closed by the server"] += 1
            except TimeoutError:
                counts[f"{name}: still open after {_PATIENCE_S:g} s"] += 1
            except ConnectionError:
                counts[f"{name}: closed by the server"] += 1

    parts = {"nothing": b"", "half of the headers": whole[: head // 2], "half of the body": whole[: head + 20]}
    await asyncio.gather(*(ask(sent, name) for name, sent in parts.items() for _ in range(_NUM_EACH)))
    return counts


async def _slow_readers(port: int) -> Counter[str]:
    """Clients with the smallest buffer, that read a byte a second, and then go away."""
    counts: Counter[str] = Counter()

    async def ask() -> None:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.sock_sendall(sock, _request(json.dumps({**_ASKED, "max_tokens": 400}).encode()))
            for _ in range(5):
                counts["bytes read"] += len(await loop.sock_recv(sock, 1))
                await asyncio.sleep(1)
        counts["went away"] += 1

    await asyncio.gather(*(ask() for _ in range(_NUM_EACH)))
    return counts


async def _disconnects(port: int) -> Counter[str]:
    """Clients that go away while they send, before the first byte, and after each event of a stream."""
    counts: Counter[str] = Counter()
    whole = _request(json.dumps(_ASKED).encode())
    for length in (1, 40, whole.index(b"\r\n\r\n") + 4, len(whole) - 1, len(whole)):
        async with _connection(port) as (_, writer):
            writer.write(whole[:length])
            await writer.drain()
        counts["while sending"] += 1
    for num_events in range(1, 27):
        async with _connection(port) as (reader, writer):
            writer.write(whole)
            with contextlib.suppress(asyncio.IncompleteReadError):  # drafts make an answer shorter
                for _ in range(num_events):
                    await reader.readuntil(b"\n\n")
        counts["after an event"] += 1
    for num_bytes in range(1, 400, 29):
        async with _connection(port) as (reader, writer):
            writer.write(whole)
            await reader.readexactly(num_bytes)
            writer.transport.abort()  # with a reset
        counts["with a reset"] += 1
    return counts


async def _same_ids(port: int) -> Counter[str]:
    counts: Counter[str] = Counter()

    async def ask() -> None:
        async with _connection(port) as (reader, writer):
            writer.write(_request(json.dumps(_ASKED).encode(), "x-request-id: same\r\n"))
            counts[await _status(reader)] += 1
            await reader.read()

    await asyncio.gather(*(ask() for _ in range(_NUM_EACH)))
    return counts


# --- HTTP on plain sockets ---


@contextlib.asynccontextmanager
async def _connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _request(body: bytes, headers: str = "") -> bytes:
    return (
        f"POST {_PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n{headers}"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def _status(reader: asyncio.StreamReader) -> str:
    try:
        line = await reader.readline()
    except ConnectionError:
        return "reset"
    return line.split()[1].decode() if line else "closed"


async def _answer(port: int) -> str:
    """The text of the neighbour's answer."""
    async with _connection(port) as (reader, writer):
        writer.write(_request(json.dumps(_ASKED).encode()))
        text = (await reader.read()).decode()
    events = re.findall(r"^data: (\{.*\})$", text, re.MULTILINE)
    return "".join(json.loads(each)["choices"][0]["delta"].get("content", "") for each in events)


async def _statistics(port: int) -> dict[str, Any]:
    """The engine's statistics that are the same whenever nothing is under way."""
    async with _connection(port) as (reader, writer):
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        text = (await reader.read()).decode()
    found = dict(re.findall(r"^hermes_async_(\w+) (\S+)$", text, re.MULTILINE))
    names = ("num_running", "num_waiting", "num_paused", "num_sessions", "num_forwards", "bytes_resident")
    held = float(found["kv_bytes"]) - float(found["prefix_bytes"])
    return {name: float(found[name]) for name in names} | {"kv_bytes_of_requests": held}


async def _until_idle(port: int) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            statistics = await _statistics(port)
            if statistics["num_running"] + statistics["num_waiting"] == 0:
                return
            await asyncio.sleep(0.05)


def _num_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
