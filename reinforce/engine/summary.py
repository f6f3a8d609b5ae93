"""Totals of a run while it goes, and the summary at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from reinforce.dataset.layers import SAMPLES
from reinforce.engine.outcome import ShardResult
from reinforce.engine.plan import Plan
from reinforce.terminal import format_bytes
from teachers.postprocess import COUNTS
from teachers.redact import redact


@dataclass(frozen=True)
class RunSummary:
    """Figures of one run. ``status`` is the exit status of the command, 0 for success.

    ``samples`` counts those with at least one new layer, ``busy_share`` is the accelerators' busy time over the
    workers' time, ``refused`` counts quarantined rows by reason, ``quarantined_shards`` the shards that are quarantined
    in some layer, and ``cleaned`` the effects of ``clean`` by captioner. The fields are the keys of summary.json.
    """

    run: str | None
    shards: int
    samples: int
    seconds: float
    busy_share: float
    bytes: int
    refused: Mapping[str, int]
    quarantined_shards: int
    status: int
    message: str
    cleaned: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def text(self, output: str) -> str:
        """The summary for people, a few lines."""
        output = redact(output)
        if self.run is None:
            return self.message
        rate = self.samples / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.shards:,} shards, {self.samples:,} samples in {self.seconds:.1f} s ({rate:,.0f} samples/s, "
            f"accelerator busy {self.busy_share:.0%}), {format_bytes(self.bytes)} written to {output}"
        ]
        lines += cleaned_lines(self.cleaned)
        if self.refused:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.refused.items()))
            lines.append(f"quarantined rows: {reasons}")
        if self.quarantined_shards:
            lines.append(
                f"quarantined shards: {self.quarantined_shards:,}; see quarantine/ and `reinforce status {output}`; "
                "`reinforce run --retry-quarantined` retries them"
            )
        if self.message != "done":
            lines.append(self.message)
        return "\n".join(lines)


@dataclass
class RunTotals:
    """Sums over the results of a run's leases."""

    samples: int = 0
    bytes: int = 0
    busy: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    cleaned: dict[str, Counter[str]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)  # shards of which nothing is left to do

    def add(self, result: ShardResult) -> None:
        self.finished.add(result.shard)
        self.samples += result.samples
        self.bytes += result.bytes
        self.busy += result.busy
        self.refused.update(result.refused)
        for captioner, counts in result.cleaned.items():
            self.cleaned.setdefault(captioner, Counter()).update(counts)


def summarize(
    run: str, plan: Plan, totals: RunTotals, quarantined: int, seconds: float, alive: float, outcome: str
) -> RunSummary:
    """The summary of run ``run`` after ``seconds``. ``alive`` is the workers' time in seconds, ``quarantined`` counts
    shards, and ``outcome`` is ``done`` or why the run stopped."""
    status, message = verdict(quarantined, plan.shards, plan.config.failures.allowed_share)
    if outcome != "done":
        status, message = 1, outcome
    elif totals.samples == 0 and any(SAMPLES in shard.layers for shard in plan.pending):
        status = 1
        message = "no samples: not one image-text pair could be read from the source; see quarantine/samples/"
    return RunSummary(
        run,
        len(totals.finished),
        totals.samples,
        round(seconds, 3),
        round(min(1.0, totals.busy / (alive or seconds)), 4),
        totals.bytes,
        dict(totals.refused),
        quarantined,
        status,
        message,
        {captioner: dict(counts) for captioner, counts in totals.cleaned.items()},
    )


def cleaned_lines(cleaned: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The effects of ``clean``, one line for each captioner that has this section."""
    lines = []
    for captioner, counts in sorted(cleaned.items()):
        parts = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in COUNTS if counts.get(name)]
        lines.append(f"captions by {captioner}: {', '.join(parts)}")
    return lines


def verdict(quarantined: int, shards: int, allowed_share: float) -> tuple[int, str]:
    """Exit status and message for a number of quarantined shards."""
    if quarantined > allowed_share * shards:
        return 1, (
            f"{quarantined:,} of {shards:,} shards are quarantined, more than failures.allowed_share = "
            f"{allowed_share:g}"
        )
    return 0, "done"


def nothing_to_do(plan: Plan) -> RunSummary:
    """The summary of a run that found every layer complete."""
    status, message = verdict(plan.quarantined, plan.shards, plan.config.failures.allowed_share)
    text = (
        f"nothing to do: {plan.shards:,} shards, {len(plan.layers)} layers, all complete in "
        f"{redact(plan.config.output)}"
    )
    if plan.quarantined:
        text += f" except {plan.quarantined:,} quarantined shards (--retry-quarantined retries them)"
    if status:
        text += f"\n{message}"
    return RunSummary(None, 0, 0, 0.0, 0.0, 0, {}, plan.quarantined, status, text)
