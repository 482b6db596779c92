from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time

import pytest

from vitexp.progress import Display, _duration

VALUES = {"train/loss": 0.53214, "train/lr": 5e-4, "perf/images_per_s": 1234.4, "epoch": 1.5}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def finish(display: Display, *, first: int = 0, total: int = 30, pause_s: float = 0.0) -> None:
    with display:
        for done in range(first + 1, total + 1):
            display.step(done)
            display.log(VALUES)
            time.sleep(pause_s)


def test_a_terminal_gets_one_bar_with_loss_lr_speed_and_time_left():
    out = Terminal()
    finish(Display(total=30, stream=out, bar_every_s=0), pause_s=0.001)
    drawn = out.getvalue().split("\r")
    assert out.getvalue().count("\n") == 1
    assert len(drawn) > 20
    assert "100%" in drawn[-1]
    assert "30/30" in drawn[-1]
    for part in ("loss 0.5321", "lr 5.00e-04", "1234 img/s", "0:00 left"):
        assert part in drawn[-1]


def test_a_bar_is_redrawn_only_every_interval():
    out = Terminal()
    finish(Display(total=30, stream=out, bar_every_s=60))
    assert len(out.getvalue().split("\r")) <= 4


def test_a_line_stands_above_the_bar():
    out = Terminal()
    with Display(total=9, stream=out) as display:
        display.step(3)
        display.line("step 3: val/top1 0.5")
        display.step(4)
    assert "step 3: val/top1 0.5\n" in out.getvalue()
    before, after = out.getvalue().split("step 3: val/top1 0.5\n")
    assert before.endswith("\r")  # the bar was wiped first
    assert "4/9" in after


def test_a_pipe_gets_plain_lines_now_and_then():
    out = io.StringIO()
    with Display(total=400, stream=out, line_every_s=0.1) as display:
        for done in range(1, 301):
            display.step(done)
            display.log(VALUES)
            time.sleep(0.001)
        display.line("val/top1 0.5")
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue()
    assert "val/top1 0.5" in lines
    assert 3 <= len(lines) <= 20
    assert lines[-1].startswith("step 300/400  75 %  epoch 1.50  loss 0.5321  lr 5.00e-04  1234 img/s  0:0")
    assert lines[-1].endswith(" left")


def test_other_ranks_show_nothing_and_read_no_number():
    out = Terminal()
    display = Display(total=5, stream=out, enabled=False, bar_every_s=0)
    display.log(lambda: pytest.fail("asked for numbers"))
    display.step(3)
    display.line("hello")
    display.close()
    assert out.getvalue() == ""


def test_numbers_are_asked_for_only_when_they_are_drawn():
    asked = []
    display = Display(total=5000, stream=io.StringIO(), line_every_s=3600)
    display._due = float("inf")
    for done in range(1, 5000):
        display.step(done)
        display.log(lambda: asked.append(1) or VALUES)
    assert not asked
    display.close()
    assert asked == [1]


def test_a_resumed_run_shows_its_place_and_no_borrowed_speed():
    out = io.StringIO()
    display = Display(total=1000, start=900, stream=out)
    display._shown_at -= 10  # ten seconds ago
    display.step(950)
    display.close()
    assert "step 950/1000" in out.getvalue()
    assert "0:10 left" in out.getvalue()


def test_a_line_is_shown_at_once_and_a_pause_does_not_count_as_slow_steps():
    out = io.StringIO()
    display = Display(total=100, stream=out)
    display.step(50)
    display._shown_at -= 1  # 50 steps in a second
    with display.pause():
        time.sleep(0.3)
    display.line("step 50  val/top1 93.02 %")
    assert out.getvalue() == "step 50  val/top1 93.02 %\n"
    display._draw()
    assert 48 < display._rate < 51


def test_an_ascii_stream_and_locale_get_ascii(monkeypatch):
    for name in ("LC_ALL", "LC_CTYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "C")
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    out.isatty = lambda: True
    with Display(total=3, stream=out, bar_every_s=0) as display:
        display.step(2)
        display.line("class 金鱼")
    out.flush()
    text = raw.getvalue().decode("ascii")
    assert "#" in text
    assert "class ??" in text


def test_no_stream_and_a_closed_one_are_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    finish(Display(total=30, line_every_s=0))
    closed = Terminal()
    display = Display(total=30, stream=closed, bar_every_s=0)
    closed.close()
    finish(display)


def test_a_pipe_without_reader_and_a_full_pipe_do_not_stop_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    broken = open(writer, "w", buffering=1)  # noqa: SIM115
    finish(Display(total=30, stream=broken, line_every_s=0))
    with pytest.raises(BrokenPipeError):  # so it was broken all the time
        broken.close()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            pass
    os.set_blocking(writer, True)
    with open(writer, "w", buffering=1) as full:
        finish(Display(total=30, stream=full, line_every_s=0))  # would wait for ever
        os.read(reader, 1 << 20)
        display = Display(total=30, stream=full)
        display.line("there is room again")
        assert os.read(reader, 1 << 20).endswith(b"there is room again\n")
    os.close(reader)


def test_a_broken_standard_error_leaves_the_exit_code_alone():
    code = (
        "import sys; sys.stdin.read(1)\n"
        "from vitexp.progress import Display\n"
        "with Display(total=9, line_every_s=0) as display:\n"
        "    for done in range(10): display.step(done); display.line('here')\n"
        "print('trained')"
    )
    reader, writer = os.pipe()
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "LANG", "LC_ALL", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writer,
        env=environment | {"LC_ALL": "C"},
    )
    os.close(writer)
    os.close(reader)
    out, _ = process.communicate(b"x", timeout=60)
    assert (process.returncode, out) == (0, b"trained\n")


def test_a_real_terminal_is_recognised():
    master, slave = os.openpty()
    with open(slave, "w") as terminal:
        with Display(total=3, stream=terminal, bar_every_s=0) as display:
            display.step(3)
        seen = b""
        while not seen.endswith(b"\n"):
            seen += os.read(master, 1 << 16)
        assert b"| 3/3" in seen
    os.close(master)


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "0:07"), (754, "12:34"), (11100, "3:05:00"), (187200, "2 d 4 h"), (-1, "0:00")]
)
def test_durations_read_well(seconds, text):
    assert _duration(seconds) == text
