"""python -m benchmarks.gpu: measure an accelerator with this project's models, and write the results and the page."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.gpu import captions, card, loader, losses, page, right, shards, students, teachers
from benchmarks.gpu.bench import TINY, Bench, Size
from benchmarks.gpu.probe import probing
from benchmarks.gpu.results import Results
from benchmarks.pipeline.figures import Figure
from benchmarks.pipeline.page import limit_text, make_table, number, read_figures
from reinforce.processes.cores import available_cores
from reinforce.shipping.machine import describe_machine
from teachers.fast_paths import recompilation
from teachers.runtime import determinism

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "pyarrow", "numpy")
MINUTES = 60.0
PROCESSES = 12
FOLDER = Path("build") / "bench-gpu"


@dataclass(frozen=True)
class Section:
    """A part of the benchmark, and the minutes that it takes on an H100, as estimated.

    Figures of one that ``checks`` must meet their limits. One for ``ranks`` needs several cards.
    """

    measure: Callable[[Bench], list[Figure]]
    minutes: float
    checks: bool = False
    ranks: bool = False


#: By their value: what comes first is measured first.
SECTIONS: dict[str, Section] = {
    "card": Section(card.measure_card, 2),
    "right": Section(right.measure_right, 4, checks=True),
    "shards": Section(shards.measure_shards, 4),
    "captions": Section(captions.measure_captions, 3),
    "students": Section(students.measure_students, 8),
    "ranks": Section(students.measure_ranks, 5, checks=True, ranks=True),
    "bytes": Section(shards.check_shards, 5, checks=True),
    "run": Section(shards.measure_run, 3, checks=True),
    "loader": Section(loader.measure_loader, 2, checks=True),
    "loss": Section(losses.measure_loss, 1, checks=True),
    "resumed": Section(students.compare_resumed, 2, checks=True),
    "teachers": Section(teachers.measure_teachers, 8),
    "augmentations": Section(shards.measure_many_augmentations, 3),
    "teacher-switches": Section(teachers.measure_switches, 5),
    "caption-switches": Section(captions.measure_switches, 5),
    "teacher-batches": Section(teachers.measure_batches, 3),
    "caption-batches": Section(captions.measure_batches, 2),
}


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """The entry of a section: its figures, what failed in it, readings of the card, and traces."""
    section, start = SECTIONS[name], time.perf_counter()
    bench.failures.clear()
    bench.traces.clear()
    with probing(bench.device) as readings:
        figures = bench.attempt(name, lambda: section.measure(bench))
    for figure in figures:
        if section.checks and (figure.met is False or math.isnan(figure.value)):
            bench.fail(f"{name}: {figure.name}", f"{number(figure.value, figure.unit)}, not {limit_text(figure)}")
    return {
        "section": name,
        "seconds": round(time.perf_counter() - start, 1),
        "figures": [asdict(figure) for figure in figures],
        "failures": dict(bench.failures),
        "card": readings,
        "traces": dict(bench.traces),
    }


def measure_missing(bench: Bench, names: Sequence[str], results: Results, minutes: float) -> list[str]:
    """Measure the sections that are not stored or have failed, as far as ``minutes`` suffice -> those left out."""
    end, left_out = time.monotonic() + 60 * minutes, []
    for name in names:
        if name in results.sections and not results.sections[name]["failures"]:
            bench.log(f"{name}: stored")
        elif not bench.size.tiny and time.monotonic() + 60 * SECTIONS[name].minutes > end:
            left_out.append(name)
        else:
            results.add(entry := measure(bench, name))
            bench.log(f"{name}: {entry['seconds']:.0f} s")
    return left_out


def describe(bench: Bench) -> dict[str, Any]:
    """What the results belong to."""
    machine = describe_machine(PACKAGES)
    real = [] if bench.weights is None else sorted(path.name for path in bench.weights.iterdir() if path.is_dir())
    return {
        "date": datetime.date.today().isoformat(),
        "card": bench.card(),
        "cuda": torch.version.cuda if bench.on_cuda else None,
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "versions": machine["versions"],
        "decode processes": bench.cores,
        "real weights": real,
        "tiny": bench.size.tiny,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", help="cuda, cuda:1, or cpu with --tiny; default: cuda, with --tiny the CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny models, whose figures mean nothing: tests the code")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the most valuable sections come first")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], help="print these sections only; nothing is written")
    parser.add_argument("--ranks", type=int, default=1, help="train on so many cards, too")
    parser.add_argument("--weights", type=Path, help="a folder of open_clip's local-dir folders, by names of models")
    parser.add_argument("--cores", type=int, help=f"decode processes; default: all cores, at most {PROCESSES}")
    parser.add_argument("--folder", type=Path, help=f"for models, shards and traces; default: {FOLDER}")
    parser.add_argument("--results", type=Path, help=f"where figures are kept; default: {page.RESULTS.name}")
    parser.add_argument("--page", action="store_true", help="only write docs/performance.md, from stored figures")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(words)
    refuse = partial(_refuse, parser)
    console = Console(highlight=False)
    if options.page:
        if not page.RESULTS.exists():
            refuse(f"{page.RESULTS} does not exist: run `make bench-gpu` on a machine with a GPU first")
        page.write_page()
        console.print(f"written to {page.PAGE}")
        return
    device = options.device or ("cpu" if options.tiny else "cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        refuse("torch sees no CUDA device; `--tiny` tests the code on a CPU")
    if device == "cpu" and not options.tiny:
        refuse("a CPU takes hours for these models: add --tiny")
    if device != "cpu" and options.ranks > torch.cuda.device_count():
        refuse(f"--ranks {options.ranks}, but torch sees {torch.cuda.device_count()} CUDA devices")
    if options.weights is not None and not options.weights.is_dir():
        refuse(f"--weights {options.weights} is not a folder")
    with contextlib.ExitStack() as stack:
        folder = options.folder or (
            Path(stack.enter_context(tempfile.TemporaryDirectory())) if options.tiny else FOLDER
        )
        cores = options.cores or min(PROCESSES, available_cores())
        size = TINY if options.tiny else Size()
        bench = Bench(folder.resolve(), device, cores, size, options.weights, options.ranks, console.print)
        results = Results.read(options.results or (None if options.tiny or options.only else page.RESULTS))
        try:
            results.begin(describe(bench))
        except ValueError as error:
            refuse(str(error))
        if not bench.on_cuda:
            stack.enter_context(_captured_only())
        determinism.set_flags(device)
        names = [name for name, section in SECTIONS.items() if name in (options.only or SECTIONS)]
        names = [name for name in names if bench.ranks > 1 or not SECTIONS[name].ranks]
        left_out = measure_missing(bench, names, results, options.minutes)
    entries = [results.sections[name] for name in names if name in results.sections]
    console.print(make_table([figure for entry in entries for figure in read_figures(entry)]))
    if left_out:
        console.print(f"left out: {', '.join(left_out)}; the same command continues with them")
    if results.path is not None:
        console.print(f"written to {results.path}; `python -m benchmarks.gpu --page` updates the page")
    failures = [what for entry in entries for what in entry["failures"]]
    if failures:
        console.print(f"{len(failures)} FAILED: {', '.join(failures)}")
        raise SystemExit(1)


def _refuse(parser: argparse.ArgumentParser, text: str) -> NoReturn:
    """End with one line, and the exit status of a wrong option."""
    parser.exit(2, f"{parser.prog}: {text}\n")


def _captured_only() -> AbstractContextManager[object]:
    """Let fast paths capture graphs and not compile them, which takes minutes on a CPU."""
    return patch.object(recompilation, "inductor", lambda graph, _: graph.forward)


if __name__ == "__main__":
    main()
