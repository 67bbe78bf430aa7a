"""Opens thousands of damaged checkpoints: `python -m tests.fuzz --mutations 100000 --seed 1`.

Each case is opened in a process that was forked when everything was imported, and that opens one case after another. It
is killed when a case takes too long. Only errors of ours are right, within the limits; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from os import _exit as leave_at_once  # neither the parent's handlers nor its buffers
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import hermes_async.engine.opening  # noqa: F401  # before any fork
from tests.fuzz.corpus import make_corpus
from tests.fuzz.opening import Cases, as_json, chosen

MAX_SECONDS = 5.0
"""CPU time that a case may take."""
MAX_BYTES = 200 * 2**20
"""Memory that a case may take beyond what the process took before."""

_PATIENCE = 20  # a process that only waits is killed after so many times MAX_SECONDS
_LOOK_S = 0.2
_MOST_BYTES = 3 * 2**30  # of addresses beyond those of the process: a case cannot take all memory of the machine
_CASES_PER_PROCESS = 500
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--only", help="a part, such as 'config'")
    parser.add_argument("--seconds", type=float, default=MAX_SECONDS, help="CPU time that a case may take")
    parser.add_argument("--minutes", type=float, help="no further case begins after this time")
    parser.add_argument("--show", type=int, default=3, help="how many cases of each kind of failure are shown")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="hermes-fuzz-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        os.environ["HF_HUB_OFFLINE"] = "1"
        return _run(Path(folder), options)


def _run(folder: Path, options: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # a forked process does not have the threads of its parent

    logging.disable(logging.CRITICAL)
    with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
        make_corpus(folder / "corpus")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failures: dict[str, list[dict[str, Any]]] = defaultdict(list)
    slowest, largest = 0.0, 0
    worker: _Worker | None = None
    started = time.monotonic()
    for number in range(options.first, options.first + options.mutations):
        if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
            break
        if worker is None or worker.num_cases >= _CASES_PER_PROCESS:
            if worker is not None:
                worker.close()
            worker = _Worker(folder, options)
        result = worker.run(number)
        if result["outcome"] in ("slow", "died"):
            worker = None
        else:
            slowest, largest = max(slowest, result["seconds"]), max(largest, result["more_bytes"])
        counts[result["part"]][result["outcome"]] += 1
        if result["outcome"] not in ("opened", "refused"):
            kind = f"{result['outcome']} {result['part']}: {result['error'][:60]}"
            failures[kind].append(result)
            if len(failures[kind]) <= options.show:
                print(json.dumps(result), flush=True)
    if worker is not None:
        worker.close()
    for part, outcomes in sorted(counts.items()):
        print(f"  {part}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    num_failures = sum(map(len, failures.values()))
    summary = {
        "mutations": sum(map(Counter.total, counts.values())), "seed": options.seed, "failures": num_failures,
        "outcomes": dict(sum(counts.values(), Counter())), "slowest_s": round(slowest, 2),
        "largest_mib": round(largest / 2**20, 1), "minutes": round((time.monotonic() - started) / 60, 1),
    }  # fmt: skip
    print(json.dumps(summary))
    return 1 if num_failures else 0


class _Worker:
    """A forked process that opens cases."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.num_cases = 0
        self._folder, self._seconds = folder, options.seconds
        self._seed, self._only = options.seed, options.only
        (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
        sys.stdout.flush()
        self._process_id = os.fork()
        if self._process_id == 0:
            os.close(ours_in)
            os.close(ours_out)
            _serve(folder, options, theirs_in, theirs_out)
        os.close(theirs_in)
        os.close(theirs_out)
        self._answers, self._numbers = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "w")

    def run(self, number: int) -> dict[str, Any]:
        """The result of a case. After "slow" or "died", the process is gone."""
        self.num_cases += 1
        print(number, file=self._numbers, flush=True)
        _, part, model = chosen(number, self._seed, self._only)
        about: dict[str, Any] = {"number": number, "part": part, "what": model.name}
        before, num_looks = self._cpu_seconds(), 0
        while not select.select([self._answers], [], [], _LOOK_S)[0]:
            seconds = self._cpu_seconds() - before
            num_looks += 1  # not the clock, which goes on while both processes are stopped
            if seconds > self._seconds or num_looks * _LOOK_S > _PATIENCE * self._seconds:
                threads = self._threads()
                self.close(kill=True)
                failed = {"outcome": "slow", "error": f"{seconds:.1f} s of computation", "threads": threads}
                return about | failed | {"seconds": seconds, "more_bytes": 0}
        line = self._answers.readline()
        if not line:
            status = self.close()
            return about | {"outcome": "died", "error": f"status {status}", "seconds": 0.0, "more_bytes": 0}
        result: dict[str, Any] = json.loads(line)
        if result["seconds"] > self._seconds:
            result |= {"outcome": "slow", "error": f"{result['seconds']:.1f} s; {result['outcome']} {result['error']}"}
            self.close(kill=True)
        elif result["more_bytes"] > MAX_BYTES:
            result |= {"outcome": "memory", "error": f"{result['more_bytes'] >> 20} MiB; {result['error']}"}
        return result

    def close(self, *, kill: bool = False) -> int:
        """Ends the process, and returns its status."""
        self._answers.close()
        with contextlib.suppress(BrokenPipeError):
            self._numbers.close()
        if kill:
            os.kill(self._process_id, signal.SIGKILL)
        return os.waitpid(self._process_id, 0)[1]

    def _threads(self) -> list[str]:
        """Where the process's threads are, the last call first."""
        os.kill(self._process_id, signal.SIGUSR1)
        time.sleep(0.5)  # the process may be too busy to answer
        with contextlib.suppress(OSError):
            return (self._folder / f"threads-{self._process_id}").read_text().splitlines()[:60]
        return []

    def _cpu_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self._process_id}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _TICKS


def _serve(folder: Path, options: argparse.Namespace, numbers: int, answers: int) -> None:
    """The forked process: reads numbers of cases, and writes what each is, and then its result."""
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        if "HERMES_FUZZ_STDERR" not in os.environ:
            for fd in (1, 2):
                os.dup2(null, fd)
        addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (addresses + _MOST_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        traces = (folder / f"threads-{os.getpid()}").open("w")
        faulthandler.register(signal.SIGUSR1, file=traces)
        own = folder / f"worker-{os.getpid()}"
        cases = Cases(folder / "corpus", own, options.seed, options.only)
        with os.fdopen(numbers) as source, os.fdopen(answers, "w") as out:
            for line in source:
                print(json.dumps(_result(cases, int(line), options)), file=out, flush=True)
        status = 0
    finally:
        leave_at_once(status)


def _result(cases: Cases, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """What came of a case, or what is wrong with the fuzzer itself."""
    try:
        return as_json(cases.run(number))
    except Exception:
        _, part, model = chosen(number, options.seed, options.only)
        about = {"number": number, "part": part, "what": model.name, "seconds": 0.0, "more_bytes": 0}
        return about | {"outcome": "broken", "error": traceback.format_exc()[-2000:]}


if __name__ == "__main__":
    raise SystemExit(main())
