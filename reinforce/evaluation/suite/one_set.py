"""Evaluation of loaded models on one set of a suite, and the checks that its numbers are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from reinforce.errors import UserError
from reinforce.evaluation.registry import Kind, SuiteSet
from reinforce.evaluation.report import name_refused
from reinforce.evaluation.suite.files import SetFiles, find_files
from reinforce.images.policy import PUBLISHED_POLICY
from reinforce.source.urls import canonical
from teachers.spec import ModelSpec

if TYPE_CHECKING:
    from reinforce.evaluation.suite.content import ContentDigest
    from reinforce.evaluation.suite.models import Models, Outcome
    from teachers.device.accelerator import Precision

_READ_AT_ONCE = 64
#: Share of a set's images that may be broken.
BROKEN = 0.001
#: Version of the metrics of each kind. Increase it with a change after which a kept result would be another.
_VERSIONS: dict[Kind, int] = {"classification": 1, "retrieval": 1, "association": 1, "choice": 1}


def metric_version(one: SuiteSet) -> str:
    """Settings that determine the metrics of a set, besides its content and the model."""
    return f"{one.kind} {_VERSIONS[one.kind]}, {one.main_metric}, {PUBLISHED_POLICY}"


def evaluate_set(one: SuiteSet, files: SetFiles, models: Models, digest: ContentDigest | None = None) -> Outcome:
    """Evaluate models on a set; ``digest`` receives what is read.

    A model with embeddings that are not finite is in ``failed`` of the outcome, and has no metrics. Raises UserError
    where the set cannot be used, or where a number would not be right.
    """
    from reinforce.evaluation.encoding import NOT_FINITE_FIX

    models = models.for_set(digest)
    outcome = _kinds()[one.kind](one, files, models)
    found = {name: models.not_finite.describe(name) for name in outcome.metrics}
    failed = {name: f"{fault}. {NOT_FINITE_FIX}" for name, fault in found.items() if fault}
    metrics = {name: of_model for name, of_model in outcome.metrics.items() if name not in failed}
    content = "" if digest is None else digest.hexdigest()
    return _check(one, replace(outcome, metrics=metrics, failed=failed, content=content))


def read_content(one: SuiteSet, files: SetFiles, threads: int) -> str:
    """The digest of a set's content, of which nothing is decoded. Raises UserError where it cannot be used."""
    from reinforce.evaluation.suite.content import ContentDigest
    from reinforce.evaluation.suite.models import Models
    from teachers.device.accelerator import Accelerator

    digest = ContentDigest()
    _kinds()[one.kind](one, files, Models({}, Accelerator("cpu"), _READ_AT_ONCE, threads).for_set(digest))
    return digest.hexdigest()


def find_set(one: SuiteSet, root: str) -> SetFiles:
    """The files of a set below ``root``. Raises UserError if there are none."""
    files = find_files(one, root)
    if files is None:
        raise UserError(f"{one.name} is {where_expected(one, root)}. Copy it there, or leave it out of `sets`.")
    return files


def where_expected(one: SuiteSet, root: str) -> str:
    """Where the files of a set should be, and where they are published."""
    return f"expected at {canonical(one.place(root))}; published at {one.page}"


def _kinds() -> dict[Kind, Callable[[SuiteSet, SetFiles, Models], Outcome]]:
    """How the sets of each kind are evaluated; they load torch."""
    from reinforce.evaluation.suite.association import associate
    from reinforce.evaluation.suite.classification import classify
    from reinforce.evaluation.suite.retrieval import choose, retrieve

    return {"classification": classify, "retrieval": retrieve, "association": associate, "choice": choose}


def load_models(specs: Mapping[str, ModelSpec], device: str, precision: Precision, batch: int, threads: int) -> Models:
    """Load all models onto one device, with ``threads`` that decode images. Raises UserError."""
    from reinforce.evaluation.encoding import load_encoders
    from reinforce.evaluation.suite.models import Models

    loaded = [*load_encoders(specs, device, precision, threads)]
    return Models({name: model for name, model, _ in loaded}, loaded[-1][2], batch, threads)


def _check(one: SuiteSet, outcome: Outcome) -> Outcome:
    """Raise UserError where a number would look right but is not."""
    if len(outcome.refused) > BROKEN * outcome.samples:
        raise UserError(
            f"{one.name}: {len(outcome.refused):,} of {outcome.samples:,} images cannot be used, more than "
            f"{BROKEN:.1%}: {name_refused(outcome.refused)}. Download the set again."
        )
    for name, metrics in outcome.metrics.items():
        score = metrics.get(one.main_metric)
        if score is None or not math.isfinite(score):
            raise UserError(f"{one.name}: {name} has no {one.main_metric}, since no sample of the set counts for it.")
    if not outcome.metrics and not outcome.failed:
        raise UserError(f"{one.name} has no samples. Download the set again.")
    return outcome
