"""``reinforce tune``: check the config, screen scales, run trials, and write the results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from reinforce.dataset.manifest import read_manifest, record_scales, write_manifest
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.processes.cluster import ray_cluster
from reinforce.student.teachers import IMAGES, TEXTS, stored_teachers
from reinforce.student.terms.pairs import find_scales
from reinforce.student.train import build
from reinforce.terminal import Screen, format_duration
from reinforce.training.config import total_steps
from reinforce.tuning import results
from reinforce.tuning.config import (
    JOINT,
    LAMBDA,
    BaseStudent,
    Setting,
    Trial,
    TuneConfig,
    lambda_settings,
    render_student_yaml,
    scale_settings,
)
from reinforce.tuning.results import (
    Curve,
    ScreeningCheck,
    SettingResult,
    TrialOutcome,
    best_row,
    check_screening,
    make_curves,
    make_rows,
)
from reinforce.tuning.screening import SubsetScreening, TeacherScreening, screen, screening_json
from reinforce.tuning.search import Search, first_rung
from teachers.redact import redact
from teachers.runtime.accelerator import Accelerator

TABLE, PLOT, STUDENT, SCREENING = "table.json", "scales.png", "student.yaml", "screening.json"


@dataclass(frozen=True)
class CheckedConfig:
    """What the checks before a tuning return.

    ``steps`` is the length of a trial, ``current_scales`` are the scales of the teachers with images and texts,
    ``origins`` states where each of them comes from, and ``left_out`` why the other teachers have none.
    """

    base: BaseStudent
    steps: int
    metric: str
    current_scales: Mapping[str, float]
    origins: Mapping[str, str]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class TuningResult:
    """Results of a tuning. ``best`` are the best values by teacher and LAMBDA."""

    output: str
    metric: str
    rows: list[SettingResult]
    curves: list[Curve]
    screenings: Mapping[str, TeacherScreening]
    subsets: SubsetScreening
    checks: Mapping[str, ScreeningCheck]
    best: Mapping[str, float]
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Why settings have no result; their trials are retried by the next `reinforce tune`."""
        return [f"{row.setting.name}: {row.error}" for row in self.rows if row.state == "failed"]

    def lines(self) -> list[str]:
        """Return the summary for the terminal."""
        lines = [curve.describe() for curve in self.curves]
        lines += [f"{curve.axis}: {curve.edge}" for curve in self.curves if curve.edge]
        lines += [check.describe(name) for name, check in self.checks.items()]
        lines.append(f"training took {format_duration(self.seconds)} in total")
        lines.append(f"table: {self.output}/{TABLE}   plot: {self.output}/{PLOT}")
        if self.best:
            lines.append(f"to train with the best values: reinforce train {self.output}/{STUDENT}")
        return lines

    def json(self) -> dict[str, Any]:
        curves = [
            {
                "axis": curve.axis,
                "best": curve.best,
                "plateau": vars(curve.plateau) if curve.plateau else None,
                "told": curve.describe(),
                "edge": curve.edge,
            }
            for curve in self.curves
        ]
        return {
            "metric": self.metric,
            "found": dict(self.best),
            "curves": curves,
            "rows": [row.json() for row in self.rows],
            "screening": {name: vars(check) for name, check in self.checks.items()},
            "subsets": asdict(self.subsets),
            "seconds": self.seconds,
        }


def check_config(config: TuneConfig) -> CheckedConfig:
    """Report errors that would otherwise appear after hours, or never; tests that the output can be written.

    Raises UserError.
    """
    base = BaseStudent(config)
    short = base.short
    if not short.evaluate.metrics:
        raise UserError(
            f"config {base.origin} has no evaluation set, so scales cannot be compared. Add `evaluate` with zero_shot "
            "or retrieval sets there, or under `trial`."
        )
    metric = config.metric or short.evaluate.best_metric
    if metric not in short.evaluate.metrics:
        raise UserError(f"metric: no evaluation set has {metric!r}; available: {', '.join(short.evaluate.metrics)}.")
    assert metric is not None
    loss = short.loss
    for wrong, fix in (
        (loss.online, "loss.teachers run during training; tuning reads stored embeddings: remove it"),
        (loss.learn_scales, "loss.learn_scales changes the scales that are compared: set it to false"),
        (loss.lambda_ == 0 and not config.lambda_, "loss.lambda is 0, so that scales have no effect: raise it"),
        (short.train.compute.ranks > 1, "train.compute.ranks is above 1; a trial is one rank: set it to 1 in `trial`"),
    ):
        if wrong:
            raise UserError(f"config {base.origin}: {fix}.")
    current_scales, origins, left_out = _current_scales(base)
    Store(config.output).check_writable()
    first = next(iter(scale_settings(config) or lambda_settings(config, current_scales)))
    _, feed = build(base.trial_config(Trial(first, config.seeds[0])), Accelerator("cpu"))
    steps = total_steps(short.train, feed.samples, 1)
    every = short.evaluate.every
    if config.early_stopping and (every is None or every >= steps):
        raise UserError(
            f"config {base.origin}: a trial of {steps:,} steps is only evaluated at its end, so it cannot be stopped "
            f"early. Set evaluate.every to {first_rung(steps)} in `trial`, or `early_stopping: false`."
        )
    return CheckedConfig(base, steps, metric, current_scales, origins, left_out)


