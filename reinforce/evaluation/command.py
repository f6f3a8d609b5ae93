"""Implementation of ``reinforce evaluate``: evaluates models on sets and returns a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforce import settings
from reinforce.errors import UserError
from reinforce.evaluation.config import RETRIEVAL, ZERO_SHOT, Evaluation
from reinforce.evaluation.report import Report, Result
from reinforce.processes.cores import available_cores
from reinforce.terminal import Screen
from teachers.spec import ModelSpec

if TYPE_CHECKING:
    from teachers.device.accelerator import Precision


def build_evaluation(
    config: Path | None,
    zero_shot: Sequence[str],
    retrieval: Sequence[str],
    common: Mapping[str, Any],
    limit: int | None,
    batch: int | None,
    images_from: Sequence[str] = (),
) -> Evaluation:
    """Merge the sets of a config's ``evaluate`` section with those of the command line, which override equal names.

    ``zero_shot`` and ``retrieval`` are NAME=URL; ``common`` are further keys of every zero-shot set of the command
    line. Raises UserError.
    """
    base = Evaluation() if config is None else settings.load(Evaluation, config, section="evaluate")
    from_options = {
        ZERO_SHOT: {name: {"images": url, **common, "limit": limit} for name, url in map(_split_name, zero_shot)},
        RETRIEVAL: {name: {"pairs": url, "limit": limit} for name, url in map(_split_name, retrieval)},
    }
    added = settings.parse(Evaluation, from_options, where="command line")
    if common and not zero_shot:
        raise UserError(f"--{', --'.join(common)}: these options apply to the sets of --zero-shot, and none is given.")
    return base.model_copy(
        update={
            ZERO_SHOT: {**base.zero_shot, **added.zero_shot},
            RETRIEVAL: {**base.retrieval, **added.retrieval},
            "batch": batch or base.batch,
            "images_from": [*(base.images_from or ()), *images_from],
        }
    )


def evaluate_models(
    specs: Mapping[str, ModelSpec],
    evaluation: Evaluation,
    device: str,
    precision: Precision,
) -> Report:
    """Evaluate each model, one in memory at a time. Raises UserError."""
    from reinforce.evaluation.encoding import load_encoders
    from reinforce.evaluation.evaluator import Evaluator

    evaluator = Evaluator(evaluation)
    results: dict[str, Result] = {}
    for name, model, accelerator in load_encoders(specs, device, precision, available_cores()):
        if not results:
            Screen().log(evaluator.describe(accelerator))
        result = evaluator.evaluate(model, accelerator)
        results[name] = replace(result, metrics=evaluation.combine([result.metrics]))
    return Report(results)


def _split_name(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not name or not url:
        raise UserError(f"{text!r}: want NAME=URL, for example imagenet=/data/imagenet/val")
    return name, url
