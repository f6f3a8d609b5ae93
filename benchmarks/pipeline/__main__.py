"""python -m benchmarks.pipeline: measure the pipeline, and write the results and the page."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.pipeline import page
from benchmarks.pipeline.accelerator import measure_busy
from benchmarks.pipeline.figures import QUICK, Bench, Figure, Scale
from benchmarks.pipeline.host import WORKER, measure_cpu, measure_growth
from benchmarks.pipeline.memory import measure_memory
from benchmarks.pipeline.stand_ins import STAND_IN
from benchmarks.pipeline.student import measure_loader
from benchmarks.pipeline.texts import measure_texts
from benchmarks.stored import update_page
from reinforce.processes.cores import available_cores
from reinforce.shipping.latency import describe_machine

PACKAGES = ("torch", "torchvision", "pillow", "pyarrow", "numpy", "webdataset")
#: What is measured after the host, which gives the accelerator its pace.
SECTIONS: dict[str, Callable[[Bench], list[Figure]]] = {
    "growth": measure_growth,
    "memory": measure_memory,
    "loader": measure_loader,
    "texts": measure_texts,
}
NAMES = ("host", "accelerator", *SECTIONS)


def measure(bench: Bench, sections: Sequence[str] = NAMES) -> list[Figure]:
    """The figures of the sections, in the order of the table."""
    figures: list[Figure] = []
    needed = {*sections, "host"} if "accelerator" in sections else {*sections}
    for name in (name for name in NAMES if name in needed):
        start = time.perf_counter()
        if name == "accelerator":
            figures += measure_busy(bench, host_ms(figures))
        else:
            figures += measure_cpu(bench) if name == "host" else SECTIONS[name](bench)
        bench.log(f"{name}: {time.perf_counter() - start:.0f} s")
    return figures


def host_ms(figures: Sequence[Figure]) -> float:
    """CPU per sample of a worker with all its processes and 2 augmentations, in milliseconds."""
    return sum(
        figure.value
        for figure in figures
        if figure.section == WORKER and figure.unit == "ms" and figure.name.endswith(", 2 augmentations")
    )


def make_results(bench: Bench, machine: dict[str, Any], figures: Sequence[Figure], quick: bool) -> dict[str, Any]:
    """What is stored as JSON."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "device": bench.device,
        "decode processes": bench.cores,
        "quick": quick,
        "photograph bytes": round(statistics.fmean(map(len, bench.photos))),
        "figures": [asdict(figure) for figure in figures],
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument(
        "--device", default=STAND_IN, help="stand-in: no bytes are copied or converted; cuda: on the accelerator"
    )
    parser.add_argument("--cores", type=int, default=available_cores(), help="decode processes; default: all cores")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="print these figures only; nothing is written")
    parser.add_argument("--rounds", type=int, help="rounds of each section; default: 5 of the host, 3 of the others")
    parser.add_argument("--quick", action="store_true", help="a small run, whose figures mean little")
    parser.add_argument("--results", type=Path, help=f"where to write the figures; default: {page.RESULTS.name}")
    parser.add_argument("--page", action="store_true", help="only write docs/performance.md, from stored figures")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(words)
    console = Console()
    if options.page:
        update_page(page.PAGE, page.RESULTS, page.render_page)
        console.print(f"written to {page.PAGE}")
        return
    machine = describe_machine(PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        scale = QUICK if options.quick else Scale()
        if options.rounds is not None:
            scale = replace(scale, rounds=options.rounds, host_rounds=options.rounds)
        bench = Bench(Path(folder), options.device, options.cores, scale, console.print)
        figures = measure(bench, options.only or NAMES)
    console.print(page.make_table(figures))
    target = options.results or (None if options.quick or options.only else page.RESULTS)
    if target is not None:
        results = make_results(bench, machine, figures, options.quick)
        target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {target}; `python -m benchmarks.pipeline --page` updates the page")


if __name__ == "__main__":
    main()
