"""What a plan takes, and the report of it by ``reinforce plan``, as text and as JSON.

Bytes that it will write are estimated from committed files, else from the beginning of a source shard. How long its
workers take, how many are needed and what they cost is arithmetic on measured rates.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import Field
from rich.table import Table

from reinforce.config import Config
from reinforce.dataset.codecs.codebooks import codecs_for, find_codec
from reinforce.dataset.index import describe_damaged
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.manifest import find_manifest
from reinforce.dataset.runs import list_runs, read_summary
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import Plan
from reinforce.engine.preflight.check_machines import Machine, Uses, count_workers, machine_warnings
from reinforce.engine.preflight.check_source import FirstSample
from reinforce.engine.record import not_in_source_lines
from reinforce.settings import Section
from reinforce.source.formats.base import Shard, find_format, read_samples
from reinforce.source.samples import RawSample
from reinforce.source.urls import canonical, filesystem
from reinforce.terminal import format_bytes, format_duration, plural

_READ_BYTES = 8 * 2**20
_READ_SAMPLES = 2000
_READ_FILES = 32  # images in files of their own
_REFERENCE_BYTES = 24  # per image
_RECORD_BYTES = 6  # per augmentation record, dictionary-encoded and compressed from 54


@dataclass(frozen=True)
class SourceStatistics:
    """Statistics of a source, by its first samples."""

    rows: float  # per shard
    image_bytes: float  # per row
    text_bytes: float  # per row


def expected_bytes(plan: Plan, statistics: SourceStatistics | None = None) -> dict[str, int | None]:
    """Bytes still to be written, by layer; None if they cannot be estimated. ``statistics`` are read if not given."""
    statistics = statistics or source_statistics(plan)
    dims = _recorded_dims(plan)
    sizes: dict[str, int | None] = {}
    for name, layer in plan.layers.items():
        state = plan.states[name]
        per_shard: float | None = None
        if state.missing == 0:
            per_shard = 0
        elif state.done:
            per_shard = state.done_bytes / state.done
        elif statistics is not None:
            known = replace(layer, dim=layer.dim or dims.get(layer.owner))
            image = statistics.image_bytes if plan.config.embeds_images else _REFERENCE_BYTES
            records = _RECORD_BYTES * plan.config.augmentations.count
            row = known.kind.row_bytes(known, image + statistics.text_bytes + records)  # None before it is loaded
            per_shard = None if row is None else statistics.rows * row
        sizes[name] = None if per_shard is None else round(per_shard * state.missing)
    return sizes


def bytes_by_codec(plan: Plan, statistics: SourceStatistics | None) -> dict[str, dict[str, int]]:
    """Bytes of the missing vectors of each teacher by codec, that of the config first; none without ``statistics`` or
    where the dimension is not known before the model is loaded."""
    dims, found = _recorded_dims(plan), dict[str, dict[str, int]]()
    if statistics is None:
        return found
    for name, layer in plan.layers.items():
        dim, missing = layer.dim or dims.get(layer.owner), plan.states[name].missing
        if not layer.kind.vectors or not dim or not missing:
            continue
        sizes = found.setdefault(str(layer.model), {})
        for codec in dict.fromkeys([layer.dtype, *codecs_for(dim)]):
            size = layer.count * find_codec(codec).bytes(dim)
            sizes[codec] = sizes.get(codec, 0) + round(statistics.rows * missing * size)
    return found


def plan_table(plan: Plan, expected: Mapping[str, int | None]) -> Table:
    """A plan as a table: what is done, missing and quarantined per layer, and the bytes to expect."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("layer", "done", "missing", "quarantined", "expected"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
    for name, state in plan.states.items():
        size = expected[name]
        text = "?" if size is None else format_bytes(size)
        table.add_row(name, f"{state.done:,}", f"{state.missing:,}", f"{state.quarantined:,}", text)
    return table


def _recorded_dims(plan: Plan) -> dict[tuple[str | None, str | None], int | None]:
    """Dimensions of the models that an earlier run loaded, from dataset.json, by section and name."""
    entries = (find_manifest(Store(plan.config.output)) or {}).get("layers", {})
    stored = (stored_layer(name, entry) for name, entry in entries.items())
    return {layer.owner: layer.dim for layer in stored if layer.dim and layer.kind.vectors}


