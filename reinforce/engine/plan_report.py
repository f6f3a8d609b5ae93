"""What ``reinforce plan`` reports, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reinforce.dataset.damage import describe_damaged
from reinforce.dataset.store import Store
from reinforce.engine.plan import Plan
from reinforce.engine.probe import FirstSample
from reinforce.engine.summary import not_in_source_lines
from reinforce.engine.uses import Uses
from reinforce.source.urls import canonical
from reinforce.terminal import format_bytes


@dataclass(frozen=True)
class PlanReport:
    """A plan with the bytes to expect by layer (None: unknown), and what the config would use."""

    plan: Plan
    expected: Mapping[str, int | None]
    uses: Uses

    @property
    def bytes(self) -> int | None:
        """Bytes to be written, None if those of a layer are unknown."""
        known = [size for size in self.expected.values() if size is not None]
        return sum(known) if len(known) == len(self.expected) else None

    def lines(self) -> list[str]:
        """What follows the table of layers."""
        plan = self.plan
        size = format_bytes(sum(size or 0 for size in self.expected.values()))
        size += "" if self.bytes is not None else " or more"
        lines = [f"{plan.shards:,} shards, {len(plan.pending):,} with something missing, about {size} to write"]
        damage = describe_damaged(Store(plan.config.output).url, plan.damaged)
        return [*lines, *filter(None, [*plan.notes, damage]), *not_in_source_lines(asdict(plan.not_in_source))]

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
            "damaged": [f"{file.layer}/{file.shard}" for file in plan.damaged],
            "not_in_source": asdict(plan.not_in_source),
            "first_sample": None if sample is None else _sample(sample),
            "classes": [*self.uses.classes],
            "places": [*self.uses.places],
            "notes": [*plan.notes],
            "warnings": [*warnings],
        }


def _sample(sample: FirstSample) -> dict[str, Any]:
    size = None if sample.size is None else [*sample.size]
    return {"url": canonical(sample.url), "key": sample.raw.key, "size": size, "caption": sample.caption}
