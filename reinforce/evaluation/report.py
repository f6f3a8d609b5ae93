"""Results of evaluations, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from reinforce.source.samples import Refusal
from reinforce.terminal import first_names, plural


def name_refused(refused: Sequence[Refusal]) -> str:
    """The first refused images, with the reasons."""
    return first_names([f"{refusal.key} ({refusal.reason.value})" for refusal in refused])


@dataclass(frozen=True)
class SetSummary:
    """The number of images that a set's metrics are computed on, and the images that were refused.

    ``published`` is the number of images of a published set.
    """

    images: int
    refused: list[Refusal]
    published: int | None = None

    @property
    def part(self) -> str | None:
        """The evaluated part of the set, such as ``151 of 301 images``; None for the whole set."""
        total = self.images + len(self.refused) if self.published is None else self.published
        return None if self.images == total else f"{self.images} of {total} images"

    def __str__(self) -> str:
        if not self.refused:
            return f"{plural(self.images, 'image')}"
        return f"{plural(self.images, 'image')}; {len(self.refused):,} refused: {name_refused(self.refused)}"

    def as_json(self) -> dict[str, Any]:
        refused = [{"key": r.key, "reason": r.reason.value, "detail": r.detail} for r in self.refused]
        return {"images": self.images, "refused": refused}


@dataclass(frozen=True)
class Result:
    """``metrics`` by the names of ``Evaluation.metrics``, between 0 and 1; ``sets`` by ``zero_shot/NAME`` etc.

    ``failed`` has the reason why a set has no metrics.
    """

    metrics: dict[str, float]
    sets: dict[str, SetSummary]
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Results of several models, keyed by the model names that the user gave."""

    results: dict[str, Result]

    def table(self) -> Table:
        """Metrics in percent, one column per model."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("%", no_wrap=True)
        for model in self.results:
            table.add_column(model, justify="right", overflow="fold")
        for metric in dict.fromkeys(metric for result in self.results.values() for metric in result.metrics):
            row = (result.metrics.get(metric) for result in self.results.values())
            table.add_row(metric, *("" if score is None else f"{100 * score:.2f}" for score in row))
        return table

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