def source_statistics(plan: Plan) -> SourceStatistics | None:
    """Statistics of the first few megabytes of the first shard that can be read; None if none of three can, or if
    nothing is missing."""
    for shard in plan.pending[:3]:
        try:
            found = _statistics(plan.shard(shard), plan.config)
        except Exception:  # noqa: S112 - each driver has its own; the plan reports why its sizes are unknown
            continue
        if found is not None:
            return found
    return None


def expected_samples(plan: Plan) -> float | None:
    """Samples of the shards that lack something, by little reading; None if their number is not known without more."""
    parts = [shard.part for shard in plan.pending]
    if all(part is not None for part in parts):
        return sum(part.rows for part in parts if part is not None)
    format_ = find_format(plan.pending[0].format)
    if format_.is_table and not format_.has_offsets:
        return None
    statistics = source_statistics(plan)
    return None if statistics is None else statistics.rows * len(plan.pending)


def _statistics(shard: Shard, config: Config) -> SourceStatistics | None:
    samples: list[RawSample] = []
    seen, whole = 0, True
    has_offsets = find_format(shard.format).has_offsets
    for item in itertools.islice(read_samples(shard, config.input), _READ_SAMPLES):
        if isinstance(item, RawSample):
            samples.append(item)
            seen = item.offset + item.length if has_offsets else seen + item.length
        if seen > _READ_BYTES or (samples and samples[-1].url and len(samples) == _READ_FILES):
            whole = False
            break
    if not samples:
        return None
    rows: float
    if whole:
        rows = len(samples)
    elif find_format(shard.format).is_listed:
        rows = len(shard.lines())
    elif shard.part is not None:
        rows = shard.part.rows
    elif samples[-1].url is not None:
        return None
    else:  # an estimate, from the first samples of ``seen`` bytes
        fs, path = filesystem(shard.url)
        rows = int(fs.size(path) or 0) / max(1, seen) * len(samples)
    image = sum(item.length for item in samples) / len(samples)
    text = sum(len(json.dumps(v.decode("utf-8", "replace"))) for i in samples for v in i.sidecars.values())
    return SourceStatistics(rows, image, 0.5 * text / len(samples))


#: CPU milliseconds of a worker for a photograph of 512 x 512 pixels, by the number of augmentations: its decode
#: processes and its own process, as docs/performance.md has them (benchmarks/results/pipeline.json).
DECODE_MS = {2: 5.37, 10: 19.24}
OWN_MS = {2: 0.76, 10: 0.92}
_GIGA = 1e9


class Assumed(Section):
    """Rate and prices of a plan, and the hours in which it should be done. A run does not read them."""

    rate: float | None = Field(None, gt=0)  # of the models of one worker; None: as an earlier run measured
    price: float | None = Field(None, ge=0)  # of one worker, a GPU with its cores, for an hour
    storage_price: float | None = Field(None, ge=0)  # of a gigabyte (1e9 bytes) for a month
    currency: str = Field("USD", min_length=1)
    hours: float | None = Field(None, gt=0)  # in which so many workers as needed finish


NOTHING_ASSUMED = Assumed()


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
    assumed: Assumed = NOTHING_ASSUMED,
) -> Effort:
    """The effort of a plan with so many workers, each with a ``share`` of (GPUs, CPUs)."""
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
        currency=assumed.currency,
        assumptions=assumptions,
    )
    if written_bytes is not None and assumed.storage_price is not None:
        found = replace(found, storage_cost=written_bytes / _GIGA * assumed.storage_price)
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
        wanted_workers=None if assumed.hours is None else max(1, math.ceil(worker_hours / assumed.hours)),
        cost=None if assumed.price is None else worker_hours * assumed.price,
        warnings=[warning] if gpus and cores > cpus else [],
    )


def _cpu_of_sample(plan: Plan) -> tuple[float, str]:
    """CPU milliseconds of a worker for a sample, and the assumption in words."""
    needed = {layer for shard in plan.pending for layer in shard.layers}
    crops = any(plan.layers[name].sees == "crops" for name in needed)
    count = plan.config.augmentations.count if crops else 0
    decode = _at(DECODE_MS, count) if any(plan.layers[name].sees for name in needed) else 0.0
    total = decode + _at(OWN_MS, count)
    return total, f"{total:.1f} ms of CPU an image with {count} augmentations (docs/performance.md, 512 x 512 pixels)"


def _at(measured: Mapping[int, float], count: int) -> float:
    """The value for a number of augmentations, on the line through the two measured ones."""
    (low, first), (high, last) = sorted(measured.items())
    return first + (count - low) * (last - first) / (high - low)


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


