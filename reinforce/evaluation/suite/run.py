"""Evaluation of models on the sets of a suite: finished sets are kept, the others computed, by one or more workers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

from reinforce import plots
from reinforce.errors import UserError
from reinforce.evaluation.command import EvaluationCommand
from reinforce.evaluation.kinds.files import SetFiles, find_files, where_expected
from reinforce.evaluation.registry import TEXTLESS, SuiteSet, published_metrics, select_sets
from reinforce.evaluation.report import Outcome, name_refused
from reinforce.evaluation.suite.results import Line, ResultFile, SuiteReport
from reinforce.evaluation.suite.workers import Job, Options, count_workers, ray_workers, run_job
from reinforce.model_names import model_errors
from reinforce.processes.cores import available_cores
from reinforce.processes.fast_paths import use_accelerator
from reinforce.storage import Storage, write_file
from reinforce.terminal import Screen, plural
from teachers.redact import redact
from teachers.spec import ModelSpec, TeacherSpec

if TYPE_CHECKING:
    from reinforce.evaluation.models import Models
    from teachers.runtime.accelerator import Precision


def evaluate_suite(
    specs: Mapping[str, ModelSpec],
    evaluation: EvaluationCommand,
    out: str,
    *,
    device: str = "auto",
    precision: Precision = "fp32",
    compare: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    pretrained: str | None = None,
) -> SuiteReport:
    """Evaluate all models together on the suite of a config, and write lines, a table and a picture to ``out``.

    ``workers`` evaluate sets side by side on Ray, at ``address`` or RAY_ADDRESS if there is one; they resolve the names
    of ``specs``, with the tag ``pretrained``. Default: one for each accelerator. One alone works in this process.

    A set that is missing, or that cannot be evaluated, is in the report with the reason. Raises UserError for other
    faults: an unknown name to compare with, a model that cannot be loaded, no set at all.
    """
    suite, root, sets = evaluation.suite or "", evaluation.data or "", evaluation.suite_sets
    count = count_workers(workers, address, device)
    switch = use_accelerator(evaluation.accelerator)
    options = Options(tuple(specs), pretrained, device, precision, evaluation.batch, suite in TEXTLESS, switch)
    specs = {redact(name): spec for name, spec in specs.items()}  # they are written to files
    published = published_metrics(compare) if compare else {}
    stores = {name: ResultFile(out, name, _identity(name, spec, precision)) for name, spec in specs.items()}
    report = SuiteReport(suite, len(select_sets(suite)), sets, {name: {} for name in specs}, published, compare)
    present = _find(report, root)
    Storage(out).check_writable()
    jobs = _plan(present, stores, report.results)
    done = _in_turn(jobs, specs, options) if count is None else _side_by_side(jobs, options, address, count)
    for job, outcome in done:
        key = job.one.key
        if isinstance(outcome, str):
            report.failed[key] = outcome
            continue
        if outcome.failed:
            report.failed[key] = " ".join(f"{name}: {reason}" for name, reason in outcome.failed.items())
        for name in {*job.names, *job.kept} - outcome.failed.keys():
            kept = stores[name].line(job.one)  # of equal content, where nothing is computed
            line = _line(job, outcome, name) if name in outcome.metrics else dict(kept or {})
            report.results[name][key] = stores[name].add(job.one, line | {"files": job.files.state})
    write_file(report.markdown().encode(), f"{out.rstrip('/')}/{suite}.md")
    picture = f"{out.rstrip('/')}/{suite}.png"
    if report.evaluated and plots.drawable(f"{picture} is"):
        report.draw(picture)
    return report


def _plan(
    present: Sequence[tuple[SuiteSet, SetFiles]],
    stores: Mapping[str, ResultFile],
    results: dict[str, dict[str, Line]],
) -> list[Job]:
    """Add the lines that fit to ``results`` -> what is to be read or evaluated.

    Where a model has a line, but the state of the files has changed, their content decides.
    """
    jobs = []
    for one, files in present:
        names, kept = [], {}
        for name, store in stores.items():
            line = store.line(one)
            if line is None:
                names.append(name)
            elif files.state and line.get("files") == files.state:
                results[name][one.key] = line
            else:
                kept[name] = str(line["content"])
        if names or kept:
            jobs.append(Job(one, files, tuple(names), kept))
    for name, store in stores.items():
        if store.outdated:
            Screen().log(
                f"{name}: {plural(len(store.outdated), 'result')} of an earlier version computed again, since they do "
                "not state the content of their sets, or are of another version of the metric"
            )
    return jobs


def _in_turn(
    jobs: Sequence[Job], specs: Mapping[str, ModelSpec], options: Options
) -> Iterator[tuple[Job, Outcome | str]]:
    """Evaluate sets one after another in this process -> each with its outcome, or why it cannot be used."""
    if not jobs:
        return
    from reinforce.evaluation.models import load_models

    threads = available_cores()
    models = cache(partial(load_models, specs, options.device, options.precision, options.batch, threads))
    for job in jobs:
        if job.names:
            models()
        start = time.monotonic()
        with Screen() as screen:
            shown = partial(_on_screen, models, screen)
            outcome = run_job(job, shown, partial(_draw, screen, job.one), threads)
            screen.log(_describe(job, outcome, f" in {time.monotonic() - start:.0f} s"))
        yield job, outcome


def _side_by_side(
    jobs: Sequence[Job], options: Options, address: str | None, workers: int
) -> Iterator[tuple[Job, Outcome | str]]:
    """Evaluate sets by workers on Ray, the largest first. One whose worker dies each time has that as its outcome."""
    if not jobs:
        return
    with ray_workers(options, address, workers) as (pool, evaluate), Screen() as screen:
        screen.log(f"{plural(len(jobs), 'set')} by {plural(min(pool.limit(), len(jobs)), 'worker')}")
        largest = sorted(jobs, key=lambda job: -job.one.size)
        found = pool.map(evaluate, largest, name=lambda job: job.one.name, lost=lambda job, reason: reason)
        for done, (job, outcome) in enumerate(found, start=1):
            screen.log(_describe(job, outcome))
            screen.draw(f"{done} of {len(jobs)} sets", done, len(jobs))
            yield job, outcome


def _on_screen(models: Callable[[], Models], screen: Screen) -> Models:
    return replace(models(), open_screen=lambda: nullcontext(screen))


def _draw(screen: Screen, one: SuiteSet, images: int) -> None:
    screen.draw(f"{one.name}: {images:,} images", images, one.size)


def _describe(job: Job, outcome: Outcome | str, time_taken: str = "") -> str:
    one = job.one
    if isinstance(outcome, str):
        return f"{one.name} failed: {outcome}"
    scores = [f"{name} {100 * (metrics[one.main_metric] or 0):.2f}" for name, metrics in outcome.metrics.items()]
    parts = [f"{one.main_metric}: {', '.join(scores)}"] if scores else []
    parts += [f"{name} failed: {reason}" for name, reason in outcome.failed.items()]
    kept = {*job.kept} - {*outcome.metrics, *outcome.failed}
    parts += ["kept, since the content is the same"] if kept else []
    parts += ["evaluated again, since the content has changed"] if {*job.kept} - kept else []
    samples = f"{outcome.samples:,} samples" if outcome.samples else "read"
    return f"{one.name}: {samples}{time_taken}; {'; '.join(parts)}"


def _find(report: SuiteReport, root: str) -> list[tuple[SuiteSet, SetFiles]]:
    """Find the files of all sets; note those without. Raises UserError if there are none at all."""
    present = []
    for one in report.sets:
        try:
            files = find_files(one, root)
        except UserError as error:
            report.failed[one.key] = str(error)
            continue
        if files is None:
            report.absent[one.key] = where_expected(one, root)
        else:
            present.append((one, files))
    if not present and not report.failed:
        first = report.sets[0]
        raise UserError(f"--data has none of the {len(report.sets)} sets: {first.name} is {report.absent[first.key]}.")
    return present


def _identity(name: str, spec: ModelSpec, precision: str) -> str:
    """Identify a model by its weights and the precision, so that results of other weights are not kept for it."""
    from teachers.open_clip.family import model_identity

    with model_errors(name):
        identity = (
            spec.describe().identity
            if isinstance(spec, TeacherSpec)
            else model_identity(TeacherSpec(model=spec.model, pretrained=spec.pretrained))
        )
    content = json.dumps([identity, precision], sort_keys=True)
    return f"{name}@{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"


def _line(job: Job, outcome: Outcome, model: str) -> Line:
    one, metrics = job.one, outcome.metrics[model]
    differs = []
    if outcome.samples != one.size:
        differs.append(f"{outcome.samples:,} samples (published: {one.size:,})")
    if one.classes is not None and outcome.classes != one.classes:
        differs.append(f"{outcome.classes} classes (published: {one.classes})")
    refused = f"{len(outcome.refused):,} of {outcome.samples:,} left out: {name_refused(outcome.refused)}"
    return {
        "metrics": {**metrics, "main_metric": metrics[one.main_metric]},
        "content": outcome.content,
        "samples": outcome.samples,
        "notes": [f"{', '.join(differs)}: not comparable"] if differs else [],
        "refused": [refused] if outcome.refused else [],
    }
