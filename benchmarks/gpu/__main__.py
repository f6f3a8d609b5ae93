"""python -m benchmarks.gpu: measure an accelerator with this project's models, and write the results and the page."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from benchmarks.gpu import page, recipe
from benchmarks.gpu.bench import TINY, Bench, Size
from benchmarks.gpu.machine import PARTS, check_machine
from benchmarks.gpu.process import run_section
from benchmarks.gpu.results import Results
from benchmarks.gpu.sections import SECTIONS
from benchmarks.pipeline.page import make_table, read_figures
from benchmarks.processes import in_own_process
from reinforce.processes.cores import available_cores
from reinforce.shipping.latency import describe_machine

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "pyarrow", "numpy")
MINUTES = 60.0
PROCESSES = 12
FOLDER, FIRST_HOUR = Path("build") / "bench-gpu", Path("build") / "first-hour"
_KEPT = ("gpu.jsonl", "performance.md", "machine.txt", "logs", "traces")  # in the archive of a first hour


def measure_missing(bench: Bench, names: Sequence[str], results: Results, minutes: float) -> list[str]:
    """Measure the sections that are not stored, then those that have failed, as far as ``minutes`` suffice, each in a
    process of its own -> those left out."""
    end, left_out = time.monotonic() + 60 * minutes, []
    stored = {name: not results.sections[name]["failures"] for name in names if name in results.sections}
    for name in sorted(names, key=stored.__contains__):
        if stored.get(name):
            bench.log(f"{name}: stored")
        elif not bench.size.tiny and time.monotonic() + 60 * SECTIONS[name].minutes > end:
            left_out.append(name)
        else:
            results.add(entry := run_section(bench, name, SECTIONS[name]))
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
    parser.add_argument(
        "--first-hour",
        action="store_true",
        help=f"check the machine, measure it, and write all to {FIRST_HOUR}",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, whose figures mean nothing: tests the code")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the most valuable sections come first")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], help="print these sections only; nothing is written")
    parser.add_argument("--ranks", type=int, default=1, help="train on so many cards, too")
    parser.add_argument("--weights", type=Path, help="a folder of open_clip's local-dir folders, by names of models")
    parser.add_argument("--cores", type=int, help=f"decode processes; default: all cores, at most {PROCESSES}")
    parser.add_argument("--folder", type=Path, help=f"for models, shards, logs and traces; default: {FOLDER}")
    parser.add_argument("--results", type=Path, help=f"where figures are kept; default: {page.RESULTS.name}")
    parser.add_argument("--page", action="store_true", help="only write docs/performance.md, from stored figures")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(words)
    refuse = partial(_refuse, parser)
    console = Console(highlight=False)
    if options.page:
        results = options.results or page.RESULTS
        if not results.exists():
            refuse(f"{results} does not exist: run `make bench-gpu` on a machine with a GPU first")
        page.write_page(results, page.PAGE)
        console.print(f"written to {page.PAGE}")
        return
    device = options.device or ("cpu" if options.tiny else "cuda")
    with contextlib.ExitStack() as stack:
        temporary = options.tiny and not (options.first_hour or options.folder)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if temporary else options.folder
        folder = (folder or (FIRST_HOUR if options.first_hour else FOLDER)).resolve()
        if options.first_hour:
            _check_machine(folder, options.tiny, refuse)
        _check_options(options, device, refuse)
        cores = options.cores or min(PROCESSES, available_cores())
        weights = options.weights and options.weights.resolve()
        bench = Bench(folder, device, cores, TINY if options.tiny else Size(), weights, options.ranks)
        path = folder / "gpu.jsonl" if options.first_hour else None if options.tiny or options.only else page.RESULTS
        results = Results.read(options.results or path)
        try:
            results.begin(in_own_process(describe, bench) if bench.on_cuda else describe(bench))
        except ValueError as error:
            refuse(str(error))
        names = [name for name, section in SECTIONS.items() if name in (options.only or SECTIONS)]
        names = [name for name in names if bench.ranks > 1 or not SECTIONS[name].ranks]
        if options.first_hour:
            console.print("sections, with their minutes as estimated: " + ", ".join(_minutes(names)))
            stack.callback(_keep, folder, results, console)
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


def _check_machine(folder: Path, tiny: bool, refuse: Any) -> None:
    """Print what the machine has and lacks, and end if that is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    checks = check_machine(folder, PARTS[1:] if tiny else PARTS)
    text = "\n".join(map(str, checks))
    (folder / "machine.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    if missing := [check.name for check in checks if check.fix and check.needed]:
        refuse(f"this machine lacks what is needed: {', '.join(missing)}; see above what to do")


def _check_options(options: argparse.Namespace, device: str, refuse: Any) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        refuse("torch sees no CUDA device; `--tiny` tests the code on a CPU")
    if device == "cpu" and not options.tiny:
        refuse("a CPU takes hours for these models: add --tiny")
    if device != "cpu" and options.ranks > torch.cuda.device_count():
        refuse(f"--ranks {options.ranks}, but torch sees {torch.cuda.device_count()} CUDA devices")
    if options.weights is not None and not options.weights.is_dir():
        refuse(f"--weights {options.weights} is not a folder")
    names = recipe.model_names()
    if options.weights is not None and not any((options.weights / name).is_dir() for name in names):
        refuse(f"--weights {options.weights} has no folder of a model that is measured: {', '.join(names)}")


def _minutes(names: Sequence[str]) -> Iterator[str]:
    """Each section with the minute in which it ends."""
    total = 0.0
    for name in names:
        total += SECTIONS[name].minutes
        yield f"{name} {SECTIONS[name].minutes:g} ({total:g})"


def _keep(folder: Path, results: Results, console: Console) -> None:
    """Write the page with what was measured, and one archive of all that is worth keeping."""
    if results.path is not None:
        page.write_page(results.path, folder / "performance.md")
    archive = folder / "first-hour.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name in _KEPT:
            if (folder / name).exists():
                file.add(folder / name, f"first-hour/{name}")
    console.print(f"{folder / 'performance.md'} is docs/performance.md with these figures; all are in {archive}")


def _refuse(parser: argparse.ArgumentParser, text: str) -> NoReturn:
    """End with one line, and the exit status of a wrong option."""
    parser.exit(2, f"{parser.prog}: {text}\n")


if __name__ == "__main__":
    main()
