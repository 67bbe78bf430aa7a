"""One answer as a command collects it, and the line of statistics after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hermes_async.cli.run import Interrupts
from hermes_async.config import SamplingParams, format_bytes, format_count

if TYPE_CHECKING:
    from hermes_async import Engine, EngineStatistics, Session
    from hermes_async.engine.prompt import Prompt
    from hermes_async.results import FinishReason


@dataclass
class Answer:
    """What one request has given so far. Times are in seconds since it was made."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first_token_s: float = 0.0
    total_s: float = 0.0

    def __str__(self) -> str:
        num_tokens = len(self.token_ids)
        line = f"{format_count(num_tokens, 'token')} in {self.total_s:.2f} s"
        decoding = self.total_s - self.first_token_s
        if num_tokens > 1 and decoding > 0:
            line += f" (the first after {self.first_token_s:.2f} s, then {(num_tokens - 1) / decoding:.1f} a second)"
        return line + (", stopped" if self.finish_reason == "abort" else "")


async def stream_answer(
    source: Engine | Session,
    prompt: Prompt,
    params: SamplingParams,
    interrupts: Interrupts,
    write: Callable[[str], object],
) -> Answer:
    """Passes each piece of text to `write` as it arrives. Ctrl-C ends the answer with `finish_reason` "abort"."""
    answer = Answer()
    started_at = time.perf_counter()
    with interrupts.scope():
        async with aclosing(source.generate(prompt, params)) as chunks:
            async for chunk in chunks:
                if not answer.token_ids:
                    answer.first_token_s = time.perf_counter() - started_at
                answer.token_ids += chunk.token_ids
                answer.text += chunk.text
                answer.finish_reason = chunk.finish_reason
                if chunk.text:
                    write(chunk.text)
    answer.total_s = time.perf_counter() - started_at
    answer.finish_reason = answer.finish_reason or "abort"
    return answer


def statistics_line(statistics: EngineStatistics) -> str:
    """A summary of what the engine has done."""
    hit_rate = statistics.expert_hit_rate
    experts = "" if hit_rate is None else f"{hit_rate:.0%} of the experts were in memory when they were needed; "
    return (
        f"{format_count(statistics.sweeps, 'sweep')}, {format_bytes(statistics.bytes_read)} read; {experts}"
        f"peak {format_bytes(statistics.peak_bytes_in_use)} of {format_bytes(statistics.memory_budget)}"
    )
