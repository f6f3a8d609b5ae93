"""The latency report: a terminal table and a JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

SIDES = ("image", "text")


@dataclass(frozen=True)
class LatencyReport:
    """Measurements by model name in ``models``; ``about`` describes the machine and the method."""

    about: dict[str, Any]
    models: dict[str, dict[str, Any]]

    def table(self) -> Table:
        """Return a line for each model and runtime: parameters, operations, and median milliseconds of image and text.

        The number after ± is half the interquartile range. ``faster`` is the speedup over the slowest line, for image
        and text together.
        """
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("model", overflow="fold", min_width=15)
        for column in ("parameters, M", "GFLOP", "image, ms", "text, ms", "faster"):
            table.add_column(column, justify="right", no_wrap=True)
        lines = {
            (model, runtime): times
            for model, about in self.models.items()
            for runtime, times in about["milliseconds"].items()
        }
        slowest = max(map(_sum_of_medians, lines.values()), default=0.0)
        for (model, runtime), times in lines.items():
            about = self.models[model]
            table.add_row(
                model if len(about["milliseconds"]) == 1 else f"{model} ({runtime})",
                " + ".join(f"{about['parameters'][side] / 1e6:.1f}" for side in SIDES),
                " + ".join(f"{about['gflop'][side]:.1f}" for side in SIDES),
                *(_format_range(times[side]) for side in SIDES),
                f"{slowest / _sum_of_medians(times):.1f}x",
            )
        return table

    def lines(self) -> list[str]:
        """Return the machine, the method and the versions as one line."""
        about = self.about
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        cores = f"{about['threads']} of {about['cores']} cores, load average {about['load average']} at the start"
        rounds = f"medians of {about['rounds']} rounds by the {about['clock']}, one image or text at a time"
        return [f"{about['cpu']}, {cores}; {rounds}, random weights; {versions}"]

    def as_json(self) -> dict[str, Any]:
        """The report as it is written."""
        return {**self.about, "models": self.models}


def _sum_of_medians(times: dict[str, dict[str, float]]) -> float:
    return sum(times[side]["median"] for side in SIDES)


def _format_range(times: dict[str, float]) -> str:
    return f"{times['median']:.1f} ±{(times['upper quartile'] - times['lower quartile']) / 2:.1f}"
