"""Searches: which settings to try next, by what those before them came to. Optuna asks, the ledger and the run folders
remember; `search.db` in the sweep's folder holds Optuna's side of it.

A trial is a job. One that ended with a number counts, so does one that was ended early because others were better by
then; one that failed, was killed, or whose number is not finite counts for nothing and can never be the best. What a
killed launcher left running is the same trial afterwards, in the same folder.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from vitexp import journal
from vitexp.config import Dimension, search_space, sweep_slug
from vitexp.errors import UserError
from vitexp.sweeps.display import of_summary
from vitexp.sweeps.jobs import Job, key_of
from vitexp.sweeps.ledger import ENDED_BADLY, Ledger

DATABASE = "search.db"
SEED = "seed"


class Search:
    """How to search; `open` gives the source of jobs."""

    def __init__(
        self,
        *,
        trials: int,
        sampler: Literal["tpe", "random"] = "tpe",
        startup: int = 10,
        pruner: Literal["median", "halving", "none"] = "median",
        warmup_epochs: int = 1,
        reduction: int = 3,
        failures: int = 5,
        seed: int = 0,
    ) -> None:
        """See conf/sweep/search/tpe.yaml. Raises UserError."""
        for key, value, least in (
            ("trials", trials, 1), ("startup", startup, 1), ("warmup_epochs", warmup_epochs, 0),
            ("reduction", reduction, 2), ("failures", failures, 1),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"sweep.search.{key}={value}: expected at least {least}")
        for key, word, known in (
            ("sampler", sampler, ("tpe", "random")),
            ("pruner", pruner, ("median", "halving", "none")),
        ):
            if word not in known:
                raise UserError(f"sweep.search.{key}={word}: expected one of {', '.join(known)}")
        self.trials, self.failures = trials, failures
        self._sampler, self._startup, self._seed = sampler, startup, seed
        self._pruner, self._warmup, self._reduction = pruner, warmup_epochs, reduction

    def study(self, folder: Path, *, maximize: bool) -> Any:
        """That of this folder, begun or gone on with. Raises UserError where Optuna is missing."""
        optuna = _optuna()
        storage = f"sqlite:///{folder / DATABASE}"
        study = optuna.create_study(
            storage=storage,
            study_name="sweep",
            direction="maximize" if maximize else "minimize",
            pruner=self._make_pruner(),
            load_if_exists=True,
        )
        # Not the draws of the first start once more.
        study.sampler = self._make_sampler(self._seed + len(study.get_trials(deepcopy=False)))
        return study

    def open(
        self, overrides: Sequence[str], config_dir: str | None, ledger: Ledger, *, say: Callable[[str], None]
    ) -> Trials:
        """The jobs of a search through what the overrides sweep. Raises UserError."""
        return Trials(self, dimensions(overrides, config_dir), ledger, say=say)

    def _make_sampler(self, seed: int) -> Any:
        samplers = _optuna().samplers
        if self._sampler == "random":
            return samplers.RandomSampler(seed=seed)
        # constant_liar: those that still run count as bad, so that neighbours are not tried at the same time.
        return samplers.TPESampler(seed=seed, n_startup_trials=self._startup, constant_liar=True)

    def _make_pruner(self) -> Any:
        pruners = _optuna().pruners
        if self._pruner == "none":
            return pruners.NopPruner()
        if self._pruner == "halving":
            return pruners.SuccessiveHalvingPruner(
                min_resource=max(1, self._warmup), reduction_factor=self._reduction, min_early_stopping_rate=0
            )
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=self._warmup)


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise UserError("sweep.search: needs Optuna: pip install 'vitexp[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


# ---- what is searched ------------------------------------------------------------------------------------------------


def with_space(overrides: Sequence[str], space: dict[str, Any] | None) -> list[str]:
    """The overrides with those of a space before them; what was typed for the same key wins."""
    typed = {key_of(text) for text in overrides}
    return [*(f"{key}={value}" for key, value in (space or {}).items() if key not in typed), *overrides]


def dimensions(overrides: Sequence[str], config_dir: str | None) -> list[str | Dimension]:
    """Raises UserError where there is nothing to search, or where seeds are searched."""
    parts = search_space(overrides, config_dir)
    swept = [part for part in parts if isinstance(part, Dimension)]
    if not swept:
        raise UserError(
            "sweep.search: nothing to search; give values, such as optim=adam,sgd or "
            "'optim.lr=tag(log,interval(1e-4,1e-2))', or a space: sweep/space=lr_wd"
        )
    if any(part.key == SEED for part in swept):
        raise UserError(
            "seed: a search would take the luckiest; search with one, then repeat the best: --multirun … seed=0,1,2"
        )
    return parts


def distributions(parts: Sequence[str | Dimension]) -> dict[str, Any]:
    """Optuna's name for each dimension, by key."""
    kinds, made = _optuna().distributions, {}
    for part in parts:
        if isinstance(part, str):
            continue
        if part.values is not None and part.step is None:
            made[part.key] = kinds.CategoricalDistribution(list(dict.fromkeys(part.values)))
        elif part.whole:
            step = 1 if part.step is None else int(part.step)
            made[part.key] = kinds.IntDistribution(int(part.low), int(part.high), log=part.log, step=step)
        else:
            made[part.key] = kinds.FloatDistribution(part.low, part.high, log=part.log, step=part.step)
    return made


