"""The latency report: a terminal table, a JSON file and a picture."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from reinforce import plots
from reinforce.errors import UserError
from reinforce.evaluation.registry import published_metrics
from reinforce.evaluation.suite.results import ResultFile

SIDES = ("image", "text")
_IMAGENET = "imagenet1k"


@dataclass(frozen=True)
class LatencyReport:
    """Measurements by model name in ``models``; ``about`` describes the machine and the method."""

    about: dict[str, Any]
    models: dict[str, dict[str, Any]]

    def table(self) -> Table:
        """Return a line for each model and runtime: sizes, operations, and median milliseconds of an image and a text.

        MB are those of exported files. The number after ± is half the interquartile range. ``faster`` is the speedup
        over the slowest line, for image and text together.
        """
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("model", overflow="fold", min_width=15)
        files = ["files, MB"] if any("bytes" in about for about in self.models.values()) else []
        batch = self.about.get("batch", 1)
        for column in ("parameters, M", *files, "GFLOP", "image, ms", "text, ms", "faster"):
            table.add_column(column, justify="right", no_wrap=True)
        lines = self._lines()
        slowest = max(map(_sum_of_medians, lines.values()), default=0.0)
        for (model, runtime), times in lines.items():
            about = self.models[model]
            sizes = about.get("bytes", {}).get(runtime)
            table.add_row(
                model if len(about["milliseconds"]) == 1 else f"{model} ({runtime})",
                " + ".join(_format_number(about["parameters"][side] / 1e6) for side in SIDES),
                *(" + ".join(f"{sizes[side] / 1e6:.1f}" for side in SIDES if sizes) for _ in files),
                " + ".join(_format_number(about["gflop"][side]) for side in SIDES),
                *(_format_range(times[side], batch) for side in SIDES),
                f"{slowest / _sum_of_medians(times):.1f}x",
            )
        return table

    def lines(self) -> list[str]:
        """Return the machine, the method and the versions as one line."""
        about, batch = self.about, self.about["batch"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        cores = f"{about['threads']} of {about['cores']} cores, load average {about['load average']} at the start"
        inputs = "one image or text at a time" if batch == 1 else f"of one image or text in batches of {batch}"
        rounds = f"medians of {about['rounds']} rounds by the {about['clock']}, {inputs}"
        return [f"{about['cpu']}, {cores}; {rounds}, random weights; {versions}"]

    def as_json(self) -> dict[str, Any]:
        """The report as it is written."""
        return {**self.about, "models": self.models}

    def draw(self, accuracies: Mapping[str, float], url: str) -> None:
        """Draw accuracies, by model, over the milliseconds of an image and a text together, in each runtime.

        Models without accuracy are left out.
        """
        figure, (axes,) = plots.figure()
        from matplotlib.ticker import LogFormatter

        lines = {key: times for key, times in self._lines().items() if key[0] in accuracies}
        for number, runtime in enumerate(dict.fromkeys(runtime for _, runtime in lines)):
            points = [
                (_sum_of_medians(times) / self.about["batch"], 100 * accuracies[model])
                for (model, of), times in lines.items()
                if of == runtime
            ]
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=plots.colour(number), label=runtime)
        for model in dict.fromkeys(model for model, _ in lines):
            fastest = min(_sum_of_medians(times) for (of, _), times in lines.items() if of == model)
            place = (fastest / self.about["batch"], 100 * accuracies[model])
            axes.annotate(model, place, (-6, 4), textcoords="offset points", ha="right", fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())  # plain numbers
        axes.xaxis.set_minor_formatter(LogFormatter())
        axes.margins(x=0.2, y=0.1)
        plots.label(
            axes, f"Accuracy over latency, {self.about['threads']} thread(s) of {self.about['cpu']}",
            "milliseconds of an image and a text", "ImageNet-1k zero-shot accuracy (%)",
        )  # fmt: skip
        plots.legend(axes)
        try:
            plots.save(figure, url)
        except OSError as error:
            raise UserError(f"{url} cannot be written: {error}. Name another file.") from error

    def _lines(self) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
        """Milliseconds by model and runtime."""
        return {
            (model, runtime): times
            for model, about in self.models.items()
            for runtime, times in about["milliseconds"].items()
        }


def find_accuracies(models: Sequence[str], results: str | None) -> dict[str, float]:
    """Return ImageNet-1k zero-shot accuracies by model: of a folder of ``reinforce evaluate --suite``, or published.

    Raises UserError if there is none at all.
    """
    found = {}
    for model in models:
        measured = ResultFile(results, model).main_metric(_IMAGENET) if results is not None else None
        with contextlib.suppress(UserError):  # of models of which nothing is published
            name = model.partition(",")[0].lower().replace("-", "_").replace("_l_14", "_l14")
            measured = measured if measured is not None else published_metrics(name)[_IMAGENET]
        if measured is not None:
            found[model] = measured
    if not found:
        raise UserError(
            f"--picture: nothing is published of {', '.join(models)}. Name a MobileCLIP or MobileCLIP2 of open_clip as "
            "well, or give --results, the folder of `reinforce evaluate --suite` with ImageNet-1k."
        )
    return found


def _sum_of_medians(times: dict[str, dict[str, float]]) -> float:
    return sum(times[side]["median"] for side in SIDES)


def _format_range(times: dict[str, float], batch: int) -> str:
    half = (times["upper quartile"] - times["lower quartile"]) / 2
    return f"{times['median'] / batch:.1f} ±{half / batch:.1f}"


def _format_number(value: float) -> str:
    """A number with one digit after the point, or with two that are not 0."""
    return f"{value:.1f}" if value >= 1 or not value else f"{value:.2g}"
