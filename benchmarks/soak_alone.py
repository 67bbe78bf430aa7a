"""Compares what the requests of a soak got with what the same requests get alone."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import anyio.to_thread

from hermes_async import Engine, SamplingParams

_SECONDS_BETWEEN_REPORTS = 60.0


@dataclass(frozen=True, slots=True)
class Record:
    """One request and its tokens, which are complete if it has a `finish_reason`."""

    kind: str
    prompt: Sequence[Any]
    params: SamplingParams
    token_ids: tuple[int, ...]
    finish_reason: str | None

    @property
    def asked(self) -> str:
        """What was asked for: two records that have it in common must have their tokens in common."""
        return repr((self.prompt, self.params))

    @property
    def tells_something(self) -> bool:
        """Whether there is anything to compare: it was not left before its first token."""
        return bool(self.token_ids) or self.finish_reason is not None


async def check_alone(
    engine: Engine, records: Path, failures: list[str], *, most: int, seconds: float, order: random.Random
) -> dict[str, Any]:
    """Runs requests again, one at a time and with nothing shared, and compares the tokens. All kinds come in turn.

    Args:
        engine: Without prefixes and drafts.
        failures: Gets each difference, and each kind of which no request could be compared.
        most: Requests to compare, at most.
        seconds: After which no further request is compared.
    """
    recorded = await anyio.to_thread.run_sync(_load, records)
    telling = [record for record in recorded if record.tells_something]
    by_asked: dict[str, list[Record]] = defaultdict(list)
    for record in telling:
        by_asked[record.asked].append(record)
    print(f"running up to {min(most, len(by_asked))} of {len(by_asked)} different requests again, alone", flush=True)
    differing, checked = 0, list[Record]()
    started = reported = time.monotonic()
    num_asked = 0
    for asked in _in_turn(telling, order):
        now = time.monotonic()
        if num_asked == most or now - started > seconds:
            break
        if now - reported > _SECONDS_BETWEEN_REPORTS:
            reported = now
            print(f"  {num_asked} compared in {(now - started) / 60:.0f} min", flush=True)
        num_asked += 1
        same = by_asked[asked]
        token_ids, reason = await _alone(engine, same)
        checked += same
        for record in same:
            if record.finish_reason is None:
                right = token_ids[: len(record.token_ids)] == record.token_ids
            else:
                right = (token_ids, reason) == (record.token_ids, record.finish_reason)
            if not right:
                differing += 1
                failures.append(_difference(record, token_ids))
    unchecked = {record.kind for record in telling} - {record.kind for record in checked}
    if unchecked:
        failures.append(f"there was no time to compare one of: {', '.join(sorted(unchecked))}")
    num_partial = sum(record.finish_reason is None for record in checked)
    print(
        f"{num_asked} of {len(by_asked)} different requests compared with the same alone, in "
        f"{time.monotonic() - started:.0f} s: {len(checked)} answers ({num_partial} left early), {differing} differ",
        flush=True,
    )
    return {
        "different_requests": len(by_asked),
        "checked_requests": num_asked,
        "checked_answers": len(checked),
        "checked_left_early": num_partial,
        "differing_answers": differing,
    }


def _in_turn(records: Iterable[Record], order: random.Random) -> list[str]:
    """What was asked for, each once: one of every kind, then another one of every kind, and so on."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for record in records:
        by_kind[record.kind].append(record.asked)
    kinds = [order.sample(asked, len(asked)) for _, asked in sorted(by_kind.items())]
    return list(dict.fromkeys(asked for turn in zip_longest(*kinds) for asked in turn if asked is not None))


async def _alone(engine: Engine, same: Sequence[Record]) -> tuple[tuple[int, ...], str | None]:
    """Tokens and finish reason of a request alone. If all of its users left it early, no more tokens than they took."""
    left_early = all(record.finish_reason is None for record in same)
    most = max(len(record.token_ids) for record in same) if left_early else sys.maxsize
    token_ids: list[int] = []
    reason: str | None = None
    async with aclosing(engine.generate(same[0].prompt, same[0].params)) as chunks:
        async for chunk in chunks:
            token_ids += chunk.token_ids
            reason = chunk.finish_reason
            if len(token_ids) >= most:
                break
    return tuple(token_ids), reason


def _load(records: Path) -> list[Record]:
    loaded = []
    with records.open("rb") as file, contextlib.suppress(EOFError):
        while True:
            loaded.append(pickle.load(file))
    return loaded


def _difference(record: Record, alone: tuple[int, ...]) -> str:
    common = 0
    for one, other in zip(record.token_ids, alone, strict=False):
        if one != other:
            break
        common += 1
    return (
        f"{record.kind}: {len(record.token_ids)} tokens ({record.finish_reason}), alone {len(alone)}, the first "
        f"{common} equal; prompt of length {len(record.prompt)}, {record.params}"
    )
