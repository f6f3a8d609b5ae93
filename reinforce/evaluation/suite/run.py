"""Evaluation of models on the sets of a suite: finished sets are kept, the others computed, by one or more workers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from reinforce import plots
from reinforce.errors import UserError
from reinforce.evaluation.registry import SuiteSet, published_metrics, select_sets
from reinforce.evaluation.report import name_refused
from reinforce.evaluation.suite.files import SetFiles, find_files
from reinforce.evaluation.suite.one_set import evaluate_set, load_models, where_expected
from reinforce.evaluation.suite.results import Line, ResultFile, SuiteReport
from reinforce.evaluation.suite.workers import Job, Options, count_workers, ray_workers, schedule
from reinforce.model_names import model_errors
from reinforce.processes.cores import available_cores
from reinforce.storage import Storage, write_file
from reinforce.terminal import Screen, plural
from teachers.redact import redact
from teachers.spec import ModelSpec, TeacherSpec

if TYPE_CHECKING:
    from reinforce.evaluation.suite.models import Outcome
    from teachers.device.accelerator import Precision

_BATCH = 256


def evaluate_suite(
    specs: Mapping[str, ModelSpec],
    suite: str,
    root: str,
    out: str,
    *,
    names: Sequence[str] = (),
    device: str = "auto",
    precision: Precision = "fp32",
    batch: int | None = None,
    compare: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    pretrained: str | None = None,
) -> SuiteReport:
    """Evaluate all models together on the sets of a suite, and write lines, a table and a picture to ``out``.

    ``workers`` evaluate sets side by side on Ray, at ``address`` or RAY_ADDRESS if there is one; they resolve the names
    of ``specs``, with the tag ``pretrained``. Default: one for each accelerator. One alone works in this process.

    A set that is missing below ``root``, or that cannot be evaluated, is in the report with the reason. Raises
    UserError for other faults: an unknown set or name to compare with, a model that cannot be loaded, no set at all.
    """
    count = count_workers(workers, address, device)
    options = Options(tuple(specs), pretrained, device, precision, batch or _BATCH)
    specs = {redact(name): spec for name, spec in specs.items()}  # they are written to files
    sets = select_sets(suite, names)
    published = published_metrics(compare) if compare else {}
    identities = {name: _identity(name, spec, precision) for name, spec in specs.items()}
    stores = {name: ResultFile(out, name) for name in specs}
    results: dict[str, dict[str, Line]] = {name: {} for name in specs}
    report = SuiteReport(suite, len(select_sets(suite)), sets, results, compared=compare, published=published)
    present = _find(report, root)
    Storage(out).check_writable()
    jobs = []
    for one, files in present:
        for name, store in stores.items():
            if line := store.finished(one, files.digest, identities[name]):
                results[name][one.key] = line
        if pending := tuple(name for name in specs if one.key not in results[name]):
            jobs.append(Job(one, files, pending))
    for job, outcome in (
        _in_turn(jobs, specs, options) if count is None else _side_by_side(jobs, options, address, count)
    ):
        if isinstance(outcome, str):
            report.failed[job.one.key] = outcome
            continue
        for name in job.names:
            results[name][job.one.key] = line = _line(job.one, outcome, name, job.files.digest, identities[name])
            stores[name].add(line)
    write_file(report.markdown().encode(), f"{out.rstrip('/')}/{suite}.md")
    picture = f"{out.rstrip('/')}/{suite}.png"
    if report.evaluated and plots.drawable(f"{picture} is"):
        report.draw(picture)
    return report


def _in_turn(
    jobs: Sequence[Job], specs: Mapping[str, ModelSpec], options: Options
) -> Iterator[tuple[Job, Outcome | str]]:
    """Evaluate sets one after another in this process -> each with its outcome, or why it cannot be used."""
    if not jobs:
        return
    models = load_models(specs, options.device, options.precision, options.batch, available_cores())
    for job in jobs:
        start = time.monotonic()
        outcome: Outcome | str
        with Screen() as screen:
            drawn = partial(_draw, screen, job.one)
            try:
                outcome = evaluate_set(job.one, job.files, models.among(job.names, drawn))
            except UserError as error:
                outcome = str(error)
            screen.log(_describe(job, outcome, f" in {time.monotonic() - start:.0f} s"))
        yield job, outcome


def _side_by_side(
    jobs: Sequence[Job], options: Options, address: str | None, workers: int
) -> Iterator[tuple[Job, Outcome | str]]:
    """Evaluate sets by workers on Ray."""
    if not jobs:
        return
    with ray_workers(options, address, workers) as (start, count), Screen() as screen:
        screen.log(f"{plural(len(jobs), 'set')} by {plural(min(count, len(jobs)), 'worker')}")
        for done, (job, outcome) in enumerate(schedule(jobs, start, count), start=1):
            screen.log(_describe(job, outcome))
            screen.draw(f"{done} of {len(jobs)} sets", done, len(jobs))
            yield job, outcome


def _draw(screen: Screen, one: SuiteSet, images: int) -> None:
    screen.draw(f"{one.name}: {images:,} images", images, one.size)


def _describe(job: Job, outcome: Outcome | str, time_taken: str = "") -> str:
    one = job.one
    if isinstance(outcome, str):
        return f"{one.name} failed: {outcome}"
    scores = ", ".join(f"{name} {100 * (outcome.metrics[name][one.main_metric] or 0):.2f}" for name in job.names)
    return f"{one.name}: {outcome.samples:,} samples{time_taken}; {one.main_metric}: {scores}"


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
        identity = model_identity(TeacherSpec(model=spec.model, pretrained=spec.pretrained))
    content = json.dumps([identity, precision], sort_keys=True)
    return f"{name}@{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"


def _line(one: SuiteSet, outcome: Outcome, model: str, files: str, identity: str) -> Line:
    metrics = outcome.metrics[model]
    differs = []
    if outcome.samples != one.size:
        differs.append(f"{outcome.samples:,} samples (published: {one.size:,})")
    if one.classes is not None and outcome.classes != one.classes:
        differs.append(f"{outcome.classes} classes (published: {one.classes})")
    notes = [f"{', '.join(differs)}: not comparable"] if differs else []
    refused = (
        [f"{len(outcome.refused):,} of {outcome.samples:,} left out: {name_refused(outcome.refused)}"]
        if outcome.refused
        else []
    )
    made_of = {"model": identity, "files": files, "samples": outcome.samples, "notes": notes, "refused": refused}
    main = {"main_metric": metrics[one.main_metric]}
    return {"key": one.key, "dataset": one.name, "metrics": {**metrics, **main}, **made_of}
