"""SIGTERM and SIGINT ask a run to stop: it finishes the step, saves, and exits with 143 or 130."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Self


class Interrupted(BaseException):
    """A person or a scheduler asked the run to stop. exit_code is 128 + the signal, as shells report it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


class StopRequest:
    """Remembers the first signal while the loop runs, raises at once outside it. A second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False  # True inside the loop, which looks at signum after each step
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            os._exit(128 + signum)
        first = self.signum is None
        self.signum = signum
        if not self.deferred:
            raise Interrupted(signum)
        if first:
            note = "finishing this step and saving; Ctrl-C again leaves at once"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{note}\n".encode())

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum)
