"""The search: Ray Tune runs the trials, its ASHA ends those of a curve that fall behind.

Ray keeps no state that counts: what is finished or was stopped is read from the trials' folders, and ASHA is told the
evaluations that they hold before it judges new ones.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.student.train import build, job_of
from reinforce.terminal import Screen
from reinforce.training.loop import run_rank
from reinforce.training.ranks import join
from reinforce.training.ray_train import check_room
from reinforce.training.stop import Stop, Stopped
from reinforce.tuning.config import EarlyStopping
from reinforce.tuning.space import Trial
from reinforce.tuning.trials import Outcome, begin, mark_stopped, outcome_of

_RAY = ".ray"
_LOCK_SECONDS = 60.0  # that what a killed search has left running may take to end
_STEP, _VALUE, _FAULT = "step", "value", "fault"


@dataclass(frozen=True)
class Search:
    """How trials are run: ``steps`` is the length of each, ``metric`` decides, ``output`` is the tuning's.

    ``cluster`` sees to it that there is a Ray.
    """

    output: str
    metric: str
    steps: int
    early_stopping: EarlyStopping | None
    concurrent: int | None
    screen: Screen
    cluster: Callable[[], None]

    def run(self, trials: Mapping[Trial, StudentConfig], judged: bool) -> dict[Trial, Outcome]:
        """Bring all trials to their end, or to where ASHA ends them if they are ``judged``.

        Raises UserError for folders that hold other trainings,
        Stopped after a signal.
        """
        for config in trials.values():
            begin(config, self.steps)
        outcomes = {trial: self._outcome(config) for trial, config in trials.items()}
        judges = _Judges(self, trials, judged)
        for trial, outcome in outcomes.items():
            judges.remember(trial, outcome)
        if not judged or self.early_stopping is None:  # what was stopped by another config goes on
            open_ = [trial for trial, outcome in outcomes.items() if outcome.state != "finished"]
        else:
            outcomes = {trial: self._outcome(config) for trial, config in trials.items()}
            open_ = [trial for trial, outcome in outcomes.items() if outcome.state == "open"]
        if done := len(trials) - len(open_):
            self.screen.log(f"{done} of {len(trials)} trials are done already")
        if open_:
            _hush()  # before Ray starts, whose workers have this process's environment
            self.cluster()
            self._tune({trial.name: trials[trial] for trial in open_}, judges)
        return {trial: self._outcome(config, judges.faults.get(trial.name)) for trial, config in trials.items()}

    def _outcome(self, config: StudentConfig, fault: str | None = None) -> Outcome:
        found = outcome_of(config, self.steps, self.metric)
        return found if fault is None else Outcome("open", found.curve, fault=fault)

    def _tune(self, configs: Mapping[str, StudentConfig], judges: _Judges) -> None:
        training = next(iter(configs.values())).train
        compute = training.compute
        check_room(compute, grows=True)
        work = tune.with_parameters(partial(_trial, folder=os.getcwd(), metric=self.metric), configs=dict(configs))
        room = {"cpu": compute.cpus, **({"gpu": compute.gpus} if compute.gpus else {})}
        stop = Stop()
        with stop.listening(), _scratch(Storage(self.output)) as storage, self.screen:
            tuner = tune.Tuner(
                tune.with_resources(work, room),
                param_space={"name": tune.grid_search(list(configs))},
                tune_config=tune.TuneConfig(
                    scheduler=judges,
                    max_concurrent_trials=self.concurrent,
                    # An actor that has loaded all libraries takes the next trial.
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    stop=_Signals(stop),
                    failure_config=tune.FailureConfig(max_failures=training.retries),
                    verbose=0,
                    **storage,
                ),
            )
            for result in tuner.fit():
                name = (result.config or {}).get("name", "")
                if result.error is not None:
                    judges.faults.setdefault(name, str(result.error).strip().splitlines()[-1])
        if stop.signum:
            raise Stopped(stop.signum)


def _hush() -> None:
    """Tune would move trials to folders of its own, log each in three formats, catch Ctrl-C itself and tell much."""
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # whose header comes at any verbosity
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


class _Signals(tune.Stopper):
    """Ends the search when this process gets a signal."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._stop.signum)


