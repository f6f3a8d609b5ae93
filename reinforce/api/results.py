"""What functions of ``reinforce`` return, besides the results of commands; a notebook shows them as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforce.markup import notebook_table
from reinforce.terminal import format_bytes, format_duration, plural
from teachers.redact import redact

if TYPE_CHECKING:
    from rich.table import Table

    from reinforce.config import Config
    from reinforce.dataset.view import View
    from reinforce.engine.preflight.check_source import FirstSample
    from reinforce.engine.preflight.report import PlanReport


@dataclass(frozen=True)
class Starter:
    """A config that ``init`` has written to ``path``; ``lines`` describe the data."""

    path: Path
    text: str = field(repr=False)
    lines: Sequence[str]

    @property
    def config(self) -> Config:
        """The config, validated."""
        from reinforce.config import load_config

        return load_config(self.path)

    def __str__(self) -> str:
        return "\n".join([*map(redact, self.lines), f"written: {self.path}"])

    def _repr_html_(self) -> str:
        return notebook_table(f"written: {self.path}", [("", line) for line in map(redact, self.lines)])


@dataclass(frozen=True)
class Planned:
    """What a run would compute: ``report`` has all of it, ``sample`` is the first one of the source.

    ``warnings`` are lines about what may be wrong.
    """

    report: PlanReport
    sample: FirstSample | None
    warnings: Sequence[str]

    @property
    def shards(self) -> int:
        """Shards of the source."""
        return self.report.plan.shards

    @property
    def pending(self) -> int:
        """Shards with something missing."""
        return len(self.report.plan.pending)

    @property
    def bytes(self) -> int | None:
        """Bytes to be written, None if those of a layer are unknown."""
        return self.report.bytes

    @property
    def seconds(self) -> float | None:
        """Expected duration, None if no rate is known."""
        effort = self.report.effort
        return None if effort is None or effort.hours is None else 3600 * effort.hours

    def table(self) -> Table:
        """Each layer with its state and expected bytes."""
        from reinforce.engine.preflight.estimate_bytes import plan_table

        return plan_table(self.report.plan, self.report.expected)

    def lines(self) -> list[str]:
        """Lines after the table."""
        return [*self.report.lines(), *([] if self.sample is None else [self.sample.line()])]

    def as_json(self) -> dict[str, Any]:
        """The object that docs/command-line.md describes."""
        return self.report.as_json(self.sample, self.warnings)

    def __str__(self) -> str:
        return "\n".join(map(redact, [*self.lines(), *self.warnings]))

    def _repr_html_(self) -> str:
        size = "unknown" if self.bytes is None else f"about {format_bytes(self.bytes)}"
        facts = [("shards", f"{self.shards:,}"), ("with something missing", f"{self.pending:,}"), ("to write", size)]
        facts += [] if self.seconds is None else [("time", f"about {format_duration(self.seconds)}")]
        facts += [("note", redact(line)) for line in [*self.report.plan.notes, *self.warnings]]
        sizes = {name: format_bytes(size) for name, size in self.report.expected.items() if size is not None}
        lines = [(name, f"{one.done:,}", sizes.get(name, "")) for name, one in self.report.plan.states.items()]
        return notebook_table(
            redact(self.report.plan.config.output), facts, ("layer", "finished shards", "to write"), lines
        )


@dataclass(frozen=True)
class Selected:
    """The view that ``select`` has written: ``kept`` of ``samples``, and what each of its ``rules`` leaves out."""

    dataset: str
    name: str
    kept: int
    samples: int
    rules: Sequence[Mapping[str, Any]]
    text: Sequence[str]

    @classmethod
    def of(cls, dataset: str, view: View) -> Selected:
        from reinforce.selection.select import report_lines

        total = sum(view.counts.values())
        return cls(dataset, view.name, len(view), total, view.report, [*report_lines(view)])

    def __str__(self) -> str:
        return "\n".join(map(redact, self.text))

    def _repr_html_(self) -> str:
        rules = [(redact(str(one["rule"])), f"{one['rows']:,}", f"{one['left_out']:,}") for one in self.rules]
        facts = [("kept", f"{self.kept:,} of {plural(self.samples, 'sample')}"), ("dataset", redact(self.dataset))]
        return notebook_table(f"view {self.name}", facts, ("rule", "samples", "left out"), rules)
