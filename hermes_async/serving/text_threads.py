"""Bounds how many threads tokenize texts at once, because none of them can be stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hermes_async.errors import RequestError
from hermes_async.storage.threads import check_cancelled, only_waiting, tells_cancelled

_SECONDS_BETWEEN_LOOKS = 0.1


class TextThreads:
    """Places for threads that tokenize.

    A regular expression of a tokenizer may take hours with some texts. The request ends at its time limit, and its
    thread works on. So at most `most` threads are lost to such texts. Then every other text is refused, until one is
    done.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # All mutable state, guarded by `_changed`: of each thread that has a place, whether its call was cancelled.
        self._changed = threading.Condition()
        self._under_way: list[Callable[[], bool]] = []

    @contextmanager
    def place(self) -> Iterator[None]:
        """A block in which this thread tokenizes. Waits for a place; a cancelled call waits no longer.

        Raises:
            RequestError: All places belong to calls that were cancelled, and whose threads work on.
        """
        is_cancelled = tells_cancelled()
        with only_waiting(), self._changed:
            while len(self._under_way) >= self._most:
                if all(is_lost() for is_lost in self._under_way):
                    raise RequestError(
                        f"the tokenizer is still at work on {self._most} texts of requests that have ended, and takes "
                        "no other text until it is done with one; a regular expression of the checkpoint's tokenizer "
                        "may take for ever with them. Prompts of token ids are taken"
                    )
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
                check_cancelled()
            self._under_way.append(is_cancelled)
        try:
            yield
        finally:
            with self._changed:
                self._under_way.remove(is_cancelled)
                self._changed.notify()
