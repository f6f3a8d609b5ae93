"""Evaluation of models on the sets of a suite: finished sets are kept, the others computed one after another."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from reinforce import plots
from reinforce.errors import UserError
from reinforce.evaluation.registry import Kind, SuiteSet, published_metrics, select_sets
from reinforce.evaluation.suite.files import SetFiles, find_files
from reinforce.evaluation.suite.results import Line, ResultFile, SuiteReport
from reinforce.model_names import model_errors
from reinforce.processes.cores import available_cores
from reinforce.source.urls import canonical
from reinforce.storage import Storage, write_file
from reinforce.terminal import Screen
from teachers.redact import redact
from teachers.spec import ModelSpec, TeacherSpec

if TYPE_CHECKING:
    from reinforce.evaluation.suite.models import Models, Outcome
    from teachers.device.accelerator import Precision

#: Share of a set's images that may be broken.
BROKEN = 0.001
_SHOWN = 3
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
) -> SuiteReport:
    """Evaluate all models together on the sets of a suite, and write lines, a table and a picture to ``out``.

    A set that is missing below ``root``, or that cannot be evaluated, is in the report with the reason. Raises
    UserError for other faults: an unknown set or name to compare with, a model that cannot be loaded, no set at all.
    """
    specs = {redact(name): spec for name, spec in specs.items()}  # they are written to files
    sets = select_sets(suite, names)
    published = published_metrics(compare) if compare else {}
    identities = {name: _identity(name, spec, precision) for name, spec in specs.items()}
    stores = {name: ResultFile(out, name) for name in specs}
    results: dict[str, dict[str, Line]] = {name: {} for name in specs}
    report = SuiteReport(suite, len(select_sets(suite)), sets, results, compared=compare, published=published)
    present = _find(report, root)
    Storage(out).check_writable()
    models: Models | None = None
    for one, files in present:
        for name, store in stores.items():
            if line := store.finished(one, files.digest, identities[name]):
                results[name][one.key] = line
        pending = [name for name in specs if one.key not in results[name]]
        if not pending:
            continue
        models = models or _load(specs, device, precision, batch or _BATCH)
        try:
            outcome = _evaluate(one, files, models, pending)
        except UserError as error:
            report.failed[one.key] = str(error)
            continue
        for name in pending:
            results[name][one.key] = line = _line(one, outcome, name, files.digest, identities[name])
            stores[name].add(line)
    write_file(report.markdown().encode(), f"{out.rstrip('/')}/{suite}.md")
    picture = f"{out.rstrip('/')}/{suite}.png"
    if report.evaluated and plots.drawable(f"{picture} is"):
        report.draw(picture)
    return report


def _evaluate(one: SuiteSet, files: SetFiles, models: Models, names: Sequence[str]) -> Outcome:
    """Evaluate some of the models on a set and show the progress. Raises UserError."""
    start = time.monotonic()
    with Screen() as screen:
        chosen = models.among(names, lambda images: screen.draw(f"{one.name}: {images:,} images", images, one.size))
        try:
            outcome = evaluate_set(one, files, chosen)
        except UserError as error:
            screen.log(f"{one.name} failed: {error}")
            raise
        scores = ", ".join(f"{name} {100 * (outcome.metrics[name][one.main_metric] or 0):.2f}" for name in names)
        seconds = time.monotonic() - start
        screen.log(f"{one.name}: {outcome.samples:,} samples in {seconds:.0f} s; {one.main_metric}: {scores}")
    return outcome


def evaluate_set(one: SuiteSet, files: SetFiles, models: Models) -> Outcome:
    """Evaluate models on a set. Raises UserError where it cannot be used, or where a number would not be right."""
    return _check(one, _kinds()[one.kind](one, files, models))


def find_set(one: SuiteSet, root: str) -> SetFiles:
    """The files of a set below ``root``. Raises UserError if there are none."""
    files = find_files(one, root)
    if files is None:
        raise UserError(f"{one.name} is {_expected(one, root)}. Copy it there, or leave it out of `sets`.")
    return files


def _expected(one: SuiteSet, root: str) -> str:
    return f"expected at {canonical(one.place(root))}; published at {one.page}"


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
            report.absent[one.key] = _expected(one, root)
        else:
            present.append((one, files))
    if not present and not report.failed:
        first = report.sets[0]
        raise UserError(f"--data has none of the {len(report.sets)} sets: {first.name} is {report.absent[first.key]}.")
    return present


def _kinds() -> dict[Kind, Callable[[SuiteSet, SetFiles, Models], Outcome]]:
    """How the sets of each kind are evaluated; they load torch."""
    from reinforce.evaluation.suite.association import associate
    from reinforce.evaluation.suite.choice import choose
    from reinforce.evaluation.suite.classification import classify
    from reinforce.evaluation.suite.retrieval import retrieve

    return {"classification": classify, "retrieval": retrieve, "association": associate, "choice": choose}


def _load(specs: Mapping[str, ModelSpec], device: str, precision: Precision, batch: int) -> Models:
    """Load all models onto one device. Raises UserError."""
    import torch

    from reinforce.evaluation.suite.models import Models
    from teachers.device.accelerator import Accelerator
    from teachers.device.determinism import set_flags
    from teachers.open_clip.teacher import OpenClipTeacher

    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))  # torch ignores quotas of containers
    set_flags(device)
    encoders = {}
    for name, spec in specs.items():
        with model_errors(name):
            accelerator = Accelerator(device, precision)
            encoders[name] = OpenClipTeacher(TeacherSpec(model=spec.model, pretrained=spec.pretrained), accelerator)
    return Models(encoders, accelerator, batch, available_cores())


def _identity(name: str, spec: ModelSpec, precision: str) -> str:
    """Identify a model by its weights and the precision, so that results of other weights are not kept for it."""
    from teachers.open_clip.family import model_identity

    with model_errors(name):
        identity = model_identity(TeacherSpec(model=spec.model, pretrained=spec.pretrained))
    content = json.dumps([identity, precision], sort_keys=True)
    return f"{name}@{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"


def _check(one: SuiteSet, outcome: Outcome) -> Outcome:
    """Raise UserError where a number would look right but is not."""
    if len(outcome.refused) > BROKEN * outcome.samples:
        raise UserError(
            f"{one.name}: {len(outcome.refused):,} of {outcome.samples:,} images cannot be used, more than "
            f"{BROKEN:.1%}: {_named(outcome)}. Download the set again."
        )
    for name, metrics in outcome.metrics.items():
        score = metrics.get(one.main_metric)
        if score is None or not math.isfinite(score):
            raise UserError(f"{one.name}: {name} has no {one.main_metric}, since no sample of the set counts for it.")
    if not outcome.metrics:
        raise UserError(f"{one.name} has no samples. Download the set again.")
    return outcome


def _line(one: SuiteSet, outcome: Outcome, model: str, files: str, identity: str) -> Line:
    metrics = outcome.metrics[model]
    differs = []
    if outcome.samples != one.size:
        differs.append(f"{outcome.samples:,} samples (published: {one.size:,})")
    if one.classes is not None and outcome.classes != one.classes:
        differs.append(f"{outcome.classes} classes (published: {one.classes})")
    notes = [f"{', '.join(differs)}: not comparable"] if differs else []
    refused = (
        [f"{len(outcome.refused):,} of {outcome.samples:,} left out: {_named(outcome)}"] if outcome.refused else []
    )
    made_of = {"model": identity, "files": files, "samples": outcome.samples, "notes": notes, "refused": refused}
    main = {"main_metric": metrics[one.main_metric]}
    return {"key": one.key, "dataset": one.name, "metrics": {**metrics, **main}, **made_of}


def _named(outcome: Outcome) -> str:
    some = ", ".join(f"{refusal.key} ({refusal.reason.value})" for refusal in outcome.refused[:_SHOWN])
    return some + (", ..." if len(outcome.refused) > _SHOWN else "")