class _Judges(FIFOScheduler):
    """An ASHA for each curve, and a line for people at each evaluation.

    Trials come in order. ASHA knows them by their names, so that it is told of evaluations of earlier starts as well.
    """

    def __init__(self, search: Search, trials: Mapping[Trial, StudentConfig], judged: bool) -> None:
        super().__init__()
        self.faults: dict[str, str] = {}
        self._search = search
        self._configs = {trial.name: config for trial, config in trials.items()}
        self._curves = {trial.name: trial.setting.curve for trial in trials}
        self._judges: dict[str, ASHAScheduler] = {}
        early = search.early_stopping
        if judged and early is not None:
            for curve in dict.fromkeys(self._curves.values()):
                self._judges[curve] = ASHAScheduler(
                    time_attr=_STEP,
                    metric=_VALUE,
                    mode="max",
                    max_t=search.steps,
                    grace_period=max(1, round(early.grace * search.steps)),
                    reduction_factor=early.reduction,
                    stop_last_trials=False,
                )
        for name, curve in self._curves.items():
            if curve in self._judges:
                self._judges[curve].on_trial_add(None, SimpleNamespace(trial_id=name))

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of it for a way of going on that is not used here."""
        return {}

    def remember(self, trial: Trial, outcome: Outcome) -> None:
        """Tell ASHA the evaluations of earlier starts.

        Decisions were taken then, but for the last evaluation of a trial that was killed before it went on.
        """
        for step, value in outcome.curve:
            behind = self._falls_behind(trial.name, step, value)
            if behind and outcome.state == "open" and not outcome.beyond and step == outcome.curve[-1][0]:
                mark_stopped(self._configs[trial.name], self._search.metric, step, value)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """ASHA has been told of all."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["name"]
        if _FAULT in result:
            self.faults[name] = result[_FAULT]
            self._search.screen.log(f"{name}: failed: {result[_FAULT]}")
        if _STEP not in result:
            return str(TrialScheduler.CONTINUE)
        step, value = result[_STEP], result[_VALUE]
        behind = self._falls_behind(name, step, value)
        if behind:
            mark_stopped(self._configs[name], self._search.metric, step, value)
        end = ", stopped early" if behind else ", finished" if step == self._search.steps else ""
        self._search.screen.log(f"{name}: step {step:,} of {self._search.steps:,}  {value:.4f}{end}")
        return str(TrialScheduler.STOP if behind else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """ASHA has been told of its last evaluation."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """ASHA keeps what it knows."""

    def _falls_behind(self, name: str, step: int, value: float) -> bool:
        """What ASHA says; of a training that is at its end nothing is to be saved."""
        judge = self._judges.get(self._curves[name])
        if judge is None or step >= self._search.steps:
            return False
        action = judge.on_trial_result(None, SimpleNamespace(trial_id=name), {_STEP: step, _VALUE: value})
        return bool(action == TrialScheduler.STOP)


def _trial(
    config: dict[str, Any], *, configs: Mapping[str, StudentConfig], folder: str, metric: str
) -> dict[str, Any] | None:
    """What a worker of Tune runs: a training as `reinforce train` does it, which tells its evaluations."""
    # Paths of the config, and classes of the user's own, are relative to where the driver is, or, in a job, to where
    # its files are on this node; on a cluster that was there before, Tune has gone elsewhere.
    home = next(filter(os.path.isdir, [folder, os.environ.get("TUNE_ORIG_WORKING_DIR", "")]), os.getcwd())
    os.chdir(home)
    sys.path[:0] = [home] if home not in sys.path else []
    student = configs[config["name"]]
    job = job_of(student)

    def evaluated(step: int, metrics: Mapping[str, float]) -> None:
        tune.report({_STEP: step, _VALUE: metrics[metric]})

    try:
        with join(student.train.compute) as ranks, _waiting(Storage(job.output).lock):
            run_rank(partial(build, student), job, ranks, Stop(), evaluated=evaluated)
    except UserError as error:  # another start would not mend it
        return {_FAULT: str(error)}
    return None


@contextlib.contextmanager
def _waiting(lock: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """A lock that a trial of a killed search may hold for some moments yet."""
    deadline = time.monotonic() + _LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock())
                break
            except UserError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)
        yield


@contextlib.contextmanager
def _scratch(store: Storage) -> Iterator[dict[str, Any]]:
    """A folder for what Ray Tune writes, which every node reaches as it does the output; it goes at the end."""
    path = store.path(_RAY)

    def sweep() -> None:
        with contextlib.suppress(FileNotFoundError):
            store.fs.rm(path, recursive=True)

    sweep()
    if store.local:
        where: dict[str, Any] = {"storage_path": os.path.abspath(path)}
    else:
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        where = {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(store.fs))}
    try:
        yield where
    finally:
        sweep()
