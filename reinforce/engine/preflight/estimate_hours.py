"""How long the workers of a plan take, how many are needed, and what they cost: arithmetic on measured rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reinforce.config import Estimate
from reinforce.engine.plan.plan import Plan
from reinforce.engine.preflight.estimate_bytes import SourceStatistics
from reinforce.terminal import format_bytes, format_duration, plural

#: CPU milliseconds of a worker for a photograph of 512 x 512 pixels, by the number of augmentations: its decode
#: processes and its own process, as docs/performance.md has them (benchmarks/results/pipeline.json).
DECODE_MS = {2: 5.37, 10: 19.24}
OWN_MS = {2: 0.76, 10: 0.92}
_GIGA = 1e9


@dataclass(frozen=True)
class Rate:
    """Source images a second that the models of one worker compute, and where the number comes from."""

    value: float
    origin: str


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Hours, bytes and costs of a plan. Unknown numbers are None.

    ``samples`` counts source images with something missing, ``rate`` is a worker's, ``cores`` are those that it needs
    for that rate, ``limited`` is what its ``cpus`` allow. ``workers`` run at a time, each with ``gpus`` and ``cpus``.
    """

    samples: int
    rate: float | None = None
    cores: float | None = None
    limited: float | None = None
    workers: int
    gpus: float
    cpus: int
    hours: float | None = None
    worker_hours: float | None = None
    wanted_workers: int | None = None
    read_bytes: int
    written_bytes: int | None
    cost: float | None = None
    storage_cost: float | None = None
    currency: str
    assumptions: Sequence[str]
    warnings: Sequence[str] = ()

    def lines(self, hours: float | None = None) -> list[str]:
        """For people; ``hours`` is the wish for which ``wanted_workers`` are needed."""
        cores = plural(self.cpus, "core")
        share = f"{self.gpus:g} GPU and {cores}" if self.gpus else cores
        each = f"{plural(self.workers, 'worker')} with {share} each"
        read = f"reads {format_bytes(self.read_bytes)}"
        if self.hours is None or self.worker_hours is None or self.limited is None:
            return [
                f"estimate: {plural(self.samples, 'image')}; {read}; hours are not known: give --rate, or compute some "
                "shards first, whose rate is then used"
            ]
        unit = "GPU hours" if self.gpus else "worker hours"
        time = format_duration(self.hours * 3600)
        lines = [
            f"estimate: {plural(self.samples, 'image')} at {self.limited:,.0f} a second a worker; {each}: {time}, "
            f"{self.worker_hours * (self.gpus or 1):,.1f} {unit}; {read}"
        ]
        if self.wanted_workers is not None and hours is not None:
            lines.append(f"  in {hours:g} hours: {self.wanted_workers:,} such workers")
        if self.cost is not None:
            lines.append(f"  {self.cost:,.2f} {self.currency} for the workers")
        if self.storage_cost is not None:
            lines.append(f"  {self.storage_cost:,.2f} {self.currency} a month for what is written")
        return lines + [f"  assumed: {text}" for text in self.assumptions]


def estimate_effort(
    plan: Plan,
    statistics: SourceStatistics,
    written_bytes: int | None,
    rate: Rate | None,
    workers: int,
    share: tuple[float, int],
    hours: float | None = None,
) -> Effort:
    """The effort of a plan with so many workers, each with a ``share`` of (GPUs, CPUs)."""
    prices = plan.config.estimate or Estimate()
    gpus, cpus = share
    samples = round(statistics.rows * len(plan.pending))
    cpu_ms, cpu_text = _cpu_of_sample(plan)
    assumptions = [cpu_text] if gpus else []
    if rate is not None:
        assumptions.append(f"{rate.value:,.0f} images a second for the models of a worker ({rate.origin})")
    size = format_bytes(statistics.image_bytes)
    assumptions.append(f"{statistics.rows:,.0f} images a shard of {size}, as in the first")
    assumptions.append("every worker is busy all the time, and storage keeps up")
    found = Effort(
        samples=samples,
        workers=workers,
        gpus=gpus,
        cpus=cpus,
        read_bytes=round(samples * statistics.image_bytes),
        written_bytes=written_bytes,
        currency=prices.currency,
        assumptions=assumptions,
    )
    if written_bytes is not None and prices.storage_price is not None:
        found = replace(found, storage_cost=written_bytes / _GIGA * prices.storage_price)
    if rate is None:
        return found
    cores, possible = rate.value * cpu_ms / 1000, cpus * 1000 / cpu_ms
    # Without a GPU the models take the cores, too, and their rate was measured with decoding beside them.
    limited = min(rate.value, possible) if gpus else rate.value
    warning = (
        f"decoding {rate.value:,.0f} images a second takes {cores:.1f} cores a GPU, and a worker has {cpus}: the GPU "
        f"would wait, at {possible:,.0f} images a second. Use nodes with more cores a GPU, fewer augmentations, "
        "augmentations.backend: fixed-point-1, or input.reduce_to."
    )
    worker_hours = samples / limited / 3600
    return replace(
        found,
        rate=rate.value,
        cores=cores,
        limited=limited,
        hours=worker_hours / max(1, workers),
        worker_hours=worker_hours,
        wanted_workers=None if hours is None else max(1, math.ceil(worker_hours / hours)),
        cost=None if prices.price is None else worker_hours * prices.price,
        warnings=[warning] if gpus and cores > cpus else [],
    )


def _cpu_of_sample(plan: Plan) -> tuple[float, str]:
    """CPU milliseconds of a worker for a sample, and the assumption in words."""
    needed = {layer for shard in plan.pending for layer in shard.layers}
    crops = any(plan.layers[name].sees == "crops" for name in needed)
    count = plan.config.augmentations.count if crops else 0
    decode = _at(DECODE_MS, count) if any(plan.layers[name].sees_images for name in needed) else 0.0
    total = decode + _at(OWN_MS, count)
    return total, f"{total:.1f} ms of CPU an image with {count} augmentations (docs/performance.md, 512 x 512 pixels)"


def _at(measured: Mapping[int, float], count: int) -> float:
    """The value for a number of augmentations, on the line through the two measured ones."""
    (low, first), (high, last) = sorted(measured.items())
    return first + (count - low) * (last - first) / (high - low)


def decoding_rate(plan: Plan, cores: int) -> Rate:
    """The rate of a worker that needs no model."""
    return Rate(cores * 1000 / _cpu_of_sample(plan)[0], f"decoding with {cores} cores, as docs/performance.md has it")


def measured_rate(plan: Plan, summary: Mapping[str, Any] | None) -> Rate | None:
    """The rate at which a worker of an earlier run computed the layers that are missing; None if it did not."""
    if not summary or not summary.get("samples"):
        return None
    stages = summary.get("stages") or {}
    needed = {layer for shard in plan.pending for layer in shard.layers}
    models = [name for name in needed if plan.layers[name].loads_model]
    if any("seconds" not in stages.get(name, {}) for name in models):
        return None
    seconds = sum(stages[name]["seconds"] for name in models) / summary["samples"]
    if not seconds:  # no model, or all of them together took less than is recorded
        return None
    device = (summary.get("device") or {}).get("name")
    return Rate(1 / seconds, f"as run {summary.get('run')} measured" + (f" on {device}" if device else ""))
