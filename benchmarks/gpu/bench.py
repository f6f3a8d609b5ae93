"""What is measured, on which device, and how rates are measured."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.pipeline.figures import Figure
from teachers.device.accelerator import Accelerator, Precision
from teachers.device.flops import peak_flops


@dataclass(frozen=True)
class Size:
    """How much is measured. ``seconds`` is the time of one measurement of a rate."""

    teachers: tuple[str, ...] = ("ViT-L-14", "ViT-L-14-quickgelu", "ViT-SO400M-14-SigLIP")
    captioner: str = "coca_ViT-L-14"
    #: Students and their batches, whose activations take 31 and 50 GB.
    students: Mapping[str, int] = field(default_factory=lambda: {"MobileCLIP2-S0": 256, "MobileCLIP2-S4": 128})
    rounds: int = 3
    seconds: float = 1.0
    matrix: int = 8192
    copied: int = 2**28  # bytes
    images: int = 256
    texts: int = 1024
    captioned: int = 128
    captions: int = 5
    words: int = 20
    #: Shards and their images, by the number of augmentations.
    shards: Mapping[int, tuple[int, int]] = field(default_factory=lambda: {2: (4, 512), 10: (4, 192)})
    batch: int = 256
    steps: int = 24
    compiles_students: bool = True


TINY = Size(
    teachers=("tiny",),
    captioner="tiny-coca",
    students={"tiny": 4},
    rounds=1,
    seconds=0.0,
    matrix=64,
    copied=2**12,
    images=2,
    texts=2,
    captioned=2,
    captions=2,
    words=3,
    shards={2: (2, 6), 10: (1, 2)},
    batch=8,
    steps=2,
    compiles_students=False,
)


@dataclass(frozen=True)
class Bench:
    """The place, the device and the size of the measurements; ``log`` shows a line of progress.

    ``cores`` is the number of decode and loader processes. After ``deadline``, on the clock of ``time.monotonic``,
    what takes minutes is left out. ``failures`` receives the parts that raised, with their errors.
    """

    folder: Path
    device: str
    cores: int
    size: Size
    log: Callable[[str], None] = print
    deadline: float = math.inf
    measured: dict[str, float] = field(default_factory=dict)  # what later sections compare with
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def is_late(self, minutes: float = 0.0) -> bool:
        """Whether fewer than ``minutes`` are left until the deadline."""
        return time.monotonic() > self.deadline - 60 * minutes

    def attempt(self, what: str, work: Callable[[], list[Figure]]) -> list[Figure]:
        """The figures of a part; none if it raises, so that the other parts are measured."""
        try:
            return work()
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            self.failures[what] = text
            self.log(f"{what} FAILED: {text}")
            gc.collect(1)  # what the error has held
            return []
        finally:
            if self.on_cuda:
                torch.cuda.empty_cache()

    @property
    def compiler(self) -> str:
        """Backend of ``torch.compile``. On a CPU the graph is captured and not compiled, which takes minutes."""
        return "inductor" if self.on_cuda else "eager"

    def accelerator(self, precision: Precision = "bf16") -> Accelerator:
        return Accelerator(self.device, precision)

    def card(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_cuda else "cpu"

    def peak(self) -> float:
        """FLOP/s in bf16 of the card's data sheet; the measured ones of a card that is not known."""
        return peak_flops(self.card(), "bf16") or self.measured["products"]

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of one call of ``work``, with what it has queued on the device."""
        accelerator = self.accelerator()
        accelerator.synchronize()
        start = time.perf_counter()
        work()
        accelerator.synchronize()
        return time.perf_counter() - start

    def rate(self, work: Callable[[], object], items: float) -> float:
        """Items per second of calls of ``work``, of which each does ``items``."""
        calls = max(1, math.ceil(self.size.seconds / max(1e-6, self.seconds(work))))

        def repeat() -> None:
            for _ in range(calls):
                work()

        return items * calls / self.seconds(repeat)
