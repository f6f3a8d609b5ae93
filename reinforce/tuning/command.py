"""``reinforce tune``: check, screen, search, and say what was found."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from reinforce.cluster import ray_cluster
from reinforce.dataset.manifest import read_manifest, record_scales
from reinforce.dataset.store import MANIFEST, Store
from reinforce.errors import UserError
from reinforce.student.distillation import IMAGES, TEXTS, plan_distillation, stored_teachers
from reinforce.student.train import build
from reinforce.terminal import Screen, format_duration
from reinforce.training.loop import length
from reinforce.tuning import plot
from reinforce.tuning.config import TuneConfig
from reinforce.tuning.prediction import Prediction, predict
from reinforce.tuning.screening import Screened, screen
from reinforce.tuning.search import Search
from reinforce.tuning.space import JOINT, LAMBDA, Base, Setting, Trial, lambda_settings, scale_settings
from reinforce.tuning.table import Curve, Row, best_of, curves_of, rows_of
from reinforce.tuning.trials import Outcome
from reinforce.tuning.written import student_yaml
from teachers.device import Accelerator
from teachers.redact import redact

TABLE, PICTURE, STUDENT, SCREENING = "table.json", "scales.png", "student.yaml", "screening.json"


@dataclass(frozen=True)
class Checked:
    """What is known before anything starts: the length of a trial, the metric, and the scales in force."""

    base: Base
    steps: int
    metric: str
    in_force: Mapping[str, float]  # of every teacher of both sides
    origins: Mapping[str, str]


@dataclass(frozen=True)
class Tuned:
    """What was found. ``found`` are the best values by teacher and LAMBDA."""

    output: str
    metric: str
    rows: list[Row]
    curves: list[Curve]
    screened: Mapping[str, Screened]
    predictions: Mapping[str, Prediction]
    found: Mapping[str, float]
    seconds: float

    @property
    def faults(self) -> list[str]:
        """What is not known because trials failed; they are tried again at the next start."""
        return [f"{row.setting.name}: {row.fault}" for row in self.rows if row.state == "failed"]

    def lines(self) -> list[str]:
        """What people are told."""
        lines = [curve.text() for curve in self.curves]
        lines += [prediction.text(name) for name, prediction in self.predictions.items()]
        lines.append(f"training took {format_duration(self.seconds)} over all trials and starts")
        lines.append(f"table: {self.output}/{TABLE}   plot: {self.output}/{PICTURE}")
        if self.found:
            lines.append(f"to train with what was found: reinforce train {self.output}/{STUDENT}")
        return lines

    def json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "found": dict(self.found),
            "curves": [
                {"axis": c.axis, "best": c.best, "plateau": vars(c.plateau) if c.plateau else None, "told": c.text()}
                for c in self.curves
            ],
            "rows": [row.json() for row in self.rows],
            "screening": {name: prediction.json() for name, prediction in self.predictions.items()},
            "seconds": self.seconds,
        }


def check(config: TuneConfig) -> Checked:
    """Raise UserError for whatever would show only after hours, or never; reads, and writes a probe to the output."""
    base = Base(config)
    short = base.short
    if not short.evaluate.metrics:
        raise UserError(
            f"config {base.where} has no set to evaluate by, so nothing tells a good scale. Add `evaluate` with "
            "zero_shot or retrieval sets there, or under `trial`."
        )
    metric = config.metric or short.evaluate.best_metric
    if metric not in short.evaluate.metrics:
        raise UserError(f"metric: no set gives {metric!r}; there are: {', '.join(short.evaluate.metrics)}.")
    assert metric is not None
    loss = short.loss
    for wrong, mend in (
        (loss.targets == "online", "loss.targets is `online`; tuning reads stored embeddings: set it to `stored`"),
        (loss.learn_scales, "loss.learn_scales moves the scales that are to be compared: set it to false"),
        (loss.lambda_ == 0 and not config.lambda_, "loss.lambda is 0, where no scale matters: raise it"),
        (short.train.compute.ranks > 1, "train.compute.ranks is above 1; a trial is one rank: set it to 1 in `trial`"),
    ):
        if wrong:
            raise UserError(f"config {base.where}: {mend}.")
    manifests = {source.url: read_manifest(Store(source.url)) for source in short.data.datasets}
    known = stored_teachers(short, manifests)
    for name in config.scales:
        if name not in known:
            raise UserError(f"scales: the data has no teacher {name!r}; it has: {', '.join(known) or 'none'}.")
        if known[name].sides != {IMAGES, TEXTS}:
            raise UserError(f"scales: teacher {name} has vectors of one side alone, which have no scale. Remove it.")
    guess = {name: values[0] for name, values in config.scales.items() if known[name].logit_scale is None}
    tried = loss.model_copy(update={"logit_scales": {**guess, **loss.logit_scales}, "lambda_": loss.lambda_ or 1.0})
    in_force = plan_distillation(tried, known).scales
    origins = {
        name: f"{scale:g}, {'loss.logit_scales' if name in loss.logit_scales else known[name].origin}"
        for name, scale in in_force.items()
    }
    Store(config.output).check_writable()
    first = next(iter(scale_settings(config) or lambda_settings(config, in_force)))
    _, feed = build(base.of(Trial(first, config.seeds[0])), Accelerator("cpu"))
    steps = length(short.train, feed.samples, 1)
    early, every = config.early_stopping, short.evaluate.every
    if early is not None and (every is None or every >= steps):
        raise UserError(
            f"config {base.where}: a trial of {steps:,} steps is evaluated at its end alone, so none can be stopped "
            f"early. Set evaluate.every to {max(1, round(early.grace * steps))} in `trial`, or `early_stopping: null`."
        )
    return Checked(base, steps, metric, in_force, origins)


def screen_only(config: TuneConfig) -> dict[str, Screened]:
    """The screening alone, written to the output; trains nothing."""
    checked = check(config)
    with Store(config.output).lock():
        screened = _screen(config, checked)
        _draw(config, [], screened, {}, checked.metric)
    return screened


def tune(config: TuneConfig, address: str | None = None) -> Tuned:
    """Try every setting, from where an earlier start left off, and write what was found.

    Raises UserError for what the user has to mend, ``reinforce.training.stop.Stopped`` after a signal.
    """
    checked = check(config)
    store, show = Store(config.output), Screen()
    with store.lock():
        screened = _screen(config, checked)
        with contextlib.ExitStack() as stack:

            def cluster() -> None:  # once, and where something is left to do
                if not ray.is_initialized():
                    stack.enter_context(ray_cluster(address, log_to_driver=False))

            early = config.early_stopping
            search = Search(config.output, checked.metric, checked.steps, early, config.concurrent, show, cluster)
            outcomes = _stage(config, checked.base, search, scale_settings(config))
            rows = rows_of(outcomes, config.seeds)
            found = _found(config, rows)
            scales = {**checked.in_force, **found}
            failed = any(row.state == "failed" for row in rows)  # then another scale may be the best
            later = _stage(config, checked.base, search, [] if failed else lambda_settings(config, scales))
        outcomes |= later
        rows += rows_of(later, config.seeds)
        best = best_of(rows, LAMBDA)
        if best is not None:
            found = {**found, LAMBDA: best.setting.share or 0.0}
        tuned = _tuned(config, checked, outcomes, rows, screened, found)
        store.write_json(tuned.json(), TABLE)
        if found:
            store.write_bytes(_student(config, checked, tuned).encode(), STUDENT)
        _draw(config, tuned.curves, screened, tuned.predictions, checked.metric)
    if not any(row.state == "finished" for row in rows):
        raise UserError("no setting was trained to its end:\n  " + "\n  ".join(tuned.faults))
    return tuned


def record(config: TuneConfig, tuned: Tuned) -> list[str]:
    """Put the scales that were found into dataset.json of every dataset; returns what was done, in words."""
    lines = []
    scales = {name: value for name, value in tuned.found.items() if name != LAMBDA}
    plateaus = {curve.axis: curve.plateau for curve in tuned.curves}
    for source in Base(config).whole.data.datasets:
        store = Store(source.url)
        with store.lock():
            manifest = read_manifest(store)
            for name, scale in scales.items():
                plateau = plateaus.get(name)
                wide = plateau is not None and plateau.low < plateau.high
                flat = f", plateau {plateau.low:g} to {plateau.high:g}" if plateau and wide else ""
                origin = f"tuned by {tuned.metric}{flat}, see {tuned.output}"
                before = manifest["teachers"][name]
                manifest = record_scales(manifest, {name: scale}, origin)
                then = f"{before['logit_scale']:g}" if before["logit_scale"] is not None else "none"
                then += f" ({before['logit_scale_from']})"
                lines.append(f"{store.url}: the logit scale of {name} is {scale:g} now, was {then}")
            store.write_json(manifest, MANIFEST)
    return lines


def _screen(config: TuneConfig, checked: Checked) -> dict[str, Screened]:
    if not config.scales:
        return {}
    screened = screen(
        checked.base.short,
        list(checked.in_force),
        {name: sorted(values) for name, values in config.scales.items()},
        checked.in_force,
        config.screening.batches,
        config.screening.batch,
    )
    Store(config.output).write_json({name: found.json() for name, found in screened.items()}, SCREENING)
    return screened


def _stage(config: TuneConfig, base: Base, search: Search, settings: list[Setting]) -> dict[Trial, Outcome]:
    """Train settings with the first seed, and those left with the others; all at once where none is stopped.

    What was stopped next to a plateau is trained to the end after all, else nobody knew where the plateau ends.
    """
    if not settings:
        return {}
    if config.early_stopping is None:
        every = [Trial(setting, seed) for seed in config.seeds for setting in settings]
        return search.run({trial: base.of(trial) for trial in every}, judged=False)
    first, *others = config.seeds
    outcomes = search.run({trial: base.of(trial) for trial in (Trial(s, first) for s in settings)}, judged=True)
    left = [trial.setting for trial, outcome in outcomes.items() if outcome.state == "finished"]
    again: Sequence[int] = others
    after_all: set[Setting] = set()
    while left:
        trials = {trial: base.of(trial) for trial in (Trial(s, seed) for seed in again for s in left)}
        if trials:
            outcomes = {**outcomes, **search.run(trials, judged=False)}
        ends = [row for curve in curves_of(rows_of(outcomes, config.seeds)) for row in curve.neighbours]
        left = list(dict.fromkeys(r.setting for r in ends if r.state == "stopped" and r.setting not in after_all))
        after_all.update(left)
        again = config.seeds
        if left:
            search.screen.log(f"to tell where plateaus end: {', '.join(s.name for s in left)}, after all")
    return outcomes


def _found(config: TuneConfig, rows: list[Row]) -> dict[str, float]:
    found: dict[str, float] = {}
    for curve in [JOINT] if config.mode == "joint" else list(config.scales):
        best = best_of(rows, curve)
        if best is not None:
            found |= best.setting.values
    return found


def _tuned(
    config: TuneConfig,
    checked: Checked,
    outcomes: Mapping[Trial, Outcome],
    rows: list[Row],
    screened: Mapping[str, Screened],
    found: Mapping[str, float],
) -> Tuned:
    curves = curves_of(rows)
    by_step = {
        outcome_of.setting.name: dict(outcome.curve)
        for outcome_of, outcome in outcomes.items()
        if outcome_of.seed == config.seeds[0]
    }
    predictions = {
        curve.axis: predict(curve, screened[curve.axis], [by_step[row.setting.name] for _, row in curve.rows])
        for curve in curves
        if curve.axis in screened
    }
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    return Tuned(redact(config.output), checked.metric, rows, curves, screened, predictions, found, seconds)


def _student(config: TuneConfig, checked: Checked, tuned: Tuned) -> str:
    texts = {curve.axis: curve.text().partition(": ")[2] for curve in tuned.curves}
    origins = {name: f"stays at {origin}" for name, origin in checked.origins.items()}
    for name in tuned.found:
        origins[name] = f"reinforce tune, {tuned.metric}: {texts[name]}" if name in texts else "set in the tuning"
    said = f"Written by reinforce tune: {checked.base.where} with the scales that were best by {tuned.metric}."
    where = os.path.join(config.output.rstrip("/"), "student")
    return student_yaml(checked.base.written, tuned.found, origins, where, said)


def _draw(
    config: TuneConfig,
    curves: list[Curve],
    screened: Mapping[str, Screened],
    predictions: Mapping[str, Prediction],
    metric: str,
) -> None:
    if curves or screened:
        plot.draw(curves, screened, predictions, metric, f"{config.output.rstrip('/')}/{PICTURE}")
