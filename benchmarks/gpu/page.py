"""The generated part of docs/performance.md about a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import usage_text
from benchmarks.gpu.results import Results
from benchmarks.gpu.sections.captions import ENCODING
from benchmarks.gpu.sections.right import RIGHT
from benchmarks.gpu.trace import limit_of
from benchmarks.pipeline.page import PAGE, limit_text, met_text, number, read_figures
from benchmarks.stored import replace_part

RESULTS = Path(__file__).parents[1] / "results" / "gpu.jsonl"
#: Milliseconds of a source image of configs/dfn5b.yaml on an H100, as they were estimated before there was a card.
ESTIMATES = {
    "teachers": "2.4",
    ENCODING: "0.5",
    "decoding": "0.85",
    "texts": "0.16",
    "gaps": "0.1 to 0.3",
    "all": "4.1",
}


_UNCHECKED = ("card", "loss", "loader")  # sections whose figures do not depend on what models compute
_SHOWN = ("clock MHz", "power W", "power limit W", "temperature C", "memory MiB")


def write_page(results: Path, page: Path) -> None:
    """Write docs/performance.md, with the stored figures, as ``page``."""
    page.write_text(render_page(PAGE.read_text(encoding="utf-8"), Results.read(results)), encoding="utf-8")


def render_page(text: str, results: Results) -> str:
    """The page with its part about a GPU written anew; the rest of ``text`` stays."""
    return replace_part(text, "gpu", "\n".join(_part(results)))


def _part(results: Results) -> Iterator[str]:
    machine, wrong = results.machine, _wrong(results)
    if wrong:
        yield f"**{wrong}: the figures below are those of code whose results are not known to be right.**\n"
    real = ", ".join(machine["real weights"]) or "none, all are random"
    yield f"Measured on {machine['date']}: {machine['card']} (CUDA {machine['cuda']}), {machine['cpu']},"
    yield f"{machine['cores']} cores, {machine['decode processes']} decode processes, torch"
    yield f"{machine['versions']['torch']}. Real weights: {real}.\n"
    yield from _estimates(results)
    for name, entry in results.sections.items():
        yield f"| {name} | measured | limit | met | calls in fast paths | what limited it |"
        yield "| --- | ---: | ---: | --- | --- | --- |"
        for figure in read_figures(entry):
            limited = limit_of(entry["traces"].get(figure.name, {}), entry["card"].get("at power limit", 0.0))
            value = number(figure.value, figure.unit)
            if wrong and figure.unit.endswith("/s") and name not in _UNCHECKED:
                value += f" (**{wrong}**)"
            paths = entry.get("usage", {}).get(figure.name)
            calls = "" if paths is None else usage_text(paths)
            cells = (figure.name, value, limit_text(figure), met_text(figure), calls, limited)
            yield f"| {' | '.join(cells)} |"
        for what, error in entry["failures"].items():
            yield f"| **FAILED**: {what} | {error} | | no | | |"
        yield f"\nIn {entry['seconds']:.0f} s: {_readings(entry['card'])}.\n"


def _wrong(results: Results) -> str:
    """What is known against the results of the models; empty where `right` was measured without a failure."""
    if RIGHT not in results.sections:
        return "`right` was not measured"
    failures = results.sections[RIGHT]["failures"]
    return f"`right` FAILED in {len(failures)}" if failures else ""


def _estimates(results: Results) -> Iterator[str]:
    """What a source image took of the device, beside what was estimated."""
    values = {figure["name"]: figure["value"] for entry in results.sections.values() for figure in entry["figures"]}
    took = {name: values[f"a source image: {name}"] for name in ESTIMATES if f"a source image: {name}" in values}
    if not took:
        return
    if ENCODING in values:
        took[ENCODING] = 1000 / values[ENCODING]
        took["decoding"] = values["a source image: captions"] - took[ENCODING]
    yield "| milliseconds of a source image | measured | estimated for an H100 |\n| --- | ---: | ---: |"
    for name, estimate in ESTIMATES.items():
        yield f"| {name} | {f'{took[name]:.2f}' if name in took else ''} | {estimate} |"
    yield ""


def _readings(card: Mapping[str, Any]) -> str:
    if "absent" in card:
        return str(card["absent"])
    known = [name for name in _SHOWN if name in card]
    return ", ".join("{} {:,.0f} ({:,.0f} to {:,.0f})".format(name, *card[name]) for name in known)
