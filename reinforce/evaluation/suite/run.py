"""Evaluation of models on the sets of a suite: finished sets are kept, the others computed.

It is done in this process, or side by side by workers on Ray, each with all models on one accelerator.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

from reinforce import plots
from reinforce.errors import UserError
from reinforce.evaluation.command import EvaluationCommand
from reinforce.evaluation.kinds.files import SetFiles, find_files, where_expected
from reinforce.evaluation.registry import TEXTLESS, SuiteSet, published_metrics, select_sets
from reinforce.evaluation.report import Outcome, name_refused
from reinforce.evaluation.suite.results import Line, ResultFile, SuiteReport
from reinforce.model_names import model_errors, resolve_models
from reinforce.parallel.map_workers import Actors, MapWorkers
from reinforce.processes.cores import available_cores, cores_per_process
from reinforce.processes.fast_paths import use_accelerator
from reinforce.storage import Storage, write_file
from reinforce.terminal import Screen, plural
from teachers.redact import redact
from teachers.spec import ModelSpec, TeacherSpec

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import Models
    from teachers.runtime.accelerator import Precision


@dataclass(frozen=True)
class Job:
    """A set, its files, and the names of the models that lack a result on it.

    ``kept`` has the content of kept results by model, whose files had another state: a result is kept if the files
    still have this content.
    """

    one: SuiteSet
    files: SetFiles
    names: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How the models of a command are loaded: their ``names`` there, and the arguments of ``evaluate_suite``."""

    names: tuple[str, ...]
    pretrained: str | None
    device: str
    precision: Precision
    batch: int
    teachers: bool
    accelerator: Literal["fast", "plain"]


def run_job(job: Job, models: Callable[[], Models], progress: Callable[[int], None], threads: int) -> Outcome | str:
    """The outcome of the models without a result of this content, or why the set cannot be used.

    ``models`` loads all models, where one is needed.
    """
    from reinforce.evaluation.evaluator import evaluate_published, read_content
    from reinforce.evaluation.images import ContentDigest

    try:
        content = read_content(job.one, job.files, threads) if job.kept else ""
    except UserError as error:
        return str(error)
    names = (*job.names, *(name for name, known in job.kept.items() if known != content))
    if not names:
        return Outcome({}, 0, [], content=content)
    loaded = models()
    needed = replace(loaded, encoders={name: loaded.encoders[name] for name in names})
    try:
        return evaluate_published(job.one, job.files, needed, ContentDigest(), progress)
    except UserError as error:
        return str(error)


def count_workers(workers: int | None, address: str | None, device: str) -> int | None:
    """Number of workers on Ray, or None where the sets are evaluated in this process. Connects to nothing.

    Raises UserError for a device that several workers cannot share.
    """
    if workers is not None and workers > 1 and ":" in device:
        raise UserError(f"--workers {workers}: each needs an accelerator of its own; --device {device} is one.")
    if address or os.environ.get("RAY_ADDRESS"):
        return workers or 0  # as many as the cluster has accelerators
    if workers is None and device in ("auto", "cuda"):
        import torch

        workers = torch.cuda.device_count()
    return workers if workers is not None and workers > 1 else None


@contextlib.contextmanager
def ray_workers(options: Options, address: str | None, workers: int) -> Iterator[tuple[MapWorkers, EvaluateSet]]:
    """Yield workers on Ray, ``workers`` or one for each accelerator, and what they do with a set.

    Raises UserError if there are fewer accelerators than workers.
    """
    from reinforce.cluster import live_resources, ray_cluster

    with ray_cluster(address, log_to_driver=False):
        nodes = live_resources()
        gpus = 0 if options.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        count = workers or max(1, gpus)
        if gpus and count > gpus:
            raise UserError(f"--workers {count}: there are {gpus} accelerators. Lower it, or use --device cpu.")
        threads = cores_per_process(nodes, count, 1.0 if gpus else 0.0)
        with Actors(count, 1 if gpus else 0) as actors:
            yield actors, EvaluateSet(options, os.getcwd(), threads)


class EvaluateSet:
    """Evaluates sets in a worker, which loads the models once; in ``folder`` if the machine has it."""

    def __init__(self, options: Options, folder: str, threads: int) -> None:
        self._options, self._folder, self._threads = options, folder, threads
        self._models: Models | None = None
        self._copies = contextlib.ExitStack()  # of remote models

    def __call__(self, job: Job) -> Outcome | str:
        """The outcome, or why the set cannot be used. Raises UserError for a model that cannot be loaded."""
        if os.path.isdir(self._folder):
            os.chdir(self._folder)
        threads = min(self._threads, available_cores())
        return run_job(job, lambda: self._load(threads), lambda _: None, threads)

    def _load(self, threads: int) -> Models:
        if self._models is None:
            from reinforce.evaluation.encoding import load_models

            options = self._options
            use_accelerator(options.accelerator)
            specs = self._copies.enter_context(
                resolve_models(options.names, options.pretrained, teachers=options.teachers)
            )
            named = {redact(name): spec for name, spec in specs.items()}
            self._models = load_models(named, options.device, options.precision, options.batch, threads)
        return self._models


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
    from reinforce.evaluation.encoding import load_models

    threads = available_cores()
    models = cache(partial(load_models, specs, options.device, options.precision, options.batch, threads))
    for job in jobs:
        if job.names:
            models()
        start = time.monotonic()
        with Screen() as screen:
            outcome = run_job(job, models, partial(_draw, screen, job.one), threads)
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
