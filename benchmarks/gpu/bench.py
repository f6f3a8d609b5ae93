"""What is measured, on which device, and how rates are measured: warm, for a minute, with a trace."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.trace import Trace, traced
from benchmarks.pipeline.figures import Figure, Rule
from teachers.fast_paths.usage import Usage, growth, set_enabled, snapshot
from teachers.registry import load_model
from teachers.runtime.accelerator import Accelerator, Precision, TimeMark
from teachers.runtime.flops import peak_flops
from teachers.spec import ModelSpec

_WINDOWS = 6  # into which the time of a rate is divided, to show whether it changes
_QUEUED = 2  # calls that the device has not finished when the next one is queued


@dataclass(frozen=True)
class Size:
    """How much is measured. ``seconds`` is the time of a figure, ``warm`` that before it which is not counted, and
    ``point`` the time of a point of a sweep or of a limit."""

    tiny: bool = False
    seconds: float = 60.0
    warm: float = 5.0
    point: float = 10.0
    traced: float = 2.0
    matrix: int = 8192
    copied: int = 2**28  # bytes
    batch: int = 256
    texts: int = 1024
    group: int = 5  # batches of a row group
    compared: int = 16  # images and texts of which the outputs are compared with those of a CPU
    words: int = 12  # of the captions of which the logits are compared
    rows: tuple[int, ...] = (32, 64, 96, 128, 200, 256, 512, 1024)
    captioned: tuple[int, ...] = (32, 64, 128, 256)
    shards: int = 16
    many: int = 10  # augmentations
    images: int = 1024  # of a shard
    checked: int = 4  # shards that are compared
    students: tuple[str, ...] = ("MobileCLIP2-S0", "MobileCLIP2-S4")
    samples: int = 1024  # of a step of a training
    pairs: int = 65536  # of a step of one with many ranks
    steps: int = 8  # of trainings that are compared
    rank_steps: int = 200  # of those on several cards


TINY = Size(
    tiny=True,
    seconds=0.0,
    warm=0.0,
    point=0.0,
    traced=0.05,
    matrix=64,
    copied=2**12,
    batch=8,
    texts=2,
    group=2,
    compared=3,
    words=3,
    rows=(2, 3),
    captioned=(2,),
    shards=2,
    many=3,
    images=6,
    checked=2,
    students=("tiny",),
    samples=4,
    pairs=64,
    steps=2,
    rank_steps=8,
)


@dataclass(frozen=True)
class Bench:
    """The place, the device and the size of the measurements; ``log`` shows a line of progress.

    ``folder`` keeps models, shards and datasets for the next call, ``weights`` has real ones by open_clip's names of
    the models. ``cores`` is the number of decode and loader processes, ``ranks`` that of cards which train together.
    ``figures`` receives those of each part that has ended, and ``failures`` the parts that raised, with their errors;
    ``on_part`` is called then. By the name of the figure, ``traces`` receives what the profiler saw, and ``usage`` the
    calls of fast paths.
    """

    folder: Path
    device: str
    cores: int
    size: Size = Size()
    weights: Path | None = None
    ranks: int = 1
    log: Callable[[str], None] = print
    on_part: Callable[[], object] = list  # does nothing
    figures: list[Figure] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)
    usage: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def attempt(self, what: str, work: Callable[[], list[Figure]]) -> list[Figure]:
        """The figures of a part; none if it raises, so that the other parts are measured."""
        figures: list[Figure] = []
        try:
            figures = work()
            self.figures.extend(figure for figure in figures if figure not in self.figures)
        except Exception as error:
            self.fail(what, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        self.on_part()
        gc.collect(1)  # models that are no longer used, and what an error has held
        if self.on_cuda:
            with contextlib.suppress(RuntimeError):  # of an error that the device keeps
                torch.cuda.empty_cache()
        return figures

    def fail(self, what: str, text: str) -> None:
        self.failures[what] = text
        self.log(f"{what} FAILED: {text}")

    def load(self, name: str, spec: ModelSpec) -> Any:
        """Load a model; the fast paths of earlier ones are not counted any more."""
        set_enabled(True)
        return load_model(name, spec, self.device)

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Keep the calls of fast paths in the block, and the paths that were taken when models were loaded."""
        before = snapshot()
        yield
        loaded = [path for path in snapshot() if not (path.used or path.plain)]
        self.keep_usage(name, loaded + [path for path in growth(before, snapshot()) if path.used or path.plain])

    def keep_usage(self, name: str, calls: Sequence[Usage]) -> None:
        """Keep calls of fast paths for a figure. A path that a spec asks for and that ran plain is a failure."""
        self.usage[name] = [asdict(of) for of in calls]
        for of in calls:
            if of.asked and (of.plain or of.reason):
                reason = f" ({of.reason})" if of.reason else ""
                self.fail(f"{name}: {of.path}", f"{of.model} ran {of.plain:,} calls without it{reason}")

    def accelerator(self, precision: Precision = "bf16") -> Accelerator:
        return Accelerator(self.device, precision)

    def card(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_cuda else "cpu"

    def peak(self) -> float | None:
        """FLOP/s in bf16 of the card's data sheet, None if the card is not known."""
        return peak_flops(self.card(), "bf16")

    def model(self, name: str) -> str:
        """The folder of a model, as a config names it."""
        from benchmarks.gpu.models import model_folder  # imports open_clip, which takes seconds

        return model_folder(name, self.folder / "models", self.weights, self.size.tiny)

    def figure(
        self,
        section: str,
        name: str,
        work: Callable[[], object],
        items: float,
        unit: str,
        limit: float | None = None,
        rule: Rule = "",
        seconds: float | None = None,
    ) -> Figure:
        """Items a second of calls of ``work``, of which each does ``items``, by default for ``size.seconds``.

        The calls of ``size.warm`` before are not counted. One more call is traced.
        """
        seconds = self.size.seconds if seconds is None else seconds
        work()  # compiles, captures and allocates
        if self.size.warm:
            self._repeat(work, min(self.size.warm, seconds))
        with self.counting(name):
            windows = [self._repeat(work, seconds / _WINDOWS) for _ in range(_WINDOWS if seconds else 1)]
        calls, elapsed = (sum(column) for column in zip(*windows, strict=True))
        with self.tracing(name):
            work()
            self.accelerator().synchronize()
        self.log(f"  {name}: {items * calls / elapsed:,.1f} {unit}; {usage_text(self.usage[name])}")
        return Figure(section, name, items * calls / elapsed, unit, limit, rule, [items * n / s for n, s in windows])

    def duration(
        self, section: str, name: str, work: Callable[[], object], scale: float, unit: str, limit: float | None = None
    ) -> Figure:
        """The seconds of a call of ``work``, times ``scale``, measured for ``size.point``."""
        rate = self.figure(section, name, work, 1, "calls/s", seconds=self.size.point)
        rounds = [scale / calls for calls in rate.rounds]
        return Figure(section, name, scale / rate.value, unit, limit, "limit" if limit else "", rounds)

    @contextmanager
    def tracing(self, name: str) -> Iterator[Trace]:
        """Trace what the device does in the block, into a file and into ``traces``."""
        with traced(self.folder / "traces" / f"{name}.json.gz", self.on_cuda) as trace:
            yield trace
        self.traces[name] = trace.summary()

    def _repeat(self, work: Callable[[], object], seconds: float) -> tuple[int, float]:
        """Calls of ``work`` in at least ``seconds``, and how long they took with what they queued on the device."""
        accelerator = self.accelerator()
        accelerator.synchronize()
        start, calls, marks = time.perf_counter(), 0, deque[TimeMark]()
        while not calls or time.perf_counter() - start < seconds:
            work()
            calls += 1
            marks.append(accelerator.mark())
            if len(marks) > _QUEUED:
                accelerator.wait_until(marks.popleft())
        accelerator.synchronize()
        return calls, time.perf_counter() - start


def usage_text(calls: Iterable[Mapping[str, Any]]) -> str:
    """The fast paths of each model, with the calls that ran the fast code of all calls; ``plain`` without any."""
    models: dict[str, list[str]] = {}
    for of in calls:
        count = of["used"] + of["plain"]
        state = f" {of['used']:,} of {count:,}" if count else " fell back" if of["reason"] else ""
        models.setdefault(of["model"], []).append(f"{of['path']}{state}")
    texts = [f"{model}: " * (len(models) > 1) + ", ".join(paths) for model, paths in models.items()]
    return "; ".join(texts) or "plain"