@dataclass(frozen=True)
class PlanReport:
    """A plan with the bytes to expect by layer (None: unknown), and what the config would use."""

    plan: Plan
    expected: Mapping[str, int | None]
    uses: Uses
    effort: Effort | None = None
    hours: float | None = None  # wished
    codecs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # bytes by teacher and codec

    @property
    def bytes(self) -> int | None:
        """Bytes to be written, None if those of a layer are unknown."""
        known = [size for size in self.expected.values() if size is not None]
        return sum(known) if len(known) == len(self.expected) else None

    def lines(self) -> list[str]:
        """Lines after the table of layers."""
        plan = self.plan
        known = sum(size or 0 for size in self.expected.values())
        size = f"about {format_bytes(known)}" if known or self.bytes == 0 else "an unknown size"
        size += "" if self.bytes is not None or not known else " or more"
        lines = [f"{plural(plan.shards, 'shard')}, {len(plan.pending):,} with something missing, {size} to write"]
        damage = describe_damaged(Store(plan.config.output).url, plan.damaged)
        lines += [
            *(code.line() for code in plan.codes),
            *filter(None, [*plan.notes, damage]),
            *not_in_source_lines(asdict(plan.not_in_source)),
        ]
        for teacher, sizes in self.codecs.items():
            first, *others = (f"{codec} {format_bytes(size)}" for codec, size in sizes.items())
            lines.append(f"vectors of {teacher} in {first}; by other codecs: {', '.join(others)}")
        for layer in plan.unfitted:
            lines.append(f"{layer.name}: its codebook is fitted first, to {layer.sample:,} vectors of the first shards")
        return lines + (self.effort.lines(self.hours) if self.effort is not None else [])

    def as_json(self, sample: FirstSample | None, warnings: Sequence[str]) -> dict[str, Any]:
        """The report with the first sample of the source, if one was read, and warnings; keys are documented in
        docs/command-line.md."""
        plan, first = self.plan, None
        if sample is not None:
            size = None if sample.size is None else [*sample.size]
            texts = {"caption": sample.caption, "captions": [*sample.captions]}
            first = {"url": canonical(sample.url), "key": sample.raw.key, "size": size, **texts}
        return {
            "output": plan.config.output,
            "shards": plan.shards,
            "pending_shards": len(plan.pending),
            "expected_bytes": self.bytes,
            "layers": {
                name: {**asdict(state), "expected_bytes": self.expected[name]} for name, state in plan.states.items()
            },
            "codecs": {teacher: dict(sizes) for teacher, sizes in self.codecs.items()},
            "damaged": [f"{file.layer}/{file.shard}" for file in plan.damaged],
            "not_in_source": asdict(plan.not_in_source),
            "first_sample": first,
            "classes": [*self.uses.classes],
            "places": [*self.uses.places],
            "class_files": [code.as_json() for code in plan.codes],
            "notes": [*plan.notes],
            "warnings": [*warnings],
            "estimate": None if self.effort is None else asdict(self.effort),
        }


def make_report(
    plan: Plan,
    uses: Uses,
    statistics: SourceStatistics | None,
    machines: Sequence[Machine],
    assumed: Assumed = NOTHING_ASSUMED,
) -> PlanReport:
    """The report of a plan on these machines; ``statistics`` are those of its source."""
    codecs = bytes_by_codec(plan, statistics)
    report = PlanReport(plan, expected_bytes(plan, statistics), uses, codecs=codecs)
    if statistics is None or not plan.pending:
        return report
    needed = {name for shard in plan.pending for name in shard.layers}
    models = any(plan.layers[name].loads_model for name in needed)
    workers = plan.config.workers.fitted_to([machine.resources for machine in machines], models)
    share = (workers.gpus or 0.0, workers.cores)
    if assumed.rate is not None:
        rate: Rate | None = Rate(assumed.rate, "as given")
    elif not models:
        images = share[1] * 1000 / _cpu_of_sample(plan)[0]
        rate = Rate(images, f"decoding with {share[1]} cores, as docs/performance.md has it")
    else:
        store = Store(plan.config.output)
        summaries = (read_summary(store, run) for run in list_runs(store)[:3])
        rate = next(filter(None, (measured_rate(plan, summary) for summary in summaries)), None)
    effort = estimate_effort(plan, statistics, report.bytes, rate, count_workers(machines, workers), share, assumed)
    lacking = machine_warnings(machines, workers, plan.config.output, report.bytes)
    return replace(report, effort=replace(effort, warnings=[*effort.warnings, *lacking]), hours=assumed.hours)