def _current_scales(base: BaseStudent) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
    """Return the current scale of each teacher with images and texts, and where it comes from.

    The third mapping has the reason for each teacher without a scale. Raises UserError.
    """
    config, loss = base.config, base.short.loss
    manifests = {source.url: read_manifest(Store(source.url)) for source in base.short.data.datasets}
    teachers = stored_teachers(base.short, manifests)
    for name in config.scales:
        if name not in teachers:
            raise UserError(f"scales: the data has no teacher {name!r}; it has: {', '.join(teachers) or 'none'}.")
        if teachers[name].sides != {IMAGES, TEXTS}:
            raise UserError(
                f"scales: teacher {name} has embeddings of images or of texts only, which need no scale. Remove it."
            )
    guess = {name: values[0] for name, values in config.scales.items() if teachers[name].logit_scale is None}
    tried = loss.model_copy(update={"logit_scales": {**guess, **loss.logit_scales}, "lambda_": loss.lambda_ or 1.0})
    scales = {name: scale for name, (scale, _) in find_scales(tried, teachers).items()}
    origins = {
        name: f"{scale:g}, {'loss.logit_scales' if name in loss.logit_scales else teachers[name].scale_source}"
        for name, scale in scales.items()
    }
    left_out = {
        name: f"has embeddings of {next(iter(teacher.sides))} only" if teacher.sides else "has no embeddings to read"
        for name, teacher in teachers.items()
        if name not in scales
    }
    return scales, origins, left_out


def screen_only(config: TuneConfig) -> tuple[dict[str, TeacherScreening], SubsetScreening]:
    """Run the screening and write it to the output; trains nothing, so trials need not be configured."""
    if not config.scales:
        raise UserError("scales: --screen-only has no scales to screen. Give two or more by teacher.")
    base = BaseStudent(config)
    current_scales, _, left_out = _current_scales(base)
    Store(config.output).check_writable()
    with Store(config.output).lock():
        screenings, subsets = _run_screening(base, current_scales, left_out)
        results.draw([], screenings, {}, "", f"{config.output.rstrip('/')}/{PLOT}")
    return screenings, subsets


def tune(config: TuneConfig, address: str | None = None) -> TuningResult:
    """Run the trials that are not finished yet, and write the results.

    Raises UserError for what the user can fix, ``reinforce.processes.signals.Stopped`` after a signal.
    """
    checked = check_config(config)
    store = Store(config.output)
    with store.lock():
        screenings, subsets = _run_screening(checked.base, checked.current_scales, checked.left_out)
        with contextlib.ExitStack() as stack:

            def start_cluster() -> None:  # once, and only if trials are left to run
                if not ray.is_initialized():
                    stack.enter_context(ray_cluster(address, log_to_driver=False))

            search = Search(config, checked.metric, checked.steps, Screen(), start_cluster)
            outcomes = _run_stage(checked.base, search, scale_settings(config))
            rows = make_rows(outcomes, config.seeds)
            best: dict[str, float] = {}
            for curve in [JOINT] if config.mode == "joint" else list(config.scales):
                if (row := best_row(rows, curve)) is not None:
                    best |= row.setting.values
            scales = {**checked.current_scales, **best}
            failed = any(row.state == "failed" for row in rows)  # the best scales are not known yet
            later = _run_stage(checked.base, search, [] if failed else lambda_settings(config, scales))
        outcomes |= later
        rows += make_rows(later, config.seeds)
        best_lambda = best_row(rows, LAMBDA)
        if best_lambda is not None:
            best = {**best, LAMBDA: best_lambda.setting.lambda_ or 0.0}
        result = _summarise(checked, outcomes, rows, screenings, subsets, best)
        store.write_json(result.json(), TABLE)
        if best:
            store.write_bytes(_student_yaml(checked, result).encode(), STUDENT)
        picture = f"{config.output.rstrip('/')}/{PLOT}"
        results.draw(result.curves, screenings, result.checks, checked.metric, picture)
    if not any(row.state == "finished" for row in rows):
        raise UserError("no setting was trained to the end:\n  " + "\n  ".join(result.errors))
    return result


