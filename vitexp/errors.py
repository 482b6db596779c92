"""Errors that a person caused and can mend. The command line prints their text alone, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Names the key or file, what was given, and what is allowed, in at most three lines."""


class BadImage(UserError):
    """A picture that cannot be read, or not rightly. Never replaced by another one."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple:  # travels out of loader workers
        return type(self), (self.name, self.reason)


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known word most like the given one, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
