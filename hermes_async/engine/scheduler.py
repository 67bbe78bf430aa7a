"""Decides, before each sweep, which sequences take part and with how many tokens. Synchronous; does no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from hermes_async.engine.request import Request


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's share of a sweep.

    Attributes:
        token_ids: A chunk of the prompt, or the last token.
        samples: Whether these are all its pending tokens, so that the next one can be chosen.
    """

    request: Request
    token_ids: list[int]
    samples: bool


class Scheduler:
    """Packs prompts and decodes together: every decoding sequence first, then prompts in the order they came.

    Args:
        max_tokens: Most tokens of a sweep.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._running: list[Request] = []

    @property
    def running(self) -> tuple[Request, ...]:
        return tuple(self._running)

    def add(self, request: Request) -> None:
        self._running.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out; nothing happens if it is not in."""
        if request in self._running:
            self._running.remove(request)

    def schedule(self) -> list[Scheduled]:
        """The next sweep; empty when there is nothing to do."""
        room = self.max_tokens
        sweep: list[Scheduled] = []
        pending = [(request, request.pending) for request in self._running]
        for request, token_ids in sorted(pending, key=lambda item: len(item[1]) > 1):
            chunk = list(token_ids[:room])
            if not chunk:
                break
            sweep.append(Scheduled(request, chunk, samples=len(chunk) == len(token_ids)))
            room -= len(chunk)
        return sweep