def record_scales_in_datasets(config: TuneConfig, result: TuningResult) -> list[str]:
    """Write the best scales to dataset.json of every dataset; return a line for each change."""
    lines = []
    scales = {name: value for name, value in result.best.items() if name != LAMBDA}
    plateaus = {curve.axis: curve.plateau for curve in result.curves}
    for source in BaseStudent(config).full.data.datasets:
        store = Store(source.url)
        with store.lock():
            manifest = read_manifest(store)
            for name, scale in scales.items():
                plateau = plateaus.get(name)
                wide = plateau is not None and plateau.low < plateau.high
                flat = f", plateau {plateau.low:g} to {plateau.high:g}" if plateau and wide else ""
                origin = f"tuned by {result.metric}{flat}, see {result.output}"
                before = manifest["teachers"][name]
                manifest = record_scales(manifest, {name: scale}, origin)
                then = f"{before['logit_scale']:g}" if before["logit_scale"] is not None else "none"
                then += f" ({before['logit_scale_from']})"
                lines.append(f"{store.url}: logit scale of {name} is now {scale:g}, was {then}")
            write_manifest(store, manifest)
    return lines


def _run_screening(
    base: BaseStudent, current_scales: Mapping[str, float], left_out: Mapping[str, str]
) -> tuple[dict[str, TeacherScreening], SubsetScreening]:
    config, how = base.config, base.config.screening
    if not config.scales:
        return {}, SubsetScreening((), {}, {})
    scales = {name: sorted(values) for name, values in config.scales.items()}
    screenings, subsets = screen(base.short, scales, current_scales, how.batches, how.batch)
    subsets = replace(subsets, left_out=left_out)
    Store(config.output).write_json(screening_json(screenings, subsets), SCREENING)
    return screenings, subsets


def _run_stage(base: BaseStudent, search: Search, settings: list[Setting]) -> dict[Trial, TrialOutcome]:
    """Train all settings with the first seed, then those that were not stopped with the other seeds.

    A stopped setting next to a plateau is trained to the end as well, to find where the plateau ends. Without early
    stopping all trials run at once.
    """

    def run(settings: Sequence[Setting], seeds: Sequence[int], stop_early: bool) -> dict[Trial, TrialOutcome]:
        trials = [Trial(setting, seed) for seed in seeds for setting in settings]
        return search.run({trial: base.trial_config(trial) for trial in trials}, stop_early) if trials else {}

    config = base.config
    if not settings:
        return {}
    if not config.early_stopping:
        return run(settings, config.seeds, stop_early=False)
    first, *others = config.seeds
    outcomes = run(settings, [first], stop_early=True)
    remaining = [trial.setting for trial, outcome in outcomes.items() if outcome.state == "finished"]
    seeds: Sequence[int] = others
    resumed: set[Setting] = set()
    while remaining:
        outcomes = {**outcomes, **run(remaining, seeds, stop_early=False)}
        ends = [row for curve in make_curves(make_rows(outcomes, config.seeds)) for row in curve.neighbours]
        remaining = list(dict.fromkeys(r.setting for r in ends if r.state == "stopped" and r.setting not in resumed))
        resumed.update(remaining)
        seeds = config.seeds
        if remaining:
            names = ", ".join(setting.name for setting in remaining)
            search.screen.log(f"training stopped neighbours of plateaus to the end: {names}")
    return outcomes


def _summarise(
    checked: CheckedConfig,
    outcomes: Mapping[Trial, TrialOutcome],
    rows: list[SettingResult],
    screenings: Mapping[str, TeacherScreening],
    subsets: SubsetScreening,
    best: Mapping[str, float],
) -> TuningResult:
    curves, first = make_curves(rows), checked.base.config.seeds[0]
    by_step = {trial.setting.name: dict(outcome.curve) for trial, outcome in outcomes.items() if trial.seed == first}
    checks = {
        curve.axis: check_screening(curve, screenings[curve.axis], [by_step[row.setting.name] for _, row in curve.rows])
        for curve in curves
        if curve.axis in screenings
    }
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    output = redact(checked.base.config.output)
    return TuningResult(output, checked.metric, rows, curves, screenings, subsets, checks, best, seconds)


def _student_yaml(checked: CheckedConfig, result: TuningResult) -> str:
    texts = {curve.axis: curve.describe().partition(": ")[2] for curve in result.curves}
    origins = {name: f"unchanged: {origin}" for name, origin in checked.origins.items()}
    for name in result.best:
        origins[name] = f"reinforce tune, {result.metric}: {texts[name]}" if name in texts else "set in the tuning"
    header = f"Written by reinforce tune: {checked.base.origin} with the best scales by {result.metric}."
    output = os.path.join(checked.base.config.output.rstrip("/"), "student")
    return render_student_yaml(checked.base.raw, result.best, origins, output, header)
