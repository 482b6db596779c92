"""The search of `sweep=optuna` for people who keep to Hydra's own launchers.

    python -m vitexp --multirun hydra/sweeper=vitexp_optuna hydra/launcher=joblib hydra.sweeper.n_jobs=2 \
        'optim.lr=tag(log,interval(1e-4,1e-2))' output_dir=outputs/search

Values, ranges, intervals and tags mean what they mean there. Jobs go to the launcher in batches of n_jobs. The same
command with the same output_dir goes on in its search.db until n_trials have ended with a number; one that failed, or
whose number is not finite, counts for nothing. Nothing is ended early: Hydra's launchers cannot.
"""

# No `from __future__ import annotations`: Hydra runs this module without naming it in sys.modules, where a dataclass
# would look its annotations up.
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

_log = logging.getLogger(__name__)


@dataclass
class OptunaSweeperConf:
    _target_: str = "hydra_plugins.vitexp_search.optuna_sweeper.OptunaSweeper"
    n_trials: int = 20  # that end with a number
    n_jobs: int = 1  # given to the launcher at once
    maximize: bool = True
    sampler: str = "tpe"  # tpe | random
    startup: int = 10  # trials drawn at random before the sampler judges
    failures: int = 5  # in a row, after which the search gives up
    seed: int = 0


ConfigStore.instance().store(
    group="hydra/sweeper", name="vitexp_optuna", node=OptunaSweeperConf, provider="vitexp_search"
)


class OptunaSweeper(Sweeper):
    """See OptunaSweeperConf."""

    def __init__(self, *, n_trials: int, n_jobs: int, maximize: bool, **search: Any) -> None:
        self.n_trials, self.n_jobs, self.maximize, self.search = n_trials, n_jobs, maximize, search

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from optuna.trial import TrialState

        from vitexp.sweeps.search import Search, dimensions, distributions, job_of

        folder = Path(self.config.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        search = Search(trials=self.n_trials, pruner="none", **self.search)
        parts = dimensions(arguments, None)
        study, drawn = search.study(folder, maximize=self.maximize), distributions(parts)
        for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # of a start that was killed
            study.tell(left.number, state=TrialState.FAIL)
        failed_in_a_row, number = 0, len(study.trials)
        while (wanted := self.n_trials - _done(study)) > 0:
            jobs: dict[str, tuple[Any, list[str]]] = {}
            for _ in range(min(self.n_jobs, wanted)):
                trial = study.ask(drawn)
                job = job_of(parts, trial.params)
                if job.name in jobs:  # two would write into one folder
                    study.tell(trial, state=TrialState.FAIL)
                else:
                    jobs[job.name] = trial, list(job.overrides)
            batch = [overrides for _, overrides in jobs.values()]
            results = self.launcher.launch(batch, initial_job_idx=number)
            for (trial, _), result in zip(jobs.values(), results, strict=True):
                value = _value(result)
                if value is None:
                    study.tell(trial, state=TrialState.FAIL)
                    failed_in_a_row += 1
                else:
                    study.tell(trial, value)
                    failed_in_a_row = 0
            number += len(batch)
            if failed_in_a_row >= search.failures:
                raise RuntimeError(f"{failed_in_a_row} jobs in a row failed (hydra.sweeper.failures)")
        best = job_of(parts, study.best_trial.params)
        print(f"best: {study.best_value:.4g}\npython -m vitexp {' '.join(best.overrides)}")


def _done(study: Any) -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _value(result: JobReturn) -> float | None:
    """What the job found; None where it failed or found no number."""
    try:
        value = result.return_value
    except Exception as error:  # a failed job's exception, whichever it is, is raised here
        _log.warning("a job failed: %s", error)
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
