"""Run trials on Ray Tune, with one ASHA scheduler for each curve.

Ray keeps no state across searches: finished and stopped trials are read from their folders, and the evaluations stored
there are replayed to ASHA before new ones are reported.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from reinforce.errors import UserError
from reinforce.processes.cluster import live_resources
from reinforce.processes.cores import capacity
from reinforce.processes.signals import Stopped, StopSignal, handled_signals
from reinforce.settings import with_accelerator
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.student.train import build, student_job
from reinforce.terminal import Screen, plural
from reinforce.training.loop import run_rank
from reinforce.training.ranks import join_ranks
from reinforce.training.ray_train import Reserved, check_capacity, reserve
from reinforce.tuning.config import Trial, TuneConfig
from reinforce.tuning.results import TrialOutcome, begin_trial, mark_stopped, read_outcome

_RAY = ".ray"
_LOCK_SECONDS = 60.0  # how long the trials of a killed search may keep their locks
#: ASHA (arXiv 1810.05834): a trial continues past a rung if it is among the best half there so far, and has twice the
#: steps at the next one. The first rung is at three tenths of the steps, when a warm-up is over.
_GRACE, _REDUCTION = 0.3, 2.0
_STEP, _VALUE, _ERROR = "step", "value", "trial_error"  # keys of the results that trials report to Tune


def first_rung(steps: int) -> int:
    """The step of a trial of so many at which ASHA compares it first."""
    return max(1, round(_GRACE * steps))


@dataclass(frozen=True)
class Search:
    """How trials are run.

    ``steps`` is the length of a trial, ``metric`` is maximized. ``start_cluster`` starts Ray, or connects to it, unless
    that is done already.
    """

    config: TuneConfig
    metric: str
    steps: int
    screen: Screen
    start_cluster: Callable[[], None]

    def run(self, trials: Mapping[Trial, StudentConfig], stop_early: bool) -> dict[Trial, TrialOutcome]:
        """Run all trials to the end, or until ASHA stops them if ``stop_early``.

        Raises UserError if a folder holds another training run, and Stopped after a signal.
        """
        for config in trials.values():
            begin_trial(config, self.steps)
        outcomes = {trial: self._read_outcome(config) for trial, config in trials.items()}
        scheduler = _Scheduler(self, trials, stop_early)
        for trial, outcome in outcomes.items():
            scheduler.replay(trial, outcome)
        if not (stop_early and self.config.early_stopping):
            # a trial that was stopped under another config continues
            open_ = [trial for trial, outcome in outcomes.items() if outcome.state != "finished"]
        else:
            outcomes = {trial: self._read_outcome(config) for trial, config in trials.items()}
            open_ = [trial for trial, outcome in outcomes.items() if outcome.state == "open"]
        if done := len(trials) - len(open_):
            self.screen.log(f"trials that are already done: {done} of {len(trials)}")
        if open_:
            # Turn off Tune's working directories, log files, Ctrl-C handler and progress output before Ray starts,
            # since its workers inherit the environment.
            os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
            os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
            os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
            os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # prints a header at every verbosity
            logging.getLogger("ray.tune").setLevel(logging.ERROR)
            self.start_cluster()
            self._tune({trial.name: trials[trial] for trial in open_}, scheduler, len(trials))
        return {trial: self._read_outcome(config, scheduler.errors.get(trial.name)) for trial, config in trials.items()}

    def _read_outcome(self, config: StudentConfig, error: str | None = None) -> TrialOutcome:
        outcome = read_outcome(config, self.steps, self.metric)
        return outcome if error is None else TrialOutcome("open", outcome.curve, error=error)

    def _tune(self, configs: Mapping[str, StudentConfig], scheduler: _Scheduler, trials: int) -> None:
        """Run the trials that are open; as many of ``trials`` as fit share the cores, however many are done."""
        configs = {name: with_accelerator(config) for name, config in configs.items()}
        training = next(iter(configs.values())).train
        # By default trials share the cores of the cluster; a trial of one core wastes least.
        each = reserve(training.compute, trials)
        check_capacity(each, can_grow=True)
        at_once = min(trials, capacity(live_resources(), each.cpus, each.gpus))
        self.screen.log(f"{plural(at_once, 'trial')} at a time, {each} each")
        run = partial(_run_trial, folder=os.getcwd(), metric=self.metric, each=each)
        work = tune.with_parameters(run, configs=configs)
        resources = {name.lower(): number for name, number in each.resources.items()}
        stop = StopSignal()
        with handled_signals(stop.request), _scratch_folder(Storage(self.config.output)) as storage, self.screen:
            tuner = tune.Tuner(
                tune.with_resources(work, resources),
                param_space={"name": tune.grid_search(list(configs))},
                tune_config=tune.TuneConfig(
                    scheduler=scheduler,
                    reuse_actors=True,  # importing the libraries takes longer than a short trial
                ),
                run_config=tune.RunConfig(
                    name="search",
                    stop=_SignalStopper(stop),
                    failure_config=tune.FailureConfig(max_failures=training.retries),
                    verbose=0,
                    **storage,
                ),
            )
            for result in tuner.fit():
                name = (result.config or {}).get("name", "")
                if result.error is not None:
                    scheduler.errors.setdefault(name, str(result.error).strip().splitlines()[-1])
        if stop.signum:
            raise Stopped(stop.signum)


class _SignalStopper(tune.Stopper):
    """Stops the search when this process receives a signal."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._stop.signum)


