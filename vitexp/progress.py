"""What a person sees while a run goes on: one bar in a terminal, else a plain line now and then.

Showing must never cost a run anything: a closed or full pipe, a stopped terminal, an ASCII locale or a missing home
folder only make it silent or plainer. What is shown is not a record; the journal is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

Values = Mapping[str, float]


class Display:
    """Progress of one run on standard error: steps, time left, and the latest `train/loss`, `train/lr`, images/s.

    `step` is called after every update and looks at the clock only; `log` when there are new numbers; `line` for
    what is to be read at once. With `enabled=False` (every rank but the first) nothing happens.
    Use it in a `with` block, or call `close`."""

    def __init__(
        self,
        *,
        total: int,
        start: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        bar_every_s: float = 0.2,
        line_every_s: float = 5.0,
    ) -> None:
        self.total = total
        self._out = _Sink(stream if stream is not None else sys.stderr) if enabled else None
        self._bar = _bar(self._out, total, start) if self._out is not None and self._out.isatty() else None
        self._every = bar_every_s if self._bar is not None else line_every_s
        self._values: Values | Callable[[], Values] = {}
        self._done = self._shown = start
        self._shown_at = time.monotonic()
        self._rate: float | None = None  # updates a second, smoothed
        # A sign of life early on, then at the usual pace.
        self._due = self._shown_at + min(1.0, self._every) if self._out is not None else float("inf")

    def step(self, done: int) -> None:
        """`done` updates of the run are made. Draws when it is time to, and takes about 0.1 us otherwise."""
        self._done = done
        if time.monotonic() >= self._due:
            self._draw()

    def log(self, values: Values | Callable[[], Values]) -> None:
        """The numbers to show from now on, named as in metrics.jsonl, as floats or as a function that gives them.
        The function is called when something is drawn, so that a device is waited for only then."""
        self._values = values

    def busy(self, text: str) -> None:
        """What is being done between steps, such as `evaluating 64/360`; shown now and then, as steps are."""
        if time.monotonic() >= self._due:
            self._draw(instead=text)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around an evaluation or a save: its time is no slow training in what is said of the time left."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._shown_at += time.monotonic() - began

    def line(self, text: str) -> None:
        """A line above the bar, or of its own, at once."""
        if self._out is None:
            return
        if self._bar is not None:
            self._bar.clear()
        self._out.write(f"{text}\n")
        if self._bar is not None:
            self._bar.refresh()
        self._out.flush()

    def close(self) -> None:
        """Show the last state and let the terminal go. Calling it again does nothing."""
        if self._out is None:
            return
        if self._done > self._shown or self._bar is not None:
            self._draw()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._out.flush()
        self._out, self._due = None, float("inf")

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self, instead: str = "") -> None:
        assert self._out is not None
        now = time.monotonic()
        elapsed, steps = now - self._shown_at, self._done - self._shown
        if steps > 0 and elapsed > 0:
            recent = steps / elapsed
            weight = 1 - 0.5 ** (elapsed / 10)  # half of it is from the last ten seconds
            self._rate = recent if self._rate is None else (1 - weight) * self._rate + weight * recent
        self._shown, self._shown_at = self._done, now
        values = self._values() if callable(self._values) else self._values
        words = [instead] if instead else self._words(values)
        if self._bar is not None:
            self._bar.n, self._bar.ncols = self._done, self._out.columns()
            self._bar.set_postfix_str("  ".join(words), refresh=False)
            self._bar.refresh()
        else:
            place = [f"step {self._done}/{self.total}", f"{100 * self._done / max(1, self.total):.0f} %"]
            if "epoch" in values:
                place.append(f"epoch {values['epoch']:.2f}")
            self._out.write("  ".join(place + words) + "\n")
        self._out.flush()
        self._due = time.monotonic() + self._every

    def _words(self, values: Values) -> list[str]:
        words = []
        if "train/loss" in values:
            words.append(f"loss {values['train/loss']:.4f}")
        if "train/lr" in values:
            words.append(f"lr {values['train/lr']:.2e}")
        if speed := values.get("perf/images_per_s"):
            words.append(f"{speed:.0f} img/s" if speed >= 10 else f"{speed:.2f} img/s")
        if self._rate:
            words.append(f"{_duration((self.total - self._done) / self._rate)} left")
        return words


class _Sink:
    """A text stream that takes what it can and never raises, waits, or ends a run."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None: the process has no standard error
        self.encoding = getattr(stream, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        with contextlib.suppress(Exception):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError(errno.EBADF, "no stream")
        return self._stream.fileno()

    def columns(self) -> int:
        """Width of the terminal now. Some say 0 (expect, a container's): tqdm would show nothing then."""
        with contextlib.suppress(OSError, ValueError):
            return os.get_terminal_size(self.fileno()).columns or 80
        return 80

    def write(self, text: str) -> int:
        if self._stream is None or not self._has_room():
            return len(text)
        try:
            self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        except Exception:  # whatever a stream thinks of: closed, broken pipe, full disk, a notebook's own
            self._stream = None
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except Exception:
                self._stream = None

    def _has_room(self) -> bool:
        """False where writing would wait: a pipe nobody reads, a terminal stopped with Ctrl-S. Left out, not kept."""
        try:
            return bool(select.select([], [self.fileno()], [], 0)[1])
        except Exception:  # no descriptor (a notebook), or one that select cannot take (Windows, above 1023)
            return True


def _bar(sink: _Sink, total: int, start: int) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no watching thread: Display decides when to draw, and loader workers are forked

    return Bar(
        total=total,
        initial=start,
        file=sink,
        ascii=not _unicode_terminal(),
        ncols=sink.columns(),
        leave=True,
        bar_format="{percentage:3.0f}% |{bar:10}| {n_fmt}/{total_fmt}{postfix}",
    )


def _unicode_terminal() -> bool:
    """Whether the locale says that block characters can be shown. Python itself writes UTF-8 under LANG=C too."""
    locale = next((value for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := os.environ.get(name))), "")
    return "UTF8" in locale.upper().replace("-", "")


def _duration(seconds: float) -> str:
    """`0:07`, `12:34`, `3:05:00`, `2 d 4 h`."""
    seconds = max(0, round(seconds))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
