"""Measures the throughput of one, two and three replicas on Ray Serve while the disk is the limit.

    python -m benchmarks.replicas [--size 1] [--budget 0.4] [--limit 100] [--replicas 1,2,3] [--sessions 8] [--tokens 8]

A replica's sweep reads all weights that are not resident, and gives one token to each of its sessions. So n replicas
with s sessions each give at most n * s / max(read, compute) tokens a second: n times one replica's, if each has a disk
and cores of its own.

All nodes of the cluster are on this machine. Each is held at a disk rate of its own, by a cgroup, as n machines would
be by their disks; so n * limit must be well below this machine's rate. This shows that replicas do not hold each other
up, and what Ray itself costs. It shows nothing of a network between nodes. The cores are shared, too: `cores` says how
many were busy. Once that is all of them, more replicas cannot give more here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import llama_config, random_checkpoint
from benchmarks.disk import limited_disk
from hermes_async import SamplingParams

os.environ |= {  # before Ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_agent_register_timeout_ms": "240000",
}

MIB = 2**20
_PROMPT_TOKENS = 16
_NODE = {"num_cpus": 1, "object_store_memory": 80 * MIB, "include_dashboard": False}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.0, help="GiB of weights (default 1)")
    parser.add_argument("--budget", type=float, default=0.4, help="share of the weights given as budget (default 0.4)")
    parser.add_argument("--limit", type=int, default=100, help="MiB/s of each replica's disk (default 100)")
    parser.add_argument("--replicas", default="1,2,3", help="numbers of replicas (default 1,2,3)")
    parser.add_argument("--sessions", type=int, default=8, help="sessions of each replica (default 8)")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of each session (default 8)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoint: the disk to measure")
    args = parser.parse_args()
    config = llama_config(int(args.size * 2**30), torch.bfloat16)
    with random_checkpoint(config, torch.bfloat16, args.folder) as path:
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        print(f"{size / MIB:.0f} MiB of weights; each replica reads at most {args.limit} MiB/s", flush=True)
        points: list[dict[str, Any]] = []
        for count in args.replicas.split(","):
            points.append(measure(args, path, int(size * args.budget), int(count)))
            report(points)
    print(json.dumps({"points": points}))


def report(points: list[dict[str, Any]]) -> None:
    """Compares the newest point with the first, and prints it."""
    first, point = points[0], points[-1]
    point["times_the_first"] = point["tokens_per_s"] / first["tokens_per_s"]
    point["of_ceiling"] = point["tokens_per_s"] / point["ceiling_tokens_per_s"]
    print(
        f"  {point['replicas']} replicas: {point['tokens_per_s']:6.2f} tokens/s, {point['times_the_first']:.2f} times "
        f"{first['replicas']}; {point['of_ceiling']:.2f} of the disks' limit, {point['mib_per_s_of_a_replica']:.0f} "
        f"MiB/s each; {point['cores']:.2f} cores busy",
        flush=True,
    )


def measure(args: argparse.Namespace, path: Path, budget: int, num_replicas: int) -> dict[str, Any]:
    """Starts a cluster with as many nodes as replicas, and lets all sessions generate at once."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from hermes_async.integrations.ray_serve import build_app

    with contextlib.ExitStack() as exits:
        cluster = Cluster(initialize_head=True, head_node_args=_NODE)
        exits.callback(cluster.shutdown)
        for _ in range(num_replicas - 1):
            cluster.add_node(**_NODE)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        exits.callback(ray.shutdown)
        serve.start(proxy_location="Disabled")
        exits.callback(serve.shutdown)
        app = build_app(
            {
                "model": str(path),
                "memory": budget,
                "engine": {"max_sequences": args.sessions, "prompt_lookup": False},
                "num_replicas": num_replicas,
                "max_ongoing_requests": args.sessions,
                "no_auth": True,
            }
        )
        handle = serve.run(app)
        for replica in asyncio.run(_statistics(handle, num_replicas)).values():
            reason = exits.enter_context(limited_disk(path, args.limit * MIB, replica.process_id))
            if reason is not None:
                raise SystemExit(f"the disk cannot be held: {reason}")
        return {"replicas": num_replicas, **asyncio.run(generate(args, handle, num_replicas))}


async def generate(args: argparse.Namespace, handle: Any, num_replicas: int) -> dict[str, Any]:
    """Lets all sessions generate; the rate counts prompts and first tokens, too."""
    chosen = random.Random(0)
    params = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True)
    streams = handle.options(stream=True)
    arrivals: list[float] = []

    async def session(prompt: list[int]) -> None:
        async for chunk in streams.generate.remote(prompt, params):
            arrivals.extend([time.perf_counter()] * len(chunk.token_ids))

    before, busy = await _statistics(handle, num_replicas), _busy_seconds()
    started = time.perf_counter()
    prompts = [[chosen.randrange(2, 30000) for _ in range(_PROMPT_TOKENS)] for _ in range(num_replicas * args.sessions)]
    await asyncio.gather(*map(session, prompts))
    seconds, busy = time.perf_counter() - started, _busy_seconds() - busy
    after = await _statistics(handle, num_replicas)
    sweeps = {name: after[name].engine.sweeps - before[name].engine.sweeps for name in after}
    bytes_read = sum(after[name].engine.bytes_read - before[name].engine.bytes_read for name in after)
    per_sweep = bytes_read / sum(sweeps.values())
    return {
        "sessions": len(prompts),
        "tokens": len(arrivals),
        "seconds": seconds,
        "tokens_per_s": len(arrivals) / seconds,
        "ceiling_tokens_per_s": len(prompts) / (per_sweep / (args.limit * MIB)),
        "sweeps": list(sweeps.values()),
        "mib_per_sweep": per_sweep / MIB,
        "mib_per_s_of_a_replica": bytes_read / MIB / seconds / num_replicas,
        "cores": busy / seconds,
        "num_cores": os.cpu_count(),
    }


async def _statistics(handle: Any, num_replicas: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while len(found) < num_replicas:
        replica = await handle.statistics.remote()
        found[replica.replica_id] = replica
    return found


def _busy_seconds() -> float:
    """Seconds that all cores of the machine together were busy since it started, other programs included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system = (int(field) for field in fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
