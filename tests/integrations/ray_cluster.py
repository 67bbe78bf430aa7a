"""A process with a Ray cluster of two nodes, which does what its standard input says. Ray stays out of the tests' own.

Each line is a JSON object: the name of a command, with its arguments. Each answer is one line, too.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from hermes_async import SamplingParams
from hermes_async.errors import ContextLengthError
from hermes_async.integrations.ray_serve import ReplicaStatistics, build_app

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
SECONDS_BETWEEN_LOOKS = 0.05


class Service:
    """A cluster of two nodes with replicas of the application; each public method is a command."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args=NODE)
        self._second = self._cluster.add_node(**NODE)
        self._processes: set[int] = set()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": self._port}, proxy_location="HeadOnly")

    def deploy(self, args: dict[str, Any]) -> int:
        """Returns the port when all replicas run, and the old ones are told to stop."""
        serve.run(build_app(args))
        self._handle = serve.get_app_handle("default")
        return self._port

    def replicas(self, num_replicas: int) -> list[str]:
        """The ids of all replicas."""
        return sorted(self._statistics(num_replicas))

    def tokens_when_idle(self, num_replicas: int) -> int:
        """Waits until no replica has a request; returns how many tokens all have generated."""
        while True:
            statistics = [replica.engine for replica in self._statistics(num_replicas).values()]
            if not any(engine.num_running + engine.num_waiting for engine in statistics):
                return sum(engine.tokens_generated for engine in statistics)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def generate(self, prompt: str, params: dict[str, Any], *, most: int | None = None) -> dict[str, Any]:
        """Through a handle. After `most` chunks, the request is cancelled."""
        response = self._handle.options(stream=True).generate.remote(prompt, SamplingParams(**params))
        chunks = []
        try:
            for chunk in response:
                chunks.append(chunk)
                if len(chunks) == most:
                    response.cancel()
                    break
        except ContextLengthError:
            return {"error": "ContextLengthError"}
        text = "".join(chunk.text for chunk in chunks)
        return {"text": text, "finish_reason": chunks[-1].finish_reason, "num_chunks": len(chunks)}

    def kill_node(self) -> None:
        """Kills all processes of the second node."""
        self._processes |= descendants()
        self._cluster.remove_node(self._second, allow_graceful=False)

    def stop(self) -> list[int]:
        """Ends the cluster; returns the processes of it that are still there."""
        self._processes |= descendants()
        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()
        deadline = time.monotonic() + 30
        while left := sorted(self._processes & running()):
            if time.monotonic() > deadline:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return left

    def _statistics(self, num_replicas: int) -> dict[str, ReplicaStatistics]:
        """Asks until that many different replicas have answered."""
        found: dict[str, ReplicaStatistics] = {}
        while len(found) < num_replicas:
            replica = self._handle.statistics.remote().result(timeout_s=30)
            found[replica.replica_id] = replica
        return found


def parents() -> dict[int, int]:
    """The parent of each process that is not a zombie."""
    rows = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    split = [row.split() for row in rows.splitlines()]
    return {int(pid): int(parent) for pid, parent, state in split if not state.startswith("Z")}


def running() -> set[int]:
    return set(parents())


def descendants() -> set[int]:
    """The processes that this one has started, and those that they have started."""
    parent_of, found = parents(), {os.getpid()}
    while more := {pid for pid, parent in parent_of.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is not an answer
    try:
        service = Service()
        for line in sys.stdin:
            asked = json.loads(line)
            command: Callable[..., Any] = getattr(service, asked.pop("command"))
            print(json.dumps(command(**asked)), file=answers, flush=True)
    finally:  # after `stop`, there are none
        for process_id in descendants():
            os.kill(process_id, signal.SIGKILL)


if __name__ == "__main__":
    main()