class _Scheduler(FIFOScheduler):
    """One ASHA scheduler for each curve; logs a line at each evaluation.

    Trials start in order. ASHA identifies them by name, so that evaluations of earlier searches can be replayed. It
    learns of no trial that Tune adds or removes: it has all from the start, and keeps their evaluations.
    """

    def __init__(self, search: Search, trials: Mapping[Trial, StudentConfig], stop_early: bool) -> None:
        super().__init__()
        self.errors: dict[str, str] = {}
        self._search = search
        self._configs = {trial.name: config for trial, config in trials.items()}
        self._curves = {trial.name: trial.setting.curve for trial in trials}
        self._schedulers: dict[str, ASHAScheduler] = {}
        if stop_early and search.config.early_stopping:
            for curve in dict.fromkeys(self._curves.values()):
                self._schedulers[curve] = ASHAScheduler(
                    time_attr=_STEP,
                    metric=_VALUE,
                    mode="max",
                    max_t=search.steps,
                    grace_period=first_rung(search.steps),
                    reduction_factor=_REDUCTION,
                    stop_last_trials=False,
                )
        for name, curve in self._curves.items():
            if curve in self._schedulers:
                self._schedulers[curve].on_trial_add(None, SimpleNamespace(trial_id=name))

    def __getstate__(self) -> dict[str, Any]:
        """Return no state: Tune pickles the scheduler for its own way of resuming, which is not used here."""
        return {}

    def replay(self, trial: Trial, outcome: TrialOutcome) -> None:
        """Report the evaluations of earlier searches to ASHA.

        Their decisions were carried out at the time, except for the last evaluation of a trial that was killed before
        its next step; that trial is stopped now if it falls behind.
        """
        for step, value in outcome.curve:
            behind = self._falls_behind(trial.name, step, value)
            if behind and outcome.state == "open" and not outcome.continued and step == outcome.curve[-1][0]:
                mark_stopped(self._configs[trial.name], self._search.metric, step, value)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["name"]
        if _ERROR in result:
            self.errors[name] = result[_ERROR]
            self._search.screen.log(f"{name}: failed: {result[_ERROR]}")
        if _STEP not in result:
            return str(TrialScheduler.CONTINUE)
        step, value = result[_STEP], result[_VALUE]
        behind = self._falls_behind(name, step, value)
        if behind:
            mark_stopped(self._configs[name], self._search.metric, step, value)
        end = ", stopped early" if behind else ", finished" if step == self._search.steps else ""
        self._search.screen.log(f"{name}: step {step:,} of {self._search.steps:,}  {value:.4f}{end}")
        return str(TrialScheduler.STOP if behind else TrialScheduler.CONTINUE)

    def _falls_behind(self, name: str, step: int, value: float) -> bool:
        """Return whether ASHA stops the trial; False at its last step, where stopping saves nothing."""
        scheduler = self._schedulers.get(self._curves[name])
        if scheduler is None or step >= self._search.steps:
            return False
        value = value if math.isfinite(value) else 0.0  # the least value of a metric: the student has diverged
        action = scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), {_STEP: step, _VALUE: value})
        return bool(action == TrialScheduler.STOP)


def _run_trial(
    config: dict[str, Any], *, configs: Mapping[str, StudentConfig], folder: str, metric: str, each: Reserved
) -> dict[str, Any] | None:
    """Train as `reinforce train` does, in a worker of Tune, and report each evaluation."""
    # Paths in the config and custom classes are relative to the driver's folder, or, in a job, to the folder of its
    # files on this node; on an existing cluster Tune changes the working directory.
    home = next(filter(os.path.isdir, [folder, os.environ.get("TUNE_ORIG_WORKING_DIR", "")]), os.getcwd())
    os.chdir(home)
    student = configs[config["name"]]
    job = replace(student_job(student), evaluate_start=False)  # the same for all trials

    def evaluated(step: int, metrics: Mapping[str, float]) -> None:
        tune.report({_STEP: step, _VALUE: metrics[metric]})

    try:
        device = "cuda:0" if each.gpus else "cpu"
        with join_ranks(student.train.compute, device, each.cpus) as ranks, _wait_for(Storage(job.output).lock):
            run_rank(partial(build, student), job, ranks, StopSignal(), on_evaluation=evaluated)
    except UserError as error:  # a retry would fail the same way
        return {_ERROR: str(error)}
    return None


@contextlib.contextmanager
def _wait_for(lock: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Acquire a lock that a trial of a killed search may still hold for a moment. Raises UserError after a minute."""
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
def _scratch_folder(store: Storage) -> Iterator[dict[str, Any]]:
    """Yield the storage options of Ray Tune: a folder in the output, which every node can reach; removed at the end."""
    path = store.path(_RAY)

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            store.fs.rm(path, recursive=True)

    remove()
    if store.local:
        options: dict[str, Any] = {"storage_path": os.path.abspath(path)}
    else:
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        options = {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(store.fs))}
    try:
        yield options
    finally:
        remove()
