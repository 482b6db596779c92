"""Jobs through a Ray of this machine."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import pytest

from vitexp.errors import UserError
from vitexp.sweeps.ledger import State
from vitexp.sweeps.local import Limits
from vitexp.sweeps.ray import Ray, RayJob

RUN = ["data=fake", "data.num_train=64", "data.num_val=16", "model=vit_debug", "tracking=none", "train.workers=0"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=re.escape("pip install 'vitexp[ray]'")):
        Ray(1)


def ended(job: RayJob, *, seconds: float = 200) -> tuple[State, str]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (became := job.poll()) is not None:
            return became
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.mark.slow
def test_jobs_finish_fail_stop_and_are_lost(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs pip install 'vitexp[ray]'")
    before = signal.getsignal(signal.SIGTERM)
    launcher = Ray(2, cpus=0.5)
    assert signal.getsignal(signal.SIGTERM) is before, "a sweep could not be stopped in order any more"

    def begin(name: str, *arguments: str) -> RayJob:
        words = [*RUN, *arguments, f"output_dir={tmp_path / name}"]
        return launcher.start(words, slot=0, console=tmp_path / f"{name}.log", heard=lambda: 0.0, limits=Limits())

    try:
        good, wrong = begin("good", "train.epochs=2"), begin("wrong", "model.depht=3")
        assert ended(good) == ("finished", "")
        assert (tmp_path / "good" / "summary.json").exists()
        assert ended(wrong)[0] == "failed"
        assert "Did you mean 'model.depth'" in ended_reason(tmp_path / "wrong.log")
        stopped, lost = (begin(name, "train.epochs=20000", "train.save_every=50") for name in ("stopped", "lost"))
        until = time.monotonic() + 150
        while len(list(tmp_path.glob("*/metrics.jsonl"))) < 3 and time.monotonic() < until:
            assert stopped.poll() is None
            assert lost.poll() is None
            time.sleep(0.1)
        stopped.stop("pruned", "others were better")
        assert ended(stopped) == ("pruned", "others were better")
        assert list(tmp_path.glob("stopped/checkpoints/step_*")), "it saved before it ended"
        ray.kill(lost._actor)
        state, reason = ended(lost)
        assert state == "killed"
        assert "lost by Ray" in reason
    finally:
        ray.shutdown()


def ended_reason(console: Path) -> str:
    return console.read_text(errors="replace")
