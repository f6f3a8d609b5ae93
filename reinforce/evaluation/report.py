"""What an evaluation found, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from rich.table import Table

from reinforce.errors import UserError
from reinforce.plots import write_file
from reinforce.source.shards import Refusal

_NAMED = 3  # refused images in a line


@dataclass(frozen=True)
class Judged:
    """How many images a set's metrics are over, and which it went without."""

    images: int
    refused: list[Refusal]

    def __str__(self) -> str:
        if not self.refused:
            return f"{self.images:,} images"
        some = ", ".join(f"{refusal.key} ({refusal.reason.value})" for refusal in self.refused[:_NAMED])
        more = ", ..." if len(self.refused) > _NAMED else ""
        return f"{self.images:,} images; without {len(self.refused):,} that were refused: {some}{more}"


@dataclass(frozen=True)
class Result:
    """``metrics`` by the names of ``Evaluation.metrics``, within 0 and 1; ``sets`` by ``zero_shot/NAME``."""

    metrics: dict[str, float]
    sets: dict[str, Judged]


@dataclass(frozen=True)
class Report:
    """Results of models side by side, by what the user calls them."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    sets: dict[str, dict[str, Judged]] = field(default_factory=dict)

    def add(self, model: str, result: Result) -> None:
        self.metrics[model] = dict(result.metrics)
        self.sets[model] = result.sets

    def table(self) -> Table:
        """Metrics in percent, a column for each model."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("%", no_wrap=True)
        for model in self.metrics:
            table.add_column(model, justify="right", overflow="fold")
        for metric in dict.fromkeys(metric for scores in self.metrics.values() for metric in scores):
            found = (scores.get(metric) for scores in self.metrics.values())
            table.add_row(metric, *("" if score is None else f"{100 * score:.2f}" for score in found))
        return table

    def lines(self) -> list[str]:
        """What each set was judged by; one line for all models where they are alike."""
        told = {f"{name}: {judged}": None for sets in self.sets.values() for name, judged in sets.items()}
        return list(told)

    def write(self, url: str) -> None:
        """As JSON to a path or fsspec URL: metrics within 0 and 1, images judged, and every refused one by name.

        Raises UserError where that cannot be written.
        """
        models = {
            model: {
                "metrics": self.metrics[model],
                "sets": {
                    name: {
                        "images": judged.images,
                        "refused": [
                            {"key": r.key, "reason": r.reason.value, "detail": r.detail} for r in judged.refused
                        ],
                    }
                    for name, judged in self.sets[model].items()
                },
            }
            for model in self.metrics
        }
        try:
            write_file((json.dumps({"models": models}, indent=2, ensure_ascii=False) + "\n").encode(), url)
        except OSError as error:
            raise UserError(f"{url} cannot be written: {error}. Give another --json FILE.") from error
