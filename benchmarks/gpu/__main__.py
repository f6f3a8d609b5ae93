"""python -m benchmarks.gpu: measure an accelerator with this project's models, and write the results and the page."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu import page
from benchmarks.gpu.bench import TINY, Bench, Size
from benchmarks.gpu.captions import measure_captions
from benchmarks.gpu.card import measure_card
from benchmarks.gpu.shards import measure_shards
from benchmarks.gpu.students import measure_students
from benchmarks.gpu.towers import measure_towers
from benchmarks.pipeline.figures import Figure
from benchmarks.pipeline.page import make_table
from reinforce.processes.cores import available_cores
from reinforce.shipping.machine import describe_machine
from teachers.device import determinism

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "pyarrow", "numpy")
MINUTES = 7.0  # after which trainings are not compiled any more, which takes minutes; towers 4 minutes earlier
PROCESSES = 12
#: The card comes first: its rates are the limits of the others. Trainings read what the shards have written.
SECTIONS: dict[str, Callable[[Bench], list[Figure]]] = {
    "card": measure_card,
    "towers": measure_towers,
    "captions": measure_captions,
    "shards": measure_shards,
    "students": measure_students,
}
_NEEDED = {"towers": "card", "students": "shards"}


def measure(bench: Bench, sections: Sequence[str], store: Callable[[Sequence[Figure]], None]) -> list[Figure]:
    """The figures of the sections, and of those that they need. ``store`` receives all so far after each of them."""
    needed = {*sections, *(_NEEDED[name] for name in sections if name in _NEEDED)}
    figures: list[Figure] = []
    for name in (name for name in SECTIONS if name in needed):
        start = time.perf_counter()
        figures += bench.attempt(name, lambda section=SECTIONS[name]: section(bench))  # type: ignore[misc]
        store(figures)
        bench.log(f"{name}: {time.perf_counter() - start:.0f} s")
    return figures


def make_results(bench: Bench, figures: Sequence[Figure]) -> dict[str, Any]:
    """What is stored as JSON."""
    return {
        "date": datetime.date.today().isoformat(),
        "card": bench.card(),
        "cuda": torch.version.cuda if bench.on_cuda else None,
        "machine": describe_machine(PACKAGES),
        "decode processes": bench.cores,
        "failures": bench.failures,
        "figures": [asdict(figure) for figure in figures],
    }


def store(target: Path | None, bench: Bench, figures: Sequence[Figure]) -> None:
    """Write the results so far, if there is a file for them."""
    if target is not None:
        target.write_text(json.dumps(make_results(bench, figures), indent=2) + "\n", encoding="utf-8")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny models, whose figures mean nothing: tests the code")
    parser.add_argument("--cores", type=int, help=f"decode processes; default: all cores, at most {PROCESSES}")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], help="print these sections only; nothing is written")
    parser.add_argument("--rounds", type=int, help="rounds of each rate; default: 3")
    parser.add_argument("--results", type=Path, help=f"where to write the figures; default: {page.RESULTS.name}")
    parser.add_argument("--page", action="store_true", help="only write docs/performance.md, from stored figures")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(words)
    console = Console()
    if options.page:
        if not page.RESULTS.exists():
            parser.error(f"{page.RESULTS} does not exist: run `make bench-gpu` on a machine with a GPU first")
        page.write_page()
        console.print(f"written to {page.PAGE}")
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; `--device cpu --tiny` tests the code on a CPU")
    if options.device == "cpu" and not options.tiny:
        parser.error("a CPU takes hours for these models: add --tiny")
    determinism.set_flags(options.device)
    size: Size = TINY if options.tiny else Size()
    if options.rounds is not None:
        size = replace(size, rounds=options.rounds)
    target = options.results or (None if options.tiny or options.only else page.RESULTS)
    deadline = math.inf if options.tiny else time.monotonic() + 60 * MINUTES
    with tempfile.TemporaryDirectory() as folder:
        cores = options.cores or min(PROCESSES, available_cores())
        bench = Bench(Path(folder), options.device, cores, size, console.print, deadline)
        figures = measure(bench, options.only or [*SECTIONS], lambda figures: store(target, bench, figures))
    console.print(make_table(figures))
    if target is not None:
        console.print(f"written to {target}; `python -m benchmarks.gpu --page` updates the page")
    if bench.failures:
        console.print(f"{len(bench.failures)} parts failed: {', '.join(bench.failures)}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
