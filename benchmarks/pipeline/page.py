"""The table of all figures on the terminal, and the generated parts of docs/performance.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.pipeline.figures import Figure
from benchmarks.pipeline.inputs import SIZE
from benchmarks.pipeline.memory import pixel_cell_bytes
from benchmarks.stored import replace_part

RESULTS = Path(__file__).parents[1] / "results" / "pipeline.json"
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
_DECIMALS = {"ms": 2, "samples/s": 0, "images/s": 0, "MB": 0, "kB": 0, "cosine": 5}
_MEASURED = """\
Measured on {date}: {cpu}, {cores} cores, load average {load average} at the start,
torch {torch}, Pillow {pillow}. Models: {device}. Photographs: JPEGs of 512 x 512 pixels and {photograph bytes:,} bytes;
crops of {size} x {size} pixels.
"""


def number(value: float, unit: str) -> str:
    """A value with the decimals of its unit."""
    return f"{value:,.{_DECIMALS.get(unit, 3)}f} {unit}".rstrip()


def limit_text(figure: Figure) -> str:
    """The limit of a figure: a number, with ``at most`` or ``at least`` for a target."""
    if figure.limit is None:
        return ""
    target = "" if figure.rule == "limit" else f"{figure.rule} "
    return target + number(figure.limit, figure.unit)


def met_text(figure: Figure) -> str:
    return {None: "", True: "yes", False: "no"}[figure.met]


def make_table(figures: Sequence[Figure]) -> Table:
    """All figures for the terminal."""
    table = Table("figure", "measured", "limit", "met")
    for section, part in groupby(figures, key=lambda figure: figure.section):
        table.add_section()
        table.add_row(f"[bold]{section}")
        for figure in part:
            table.add_row(figure.name, number(figure.value, figure.unit), limit_text(figure), met_text(figure))
    return table


def read_figures(results: Mapping[str, Any]) -> list[Figure]:
    """The figures of the stored results."""
    return [Figure(**figure) for figure in results["figures"]]


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with its generated parts written anew; the rest of ``text`` stays."""
    text = replace_part(text, "figures", _figures_part(results))
    return replace_part(text, "sizing", _sizing_part(results))


def _figures_part(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    values = {**machine, **machine["versions"], **results, "size": SIZE}
    lines = ["**These are figures of a quick run, which mean little.**\n"] if results["quick"] else []
    lines += [_MEASURED.format_map(values), "| figure | measured | limit | met |", "| --- | --- | --- | --- |"]
    for section, part in groupby(read_figures(results), key=lambda figure: figure.section):
        lines.append(f"| **{section}** | | | |")
        lines += [
            f"| {each.name} | {number(each.value, each.unit)} | {limit_text(each)} | {met_text(each)} |"
            for each in part
        ]
    return "\n".join(lines) + "\n"


def _sizing_part(results: Mapping[str, Any], rate: int = 1000) -> str:
    """What a number of samples per second needs, by the figures of the host."""
    figures = {figure.name: figure.value for figure in read_figures(results)}
    size = results["photograph bytes"]
    lines = [
        f"| for {rate:,} samples/s of {size / 1000:.0f} kB with | cores | of them for workers' own processes | read "
        "| written, `images: embed` | pixel cells of a worker |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for count in sorted({int(found[1]) for name in figures if (found := re.search(r", (\d+) augm", name))}):
        own = figures[f"CPU per sample of its own process, {count} augmentations"]
        decode = figures[f"CPU per sample of its decode processes, {count} augmentations"]
        written = figures[f"written per sample, {count} augmentations"]
        cells = pixel_cell_bytes(count, cores=16) / 1e6
        lines.append(
            f"| {count} augmentations | {rate * (own + decode) / 1000:.1f} | {rate * own / 1000:.1f} "
            f"| {rate * size / 1e6:.0f} MB/s | {rate * written / 1000:.0f} MB/s | {cells:.0f} MB |"
        )
    return "\n".join(lines) + "\n"
