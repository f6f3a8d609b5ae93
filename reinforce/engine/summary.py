"""How a run ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reinforce.engine.plan import Plan
from reinforce.terminal import format_bytes
from teachers.postprocess import COUNTS
from teachers.redact import redact


@dataclass(frozen=True)
class RunSummary:
    """Figures of one run. ``status`` is the exit status of the command: 0 where all is well.

    ``samples`` were written or added to, ``busy_share`` is the accelerators' busy time over the workers' time,
    ``refused`` counts quarantined rows by reason, ``quarantined_shards`` all shards given up in some layer, ``cleaned``
    what became of captions, by captioner.
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
                "`reinforce run --retry-quarantined` tries them again"
            )
        if self.message != "done":
            lines.append(self.message)
        return "\n".join(lines)


def cleaned_lines(cleaned: Mapping[str, Mapping[str, int]]) -> list[str]:
    """One line for each captioner with a ``clean`` section: how many captions were what."""
    lines = []
    for captioner, counts in sorted(cleaned.items()):
        what = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in COUNTS if counts.get(name)]
        lines.append(f"captions by {captioner}: {', '.join(what)}")
    return lines


def verdict(quarantined: int, shards: int, allowed_share: float) -> tuple[int, str]:
    """Exit status and message by the share of shards that were given up."""
    if quarantined > allowed_share * shards:
        return 1, (
            f"{quarantined:,} of {shards:,} shards are in quarantine, more than failures.allowed_share = "
            f"{allowed_share:g}"
        )
    return 0, "done"


def nothing_to_do(plan: Plan) -> RunSummary:
    """The summary of a run that found every layer complete."""
    status, message = verdict(plan.quarantined, plan.shards, plan.config.failures.allowed_share)
    text = (
        f"nothing to do: {plan.shards:,} shards, {len(plan.layers)} layers, all there in {redact(plan.config.output)}"
    )
    if plan.quarantined:
        text += f" but for {plan.quarantined:,} quarantined shards (--retry-quarantined tries them again)"
    if status:
        text += f"\n{message}"
    return RunSummary(None, 0, 0, 0.0, 0.0, 0, {}, plan.quarantined, status, text)
