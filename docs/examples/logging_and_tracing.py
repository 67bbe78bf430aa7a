"""Logging, events and a trace, switched on: python logging_and_tracing.py [MODEL [TRACE]].

Afterwards, `hermes-async timeline trace.json -o trace.png` draws the trace. Perfetto opens it, too.
"""

import logging
import sys

import anyio

from hermes_async import Engine, RequestEvent, SamplingParams
from hermes_async.demo import MODEL_PATH

log = logging.getLogger("my_service")


def on_event(event: RequestEvent) -> None:
    """Logs each step of each request. This runs on the event loop: do not block here."""
    log.info("%s %s after %.3f s", event.request_id, event.kind, event.timings.total_s)


async def main(model: str = str(MODEL_PATH), trace: str = "trace.json") -> None:
    """Runs two requests, and says what the engine did."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("hermes_async").setLevel(logging.DEBUG)
    async with Engine(model, on_event=on_event, trace=trace) as engine, anyio.create_task_group() as tasks:
        for prompt in ("ROMEO:", "JULIET:"):
            tasks.start_soon(engine.complete, prompt, SamplingParams(max_tokens=16))
    counts = engine.statistics()  # also after the engine was closed
    log.info("%d tokens in %d sweeps, %d bytes read", counts.tokens_generated, counts.sweeps, counts.bytes_read)
    log.info("the trace is in %s", trace)


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
