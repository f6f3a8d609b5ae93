"""What ``reinforce evaluate`` does: models and sets by name in, a report out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforce import settings
from reinforce.errors import UserError
from reinforce.evaluation import clip_benchmark
from reinforce.evaluation.config import RETRIEVAL, ZERO_SHOT, Evaluation
from reinforce.evaluation.report import Report
from reinforce.model_names import model_errors
from teachers.spec import ModelSpec, TeacherSpec

if TYPE_CHECKING:
    from teachers.device import Precision


def evaluation_of(
    config: Path | None,
    zero_shot: Sequence[str],
    retrieval: Sequence[str],
    common: Mapping[str, Any],
    limit: int | None,
    batch: int | None,
) -> Evaluation:
    """The sets of a config's ``evaluate`` section and those of the command line, which go before of equal names.

    ``zero_shot`` and ``retrieval`` are NAME=URL; ``common`` are further keys of each zero-shot set of the command
    line. Raises UserError.
    """
    base = Evaluation() if config is None else settings.load(Evaluation, config, section="evaluate")
    more = {
        ZERO_SHOT: {name: {"images": url, **common, "limit": limit} for name, url in map(_named, zero_shot)},
        RETRIEVAL: {name: {"pairs": url, "limit": limit} for name, url in map(_named, retrieval)},
    }
    added = settings.parse(Evaluation, more, where="command line")
    if common and not zero_shot:
        raise UserError(f"--{', --'.join(common)}: these are of the sets of --zero-shot, and there is none.")
    return base.model_copy(
        update={
            ZERO_SHOT: {**base.zero_shot, **added.zero_shot},
            RETRIEVAL: {**base.retrieval, **added.retrieval},
            "batch": batch or base.batch,
        }
    )


def judge(
    specs: Mapping[str, ModelSpec],
    evaluation: Evaluation,
    device: str,
    precision: Precision,
    benchmark: Path | None = None,
) -> Report:
    """Judge each model, one in memory at a time; with ``benchmark`` also by clip_benchmark. Raises UserError."""
    from reinforce.evaluation.evaluator import Evaluator
    from teachers.device import Accelerator
    from teachers.open_clip import OpenClipTeacher

    commands = {} if benchmark is None else clip_benchmark.commands(specs, benchmark)
    evaluator = Evaluator(evaluation)
    report = Report()
    for name, spec in specs.items():
        with model_errors(name):
            accelerator = Accelerator(device, precision)
            model = OpenClipTeacher(TeacherSpec(model=spec.model, pretrained=spec.pretrained), accelerator)
        report.add(name, evaluator.evaluate(model, accelerator))
    for name, arguments in commands.items():
        assert benchmark is not None
        report.metrics[name] |= clip_benchmark.run(arguments, name, benchmark)
    return report


def _named(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not name or not url:
        raise UserError(f"{text!r}: want NAME=URL, for example imagenet=/data/imagenet/val")
    return name, url
