"""The table of the control plane in docs/performance.md."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.pipeline.figures import Figure
from benchmarks.pipeline.page import limit_text, met_text, number, read_figures
from benchmarks.stored import replace_part

RESULTS = Path(__file__).parents[1] / "results" / "scale.json"


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with the table written anew; the rest of ``text`` stays."""
    machine = results.get("machine", results)
    lines = [
        f"Measured on {results['date']}: {machine['cpu']}, {machine['cores']} cores, load average "
        f"{machine['load average']}.\n",
        "| figure | measured | target | met |",
        "| --- | --- | --- | --- |",
    ]
    alone = results.get("measured alone", {})
    for section, part in groupby(read_figures(results), key=lambda figure: figure.section):
        load = f", load average {alone[section]}" if section in alone else ""
        lines.append(f"| **{section}**{load} | | | |")
        for each in part:
            cells = (each.name, _value(each), limit_text(each), met_text(each))
            lines.append(f"| {' | '.join(cells)} |")
    return replace_part(text, "scale", "\n".join(lines))


def replaced(results: Mapping[str, Any], figures: Sequence[Figure], load: float) -> dict[str, Any]:
    """The results with other figures of some sections, which were measured alone at a load average."""
    sections = {figure.section: load for figure in figures}
    kept = [figure for figure in results["figures"] if figure["section"] not in sections]
    alone = {**results.get("measured alone", {}), **sections}
    return {**results, "measured alone": alone, "figures": [*kept, *(asdict(figure) for figure in figures)]}


def _value(figure: Figure) -> str:
    """The value in three digits or more; a count as it is."""
    if figure.unit in ("ms", "MB"):
        return number(figure.value, figure.unit)
    text = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.3g}"
    return f"{text} {figure.unit}".rstrip()


def replace_figures(figures: Sequence[Figure]) -> None:
    """Store other figures of some sections, with the load average of the last minute."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    new = replaced(results, figures, round(os.getloadavg()[0], 1))
    RESULTS.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
