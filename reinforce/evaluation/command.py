"""Implementation of ``reinforce evaluate``: evaluates models on sets and returns a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforce import settings
from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.report import Report, Result
from reinforce.processes.cores import available_cores
from reinforce.settings import Accelerated, use_accelerator
from reinforce.terminal import Screen
from teachers.fast_paths.usage import problem_lines, snapshot
from teachers.spec import ModelSpec

if TYPE_CHECKING:
    from teachers.runtime.accelerator import Precision


class EvaluationCommand(Evaluation):
    """Sets, and how models run in a command of its own. In a training run they run as the training does."""

    accelerator: Accelerated = "fast"


def build_evaluation(
    config: Path | None,
    zero_shot: Sequence[str] = (),
    retrieval: Sequence[str] = (),
    limit: int | None = None,
    overrides: Sequence[str] = (),
    suite: Mapping[str, Any] | None = None,
) -> EvaluationCommand:
    """Merge a config's ``evaluate`` section with the sets of the command line, which replace those of equal names.

    ``zero_shot`` and ``retrieval`` are NAME=URL. Of each set at most ``limit`` images are used. ``suite`` has the keys
    ``suite``, ``data`` and ``sets``. ``overrides`` are KEY=VALUE, applied last. Raises UserError.
    """
    base = Evaluation() if config is None else settings.load(Evaluation, config, section="evaluate")
    if limit is not None:
        kept: dict[str, dict[str, Any]] = {}
        for metric, (kind, one) in base.own_sets.items():
            kept.setdefault(kind.section, {})[metric.partition("/")[2]] = _with_limit(one, limit)
        base = base.model_copy(update=kept)
    data = base.model_dump(exclude_unset=True) | dict(suite or {})
    for section, place, given in (("zero_shot", "images", zero_shot), ("retrieval", "pairs", retrieval)):
        added = {}
        for text in given:
            name, equals, url = text.partition("=")
            if not equals or not name or not url:
                raise UserError(f"{text!r}: want NAME=URL, for example imagenet=/data/imagenet/val")
            added[name] = {place: url, "limit": limit}
        data[section] = {**data.get(section, {}), **added}
    for override in overrides:
        settings.apply_override(data, override)
    return settings.parse(EvaluationCommand, data, where="command line")


def evaluate_models(
    specs: Mapping[str, ModelSpec],
    evaluation: EvaluationCommand,
    device: str,
    precision: Precision,
    page: str | None = None,
) -> Report:
    """Evaluate each model, one in memory at a time, and write ``page`` with segmentations. Raises UserError."""
    if page is not None and not evaluation.segmentation:
        raise UserError(
            "--page shows segmentations, and no set has masks. Add one: --set segmentation.NAME.images=URL."
        )
    use_accelerator(evaluation.accelerator)
    from reinforce.evaluation.encoding import load_encoders
    from reinforce.evaluation.evaluator import Evaluator
    from reinforce.evaluation.kinds.segmentation import SHOWN, write_page

    evaluator = Evaluator(evaluation, shown=SHOWN if page else 0)
    results: dict[str, Result] = {}
    with Screen() as screen:
        for name, model, accelerator in load_encoders(specs, device, precision, available_cores()):
            if not results:
                screen.log(evaluator.describe(accelerator))
            result = evaluator.evaluate(model, accelerator)
            results[name] = replace(result, metrics=evaluation.combine([result.metrics]))
        for line in problem_lines(snapshot()):
            screen.log(line)
    report = Report(results)
    if page is not None:
        write_page(report, page)
    return report


def _with_limit(one: Any, limit: int) -> Any:
    """A set with at most ``limit`` images; of one with two parts, the part that a classifier learns from is whole."""
    fields = type(one).model_fields
    if "limit" in fields:
        return one.model_copy(update={"limit": min(limit, one.limit or limit)})
    return one.model_copy(update={"test": _with_limit(one.test, limit)}) if "test" in fields else one
