"""``reinforce export latency``: size of models, the time of one image and one text, and the machine that was measured.

Architectures are measured, with random weights and reparameterized as for export. Measurements of all models are
interleaved, so that other load on the machine affects them equally.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from rich.table import Table

from reinforce import reports
from reinforce.errors import UserError
from reinforce.evaluation.model_names import model_errors
from reinforce.evaluation.registry import published_metrics
from reinforce.evaluation.suite import ResultFile
from reinforce.processes.cores import available_cores, describe_share
from reinforce.shipping.packages import TARGETS, TORCH, Runtime, load_target
from reinforce.shipping.targets.base import (
    ExportOptions,
    Tower,
    count_parameters,
    reparameterize,
    size_of,
    split_towers,
    step,
    step_screen,
)
from reinforce.terminal import Screen
from teachers.open_clip.teacher import image_spec, model_name, random_model
from teachers.open_clip.text import Tokenizer
from teachers.pixels import to_pixels
from teachers.runtime.flops import counted_flops
from teachers.spec import ModelSpec


def machine_name() -> str:
    """Return processor and number of cores as text."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """Return processor, available cores, load, system, and versions of Python and of installed ``packages``."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "load average": None if load is None else round(load, 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def cpu_name() -> str:
    """Return the model of the processor, from /proc/cpuinfo where it exists."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


SIDES = ("image", "text")
_IMAGENET = "imagenet1k"


@dataclass(frozen=True)
class LatencyReport:
    """Measurements by model name in ``models``, as a table, JSON and a picture; ``about`` describes the machine and the
    method."""

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
            ranges = []
            for of in (times[side] for side in SIDES):
                half = (of["upper quartile"] - of["lower quartile"]) / 2
                ranges.append(f"{of['median'] / batch:.1f} ±{half / batch:.1f}")
            table.add_row(
                model if len(about["milliseconds"]) == 1 else f"{model} ({runtime})",
                " + ".join(_format_number(about["parameters"][side] / 1e6) for side in SIDES),
                *(" + ".join(f"{sizes[side] / 1e6:.1f}" for side in SIDES if sizes) for _ in files),
                " + ".join(_format_number(about["gflop"][side]) for side in SIDES),
                *ranges,
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
        figure, (axes,) = reports.figure()
        from matplotlib.ticker import LogFormatter

        lines = {key: times for key, times in self._lines().items() if key[0] in accuracies}
        for number, runtime in enumerate(dict.fromkeys(runtime for _, runtime in lines)):
            points = [
                (_sum_of_medians(times) / self.about["batch"], 100 * accuracies[model])
                for (model, of), times in lines.items()
                if of == runtime
            ]
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=reports.colour(number), label=runtime)
        for model in dict.fromkeys(model for model, _ in lines):
            fastest = min(_sum_of_medians(times) for (of, _), times in lines.items() if of == model)
            place = (fastest / self.about["batch"], 100 * accuracies[model])
            axes.annotate(model, place, (-6, 4), textcoords="offset points", ha="right", fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())  # plain numbers
        axes.xaxis.set_minor_formatter(LogFormatter())
        axes.margins(x=0.2, y=0.1)
        reports.label(
            axes, f"Accuracy over latency, {self.about['threads']} thread(s) of {self.about['cpu']}",
            "milliseconds of an image and a text", "ImageNet-1k zero-shot accuracy (%)",
        )  # fmt: skip
        reports.legend(axes)
        try:
            reports.save(figure, url)
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


def _format_number(value: float) -> str:
    """A number with one digit after the point, or with two that are not 0."""
    return f"{value:.1f}" if value >= 1 or not value else f"{value:.2g}"


_TEXT = "a photo of a small brown dog that runs over wet grass"
Clock = Literal["wall", "process"]
_CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
_PACKAGES = ("torch", "open_clip_torch", "timm")


@dataclass
class TimedTower:
    """One tower of a model in one runtime, with its measured ``seconds``."""

    model: str
    runtime: str
    side: str
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def measure_latency(
    specs: Mapping[str, ModelSpec],
    *,
    rounds: int,
    threads: int | None = None,
    runtimes: Mapping[str, Runtime] | None = None,
    clock: Clock = "wall",
    image_sizes: Sequence[int] = (),
    batch: int = 1,
) -> LatencyReport:
    """Measure models, by the name that the user gave, in torch and other runtimes. Raises UserError.

    A round runs every tower twice and times the second run, with ``batch`` images or texts of the tokenizer's full
    length; rounds alternate between forward and backward order. Torch takes normalized float32 pixels, the other
    runtimes bytes, as the exported graphs do. LiteRT and ExecuTorch take a batch row by row. The clock ``process``
    counts CPU seconds of this process on all threads, which depend less on other load. With ``threads``, as many cores
    are used and no others. With ``image_sizes``, each model is measured at each, as ``NAME at SIZE``.
    """
    now, runtimes = _CLOCKS[clock], runtimes or {}
    packages = dict.fromkeys(name for runtime in runtimes.values() for name in TARGETS[runtime.target].packages)
    about = describe_machine((*_PACKAGES, *packages))
    cores = available_cores()
    if threads is not None and threads > cores:
        raise UserError(f"threads: {threads} threads on {cores} cores would wait for each other. Give at most {cores}.")
    pinned, threads = threads, threads or min(torch.get_num_threads(), cores)  # torch ignores quotas
    torch.set_num_threads(threads)
    models: dict[str, dict[str, Any]] = {}
    towers: list[TimedTower] = []
    converted: dict[tuple[str, str], dict[str, Path]] = {}
    with _pin_to_cores(pinned), tempfile.TemporaryDirectory(prefix="reinforce-latency-") as folder:
        with step_screen() as screen:  # and none during the measurement, which it would disturb
            screen.log(f"{rounds} rounds on {describe_share(threads, 0)}, device cpu")
            for number, (name, (given, size)) in enumerate(sized_names([*specs], image_sizes).items()):
                with model_errors(name):
                    models[name], exported, of_model = _prepare(name, specs[given], size, batch)
                    towers += of_model
                    for one in exported:
                        key = (given if one.name == "text" else name, one.name)  # one text tower for all sizes
                        if key not in converted:
                            to = Path(folder, f"{number}-{one.name}")
                            converted[key] = _convert(screen, name, one, runtimes, to)
                        inputs = one.example(batch)
                        for runtime, path in converted[key].items():
                            models[name].setdefault("bytes", {}).setdefault(runtime, {})[one.name] = size_of(path)
                            run = load_target(runtimes[runtime].target).load(path, threads)
                            towers.append(TimedTower(name, runtime, one.name, partial(run, inputs)))
        for number in range(rounds):
            for tower in towers if number % 2 == 0 else reversed(towers):
                tower.run()
                start = now()
                tower.run()
                tower.seconds.append(now() - start)
    for tower in towers:
        models[tower.model]["milliseconds"].setdefault(tower.runtime, {})[tower.side] = _summarise(tower.seconds)
    about |= {"threads": threads, "clock": f"{clock} clock", "rounds": rounds, "batch": batch}
    return LatencyReport({"date": datetime.date.today().isoformat(), **about}, models)


def sized_names(names: Sequence[str], image_sizes: Sequence[int]) -> dict[str, tuple[str, int | None]]:
    """Return the name in the report -> the given name of a model, and its image size if it is not the model's own."""
    if not image_sizes:
        return {name: (name, None) for name in names}
    return {f"{name} at {size}": (name, size) for name in names for size in image_sizes}


