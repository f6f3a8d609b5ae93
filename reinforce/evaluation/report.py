"""Results of evaluations, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from reinforce.source.samples import Refusal
from reinforce.terminal import first_names, plural

#: Metrics of a model on a set by name; None where a metric is not defined for the set.
Metrics = dict[str, float | None]
#: Ranks k of recall@k.
RECALLS = (1, 5, 10)


def score_table(header: Sequence[str], rows: Iterable[Sequence[str]], models: Sequence[str], texts: int = 1) -> Table:
    """A table whose first columns are ``texts``. Names of models, which may be long paths, are folded."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(header):
        whole = not any(model in name for model in models)
        table.add_column(name, justify="left" if number < texts else "right", no_wrap=whole, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def name_refused(refused: Sequence[Refusal]) -> str:
    """The first refused images, with the reasons."""
    return first_names([f"{refusal.key} ({refusal.reason.value})" for refusal in refused])


@dataclass(frozen=True)
class Segmented:
    """A test image, its true classes and those that a model finds, as WebP, and the share of right pixels."""

    key: str
    image: bytes
    true: bytes
    found: bytes
    right: float


@dataclass(frozen=True)
class Outcome:
    """What a set gives: ``metrics`` by model, the number of ``samples``, those ``refused``, and the ``classes``.

    ``failed`` has the reason why a model has no metrics; ``content`` is the digest of what was read. ``published`` is
    the number of images of a published set, ``note`` what the user should know about the images. ``segmented`` are
    pictures of segmentations by model, as many as ``EvaluatedModels.shown``.
    """

    metrics: dict[str, Metrics]
    samples: int
    refused: list[Refusal]
    classes: int | None = None
    failed: dict[str, str] = field(default_factory=dict)
    content: str = ""
    published: int | None = None
    note: str = ""
    segmented: Mapping[str, Sequence[Segmented]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """The number of images that the metrics are computed on."""
        return self.samples - len(self.refused)

    @property
    def part(self) -> str | None:
        """The evaluated part of the set, such as ``151 of 301 images``; None for the whole set."""
        total = self.samples if self.published is None else self.published
        return None if self.images == total else f"{self.images} of {total} images"

    def __str__(self) -> str:
        refused = f"{len(self.refused):,} refused: {name_refused(self.refused)}" if self.refused else ""
        return "; ".join(part for part in (plural(self.images, "image"), refused, self.note) if part)

    def as_json(self) -> dict[str, Any]:
        refused = [{"key": r.key, "reason": r.reason.value, "detail": r.detail} for r in self.refused]
        return {"images": self.images, "refused": refused} | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Result:
    """``metrics`` by the names of ``Evaluation.metrics``, between 0 and 1; ``sets`` by ``zero_shot/NAME`` etc.

    ``failed`` has the reason why a set has no metrics.
    """

    metrics: dict[str, float]
    sets: dict[str, Outcome]
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, model: str, outcome: Outcome) -> None:
        """Add what a set gives for a model."""
        self.sets[name] = outcome
        if model in outcome.failed:
            self.failed[name] = outcome.failed[model]
        scores = outcome.metrics.get(model, {}).items()
        self.metrics.update({f"{name}/{metric}": score for metric, score in scores if score is not None})


@dataclass(frozen=True)
class Report:
    """Results of several models, keyed by the model names that the user gave."""

    results: dict[str, Result]
    absent: tuple[str, ...] = ()  # a set that is missing ends the evaluation

    def _rows(self) -> list[list[str]]:
        """The name of each metric, and its values in percent by model."""
        rows = []
        for metric in dict.fromkeys(metric for result in self.results.values() for metric in result.metrics):
            row = (result.metrics.get(metric) for result in self.results.values())
            rows.append([metric, *("" if score is None else f"{100 * score:.2f}" for score in row)])
        return rows

    def table(self) -> Table:
        """Metrics in percent, one column per model."""
        return score_table(["metric, %", *self.results], self._rows(), [*self.results])

    def _repr_html_(self) -> str:
        from reinforce.reports import notebook_table

        facts = [("", line) for line in self.lines()]
        return notebook_table("evaluation", facts, ("metric, %", *self.results), self._rows())

    def lines(self) -> list[str]:
        """One line per set with its images, which models with equal summaries share, and one for each that failed."""
        of_models = (result.sets.items() for result in self.results.values())
        lines = dict.fromkeys(f"{name}: {summary}" for sets in of_models for name, summary in sets)
        failed = (
            f"{name} failed: {model}: {why}" for model, one in self.results.items() for name, why in one.failed.items()
        )
        return [*lines, *failed]

    @property
    def failed(self) -> list[str]:
        """The sets that failed for a model."""
        return list(dict.fromkeys(name for result in self.results.values() for name in result.failed))

    def as_json(self) -> dict[str, Any]:
        """Metrics, numbers of images and all refused images, by model."""
        models = {
            model: {
                "metrics": result.metrics,
                "sets": {name: summary.as_json() for name, summary in result.sets.items()},
                "failed": result.failed,
            }
            for model, result in self.results.items()
        }
        return {"models": models}
