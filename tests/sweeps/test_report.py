"""The report of a sweep against sums made by hand: means over seeds, effects, the best, and what did not finish."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from vitexp.statistics import marginal_effects
from vitexp.sweeps.ledger import Entry, Ledger
from vitexp.sweeps.report import find, in_ranges, write_report

RATES, OPTIMS, SEEDS = ("1e-4", "1e-3"), ("adam", "sgd"), ("0", "1", "2")


def accuracy(optim: str, rate: str, seed: str) -> float:
    return {"adam": 0.6, "sgd": 0.5}[optim] + {"1e-4": 0.0, "1e-3": 0.2}[rate] + 0.01 * int(seed) ** 2


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Twelve jobs: one failed although its folder holds results, one has a metric that is no number."""
    made = Ledger(tmp_path / "sweep", [], ["optim", "optim.lr", "seed"])
    for optim, rate, seed in itertools.product(OPTIMS, RATES, SEEDS):
        name = f"{optim}-{rate}-{seed}"
        overrides = ["data=fake", f"optim={optim}", f"optim.lr={rate}", f"seed={seed}"]
        made.jobs[name] = Entry(overrides, "finished", attempts=1, minutes=1.5)
        value = accuracy(optim, rate, seed)
        folder = made.folder / name
        folder.mkdir(parents=True)
        rows = [{"step": n, "epoch": n, "val/top1": value * n / 3} for n in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text(json.dumps({"val/top1": value, "val/loss": 1 - value}))
    failed = made.jobs["adam-1e-3-2"]
    failed.state, failed.reason = "failed", "out of | memory"
    (made.folder / "sgd-1e-3-2" / "summary.json").write_text('{"val/top1": NaN}')
    made.write()
    return made


def test_means_effects_and_the_best_are_of_what_finished(ledger: Ledger) -> None:
    found = find(ledger, metric=None, maximize=True)
    assert found.metric == "val/top1"
    kept = {
        (optim, rate, seed): accuracy(optim, rate, seed)
        for optim, rate, seed in itertools.product(OPTIMS, RATES, SEEDS)
        if (optim, rate, seed) not in (("adam", "1e-3", "2"), ("sgd", "1e-3", "2"))
    }
    for setting in found.settings:
        optim, rate = (word.partition("=")[2] for word in setting.name.split())
        values = [value for (o, r, _), value in kept.items() if o == optim and float(r) == float(rate)]
        assert setting.spread.n == len(values)
        assert setting.spread.mean == pytest.approx(statistics.mean(values))
        assert setting.spread.std == pytest.approx(statistics.stdev(values))
    assert [one.spread.mean for one in found.settings] == sorted(
        (one.spread.mean for one in found.settings), reverse=True
    )
    for optim, effect in zip(OPTIMS, found.effects["optim"], strict=True):
        values = [value for (o, _, _), value in kept.items() if o == optim]
        assert (effect.value, effect.all.n) == (optim, len(values))
        assert effect.all.mean == pytest.approx(statistics.mean(values))
        assert effect.all.std == pytest.approx(statistics.stdev(values))
    # Two of the six company settings are not there for both rates.
    slow, fast = found.effects["optim.lr"]
    assert (slow.value, fast.value, slow.all.n, fast.all.n) == (1e-4, 1e-3, 6, 4)
    assert fast.balanced.n == slow.balanced.n == 4
    assert fast.balanced.mean - slow.balanced.mean == pytest.approx(0.2)
    assert found.best is not None
    assert found.best.name == "adam-1e-3-1"
    assert {one.name for one in found.left_out} == {"adam-1e-3-2", "sgd-1e-3-2"}


def test_the_smallest_can_be_the_best(ledger: Ledger) -> None:
    found = find(ledger, metric="val/loss", maximize=False)
    assert found.best is not None
    assert found.best.name == "adam-1e-3-1"
    assert found.settings[0].name.startswith("optim=adam")


def test_the_three_files_say_the_same_and_need_nothing_else(ledger: Ledger) -> None:
    write_report(ledger, metric=None, maximize=True)
    tree = json.loads((ledger.folder / "report.json").read_text())
    assert tree["best"] == "adam-1e-3-1"
    assert not any(math.isnan(job["metric"] or 0) for job in tree["jobs"])
    text, page = ((ledger.folder / name).read_text() for name in ("report.md", "report.html"))
    for said in ("80.50 % ± 0.71", "out of ", "optim=adam optim.lr=1e-3 seed=1"):
        assert said in text
        assert said in page
    assert "out of \\| memory" in text, "a bar would be a new column"
    assert not re.search(r"https?:|<link|<script|url\(|@import", page)
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 3
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == {
        f"plots/{name}.png" for name in ("curves", "effects", "parallel")
    }
    before = {path.name: path.read_bytes() for path in ledger.folder.glob("report.*")}
    write_report(ledger, metric=None, maximize=True)
    assert {path.name: path.read_bytes() for path in ledger.folder.glob("report.*")} == before


def test_a_sweep_of_which_nothing_finished_has_a_report_too(ledger: Ledger) -> None:
    for entry in ledger.jobs.values():
        entry.state = "killed"
    write_report(ledger, metric=None, maximize=True)
    tree = json.loads((ledger.folder / "report.json").read_text())
    assert (tree["best"], tree["metric"], tree["settings"]) == (None, None, [])


def test_a_setting_that_many_numbers_were_drawn_for_is_shown_in_ranges_of_equally_many_runs() -> None:
    rows: list[dict[str, Any]] = [{"lr": 10.0**-n, "metric": float(n)} for n in range(20)]
    effects = marginal_effects(in_ranges(rows, "lr"), "lr", "metric", axes=["lr"])
    assert [effect.all.n for effect in effects] == [4] * 5
    assert effects[0].value == "1e-19 to 1e-16"
    assert effects[0].all.mean == pytest.approx(statistics.mean([19, 18, 17, 16]))
    assert in_ranges(rows[:12], "lr") == rows[:12]