@contextlib.contextmanager
def _pin_to_cores(count: int | None) -> Iterator[None]:
    """Keep this thread, and those that it starts, on the last ``count`` of the cores that it may use; None: on all."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _prepare(
    name: str, spec: ModelSpec, size: int | None, batch: int
) -> tuple[dict[str, Any], list[Tower], list[TimedTower]]:
    """Return the sizes of a model, its towers to export, and its towers in torch."""
    architecture = model_name(spec)
    clip = reparameterize(random_model(architecture, image_size=size))
    image = image_spec(open_clip.get_model_preprocess_cfg(clip))
    exported = split_towers(clip, image, Tokenizer(architecture)([_TEXT]))
    tokens = exported[1].example(1)

    def encoders(count: int) -> dict[str, Callable[[], object]]:
        pixels, texts = to_pixels(exported[0].example(count), image), exported[1].example(count)
        return {"image": lambda: clip.encode_image(pixels), "text": lambda: clip.encode_text(texts)}

    counts = count_parameters(clip)
    about: dict[str, Any] = {
        "image size": [image.height, image.width],
        "context length": tokens.shape[1],
        "parameters": {**counts, "total": sum(counts.values())},
        "gflop": {side: counted_flops(run) / 1e9 for side, run in encoders(1).items()},
        "milliseconds": {},
    }
    return (
        about,
        exported,
        [TimedTower(name, TORCH, side, torch.inference_mode()(run)) for side, run in encoders(batch).items()],
    )


def _convert(screen: Screen, name: str, tower: Tower, runtimes: Mapping[str, Runtime], folder: Path) -> dict[str, Path]:
    """Convert a tower for each runtime. Runtimes of the same files share them."""
    paths: dict[str, Path] = {}
    converted: dict[tuple[Any, str], Path] = {}  # by the method that converts, and the weights
    for runtime, of in runtimes.items():
        target = load_target(of.target)
        method = type(target).convert
        if (method, of.weights) not in converted:
            (folder / runtime).mkdir(parents=True)
            options = ExportOptions(name, of.weights, whole=converted.get((method, "fp32")))
            with step(screen, f"{name}: {tower.name} tower: conversion for {runtime}"):
                converted[method, of.weights] = target.convert(tower, folder / runtime, options)
        paths[runtime] = converted[method, of.weights]
    return paths


def _summarise(seconds: list[float]) -> dict[str, float]:
    """Return median, quartiles and minimum in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median": round(1e3 * middle, 3),
        "lower quartile": round(1e3 * low, 3),
        "upper quartile": round(1e3 * high, 3),
        "fastest": round(1e3 * min(seconds), 3),
    }
