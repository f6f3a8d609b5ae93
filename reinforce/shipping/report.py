"""Latencies of models side by side, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from reinforce.errors import UserError
from reinforce.plots import write_file

SIDES = ("image", "text")


@dataclass(frozen=True)
class Latencies:
    """``about`` is what was measured on; ``models`` is what was found, by what the user calls them."""

    about: dict[str, Any]
    models: dict[str, dict[str, Any]]

    def table(self) -> Table:
        """A line for each model and runtime: parameters, operations, and the median milliseconds of image and text.

        Behind +- stands half of what lies between the quartiles. ``faster`` says how often image and text together
        fit into the time that the slowest line takes for them.
        """
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("model", overflow="fold", min_width=15)
        for column in ("parameters, M", "GFLOP", "image, ms", "text, ms", "faster"):
            table.add_column(column, justify="right", no_wrap=True)
        lines = {
            (model, runtime): found
            for model, about in self.models.items()
            for runtime, found in about["milliseconds"].items()
        }
        slowest = max(map(_both, lines.values()), default=0.0)
        for (model, runtime), found in lines.items():
            about = self.models[model]
            table.add_row(
                model if len(about["milliseconds"]) == 1 else f"{model} ({runtime})",
                " + ".join(f"{about['parameters'][side] / 1e6:.1f}" for side in SIDES),
                " + ".join(f"{about['gflop'][side]:.1f}" for side in SIDES),
                *(_range(found[side]) for side in SIDES),
                f"{slowest / _both(found):.1f}x",
            )
        return table

    def line(self) -> str:
        """Where this was measured."""
        about = self.about
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        cores = f"{about['threads']} of {about['cores']} cores, load average {about['load average']} at the start"
        rounds = f"medians of {about['rounds']} rounds by the {about['clock']}, one image or text at a time"
        return f"{about['cpu']}, {cores}; {rounds}, random weights; {versions}"

    def write(self, url: str) -> None:
        """As JSON to a path or fsspec URL. Raises UserError where that cannot be written."""
        data = {**self.about, "models": self.models}
        try:
            write_file((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(), url)
        except OSError as error:
            raise UserError(f"{url} cannot be written: {error}. Give another --json FILE.") from error


def _both(found: dict[str, dict[str, float]]) -> float:
    return sum(found[side]["median"] for side in SIDES)


def _range(found: dict[str, float]) -> str:
    return f"{found['median']:.1f} ±{(found['upper quartile'] - found['lower quartile']) / 2:.1f}"
