"""The report of ``reinforce plan``, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from reinforce.dataset.files.damage import describe_damaged
from reinforce.dataset.files.store import Store
from reinforce.dataset.runs.progress import list_runs, read_summary
from reinforce.engine.plan.plan import Plan
from reinforce.engine.preflight.access import Uses
from reinforce.engine.preflight.check_machines import Machine, count_workers, machine_warnings
from reinforce.engine.preflight.check_source import FirstSample
from reinforce.engine.preflight.estimate_bytes import SourceStatistics, bytes_by_codec, expected_bytes
from reinforce.engine.preflight.estimate_hours import Effort, Rate, decoding_rate, estimate_effort, measured_rate
from reinforce.engine.record.summary import not_in_source_lines
from reinforce.source.urls import canonical
from reinforce.terminal import format_bytes, plural


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
        plan = self.plan
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
            "first_sample": None if sample is None else _sample(sample),
            "classes": [*self.uses.classes],
            "places": [*self.uses.places],
            "class_files": [code.as_json() for code in plan.codes],
            "notes": [*plan.notes],
            "warnings": [*warnings],
            "estimate": None if self.effort is None else asdict(self.effort),
        }


def make_report(
    plan: Plan, uses: Uses, statistics: SourceStatistics | None, machines: Sequence[Machine], hours: float | None = None
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
    rate = _rate(plan, share[1], models)
    effort = estimate_effort(plan, statistics, report.bytes, rate, count_workers(machines, workers), share, hours)
    lacking = machine_warnings(machines, workers, plan.config.output, report.bytes)
    return replace(report, effort=replace(effort, warnings=[*effort.warnings, *lacking]), hours=hours)


def _rate(plan: Plan, cores: int, models: bool) -> Rate | None:
    """The rate of a worker: of the config, of decoding where no model is needed, or of the last run."""
    given = plan.config.estimate
    if given is not None and given.rate is not None:
        return Rate(given.rate, "estimate.rate")
    if not models:
        return decoding_rate(plan, cores)
    store = Store(plan.config.output)
    summaries = (read_summary(store, run) for run in list_runs(store)[:3])
    return next(filter(None, (measured_rate(plan, summary) for summary in summaries)), None)


def _sample(sample: FirstSample) -> dict[str, Any]:
    size = None if sample.size is None else [*sample.size]
    texts = {"caption": sample.caption, "captions": [*sample.captions]}
    return {"url": canonical(sample.url), "key": sample.raw.key, "size": size, **texts}
