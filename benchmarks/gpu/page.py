"""The generated part of docs/performance.md about a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.pipeline.page import PAGE, limit_text, met_text, number, read_figures

RESULTS = Path(__file__).parents[1] / "results" / "gpu.json"
_MARKERS = re.compile(r"(<!-- gpu:[^\n]*-->\n).*?(<!-- end of gpu -->)", flags=re.DOTALL)


def write_page() -> None:
    """Write the stored figures to the page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(render_page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with its part about a GPU written anew; the rest of ``text`` stays."""
    if len(_MARKERS.findall(text)) != 1:
        raise ValueError("the page must have one part between `<!-- gpu: ... -->` and `<!-- end of gpu -->`")
    return _MARKERS.sub(lambda match: match[1] + _part(results) + match[2], text)


def _part(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        f"Measured on {results['date']}: {results['card']} (CUDA {results['cuda']}), {machine['cpu']},",
        f"{machine['cores']} cores, {results['decode processes']} decode processes, "
        f"torch {machine['versions']['torch']}. Weights are random.",
        "",
    ]
    for section, figures in groupby(read_figures(results), key=lambda figure: figure.section):
        lines += [f"| {section} | measured | limit | met |", "| --- | ---: | ---: | --- |"]
        for figure in figures:
            cells = (figure.name, number(figure.value, figure.unit), limit_text(figure), met_text(figure))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines) + "\n"