def job_of(parts: Sequence[str | Dimension], values: dict[str, Any]) -> Job:
    """The job with these values; the same ones give the same name."""
    overrides, swept = [], {}
    for part in parts:
        if isinstance(part, str):
            overrides.append(part)
            continue
        value = values[part.key]
        swept[part.key] = str(value) if isinstance(value, str) else part.text(value)
        overrides.append(f"{part.key}={swept[part.key]}")
    return Job(sweep_slug(overrides, list(swept)), tuple(overrides), swept)


def _claim(study: Any, parts: Sequence[str | Dimension], ledger: Ledger) -> None:
    """Raises UserError where the folder holds another search: what its trials found says nothing of this one."""
    this = {
        "settings": sorted(part if isinstance(part, str) else repr(part) for part in parts),
        "metric": ledger.metric,
        "maximize": ledger.maximize,
    }
    before = study.user_attrs.get("search")
    if before is None:
        study.set_user_attr("search", this)
    elif before != this:
        differing = ", ".join(key for key in this if before.get(key) != this[key])
        raise UserError(
            f"{ledger.folder / DATABASE} is of another search ({differing} differ); give another output_dir"
        )


# ---- one after another -----------------------------------------------------------------------------------------------


class Trials:
    """The jobs of a search, as a source."""

    def __init__(
        self, search: Search, parts: Sequence[str | Dimension], ledger: Ledger, *, say: Callable[[str], None]
    ) -> None:
        self._search, self._parts, self._ledger, self._say = search, parts, ledger, say
        self._distributions = distributions(parts)
        self._study = search.study(ledger.folder, maximize=ledger.maximize)
        _claim(self._study, parts, ledger)
        self._must_wait = False  # for the end of a job: the last draw was one that runs
        self._running: dict[str, Any] = {}
        self._unfinished: list[tuple[Job, Any]] = []
        self._failed_in_a_row = 0
        self._reported: dict[str, int] = {}  # epochs of each trial that Optuna knows
        self._take_up()

    @property
    def known(self) -> list[Job]:
        """Those of former starts, in the order they were begun."""
        jobs = []
        for trial in self._study.get_trials(deepcopy=False):
            with contextlib.suppress(KeyError):  # of a start that was killed while its values were drawn
                job = job_of(self._parts, trial.params)
                if job.name in self._ledger.jobs and job not in jobs:
                    jobs.append(job)
        return jobs

    @property
    def counted(self) -> int:
        """Trials that ended with a number, those ended early included."""
        states = _optuna().trial.TrialState
        return len(self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))

    def next(self) -> Job | None:
        if self._unfinished:
            job, trial = self._unfinished.pop(0)
            self._running[job.name] = trial
            return job
        while self._failed_in_a_row < self._search.failures:
            if self._must_wait or self.counted + len(self._running) >= self._search.trials:
                return None
            trial = self._study.ask(self._distributions)
            job = job_of(self._parts, trial.params)
            if job.name in self._running:
                self._study.tell(trial, state=_optuna().trial.TrialState.FAIL)
                self._must_wait = True
                return None
            self._running[job.name] = trial
            if not self._is_known(job):
                return job
            self.tell(job)  # the same settings again
        return None

    def _is_known(self, job: Job) -> bool:
        """What came of it stands in the ledger."""
        entry = self._ledger.jobs.get(job.name)
        return entry is not None and (entry.state == "pruned" or self._ledger.is_finished(job.name))

    @property
    def is_over(self) -> bool:
        gave_up = self._failed_in_a_row >= self._search.failures
        return not self._unfinished and (gave_up or self.is_complete)

    @property
    def is_complete(self) -> bool:
        """As many trials as wanted have ended with a number."""
        return self.counted >= self._search.trials

    def verdict(self, job: Job) -> str | None:
        trial, known = self._running[job.name], self._reported.get(job.name, 0)
        seen = self._report(job, trial, known=known)
        if len(seen) <= known:
            return None  # Optuna judges what is new
        self._reported[job.name] = len(seen)
        if not trial.should_prune():
            return None
        epoch, value = seen[-1]
        return f"{value:.4g} after {epoch:g} epochs: others were better by then"

    def tell(self, job: Job) -> None:
        state = self._ledger.jobs[job.name].state
        trial = self._running.pop(job.name)
        self._must_wait = False
        if state == "stopped":
            return  # goes on with the next start
        self._end(job, trial)
        if self._failed_in_a_row >= self._search.failures:
            self._say(
                f"search      gives up: {self._failed_in_a_row} jobs in a row failed (sweep.search.failures); the "
                "ledger and console/ say why"
            )

    def _end(self, job: Job, trial: Any) -> None:
        """Tells Optuna what the ledger and the folder say."""
        states = _optuna().trial.TrialState
        found = of_summary(self._ledger.folder / job.name, metric=self._ledger.metric)
        if self._ledger.is_finished(job.name) and found is not None:
            self._study.tell(trial, found[1])
        elif self._ledger.jobs[job.name].state == "pruned":
            if not self._study.get_trials(deepcopy=False)[trial.number].intermediate_values:
                self._report(job, trial, known=0)
            self._study.tell(trial, state=states.PRUNED)
        else:
            self._study.tell(trial, state=states.FAIL)
            self._failed_in_a_row += 1
            return
        self._failed_in_a_row = 0

    def _report(self, job: Job, trial: Any, *, known: int) -> list[tuple[float, float]]:
        """Tells Optuna of the evaluations beyond those it knows; returns all."""
        seen = self._evaluations(job)
        for epoch, value in seen[known:]:
            trial.report(value, step=max(1, round(epoch)))
        return seen

    def _take_up(self) -> None:
        """What the last start left: trials that ended and were not told, and those that shall go on."""
        optuna = _optuna()
        for frozen in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            trial = optuna.trial.Trial(self._study, frozen._trial_id)
            try:
                job = job_of(self._parts, frozen.params)
            except KeyError:  # killed while its values were drawn
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            entry = self._ledger.jobs.get(job.name)
            self._reported[job.name] = len(frozen.intermediate_values)
            if self._is_known(job) or (entry is not None and entry.state in ENDED_BADLY):
                self._end(job, trial)
                self._failed_in_a_row = 0
            else:
                self._unfinished.append((job, trial))

    def _evaluations(self, job: Job) -> list[tuple[float, float]]:
        """(epoch, metric) of every evaluation so far that found a number; the last one of each whole epoch."""
        path = self._ledger.folder / job.name / "metrics.jsonl"
        wanted = journal.JUDGED_BY if self._ledger.metric is None else (self._ledger.metric,)
        rows = journal.read_having(path, wanted) if path.exists() else []
        name = next((one for one in wanted if any(one in row for row in rows)), None)
        by_epoch = {max(1, round(row["epoch"])): (row["epoch"], row[name]) for row in rows if name in row}
        return [(epoch, value) for epoch, value in by_epoch.values() if not math.isnan(value)]
