"""Totals of a run while it goes, and the summary at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from reinforce.dataset.layers import SAMPLES
from reinforce.engine.messages.results import ShardResult
from reinforce.engine.messages.tracebacks import shorten
from reinforce.engine.plan.plan import Plan
from reinforce.engine.record.rates import Stages, add_stages, fuller, with_rates
from reinforce.errors import UserError
from reinforce.labels.interface import describe_counts
from reinforce.source.captions import CAPTIONS_REPLACED
from reinforce.terminal import first_lines, format_bytes, format_duration, plural
from schemas import Reason
from teachers.decoding.postprocess import COUNTS
from teachers.fast_paths.usage import Usage, total
from teachers.redact import redact

WORKER_LOST = "worker lost"  # why a shard is leased again, if its worker is gone
_STOPPED_STATUS = 130  # as of a command that a shell stops by Ctrl-C
_EXAMPLE_CHARS = 300
_MAX_EXAMPLES = 10
#: Advice for shards that fail while they are processed, by reason.
_REMEDIES = {
    Reason.SHARD_CRASHED.value: (
        "The output of the worker shows why it died. A segmentation fault is a defect of a model or a library at this "
        "data. Without such a line it was probably killed for its memory: lower workers.batch or workers.cpus, or use "
        "a larger machine."
    ),
    Reason.SHARD_HUNG.value: ("If its batches are only slow, raise failures.stall_seconds."),
    Reason.SHARD_FAILED.value: "Fix what raised this error.",
    Reason.SHARD_MISSING.value: "Check `source`.",
    Reason.SHARD_UNREADABLE.value: "Check the permissions of the source.",
}
#: What happens to shards of a dataset that ``source`` does not name, and how to remove one.
_ABSENT = {
    "finished": "stay in the dataset and are read; to remove one, delete its files NAME.parquet in all layers",
    "quarantined": "are not retried; to forget one, delete its file quarantine/LAYER/NAME.parquet",
}


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Figures of one run. ``status`` is the exit status of the command, 0 for success; ``run`` is None if there was
    nothing to do.

    ``samples`` counts those with at least one new layer, ``busy_share`` is the accelerators' busy time over the
    workers' time, ``refused`` counts rows of ``refused_samples`` in the quarantine by reason, ``quarantined_shards``
    the shards that are quarantined in some layer, ``cleaned`` the effects of ``clean`` by captioner, ``examples`` has a
    shard, a key and a detail for each reason of quarantine, ``not_in_source`` the fields of ``NotInSource``, and
    ``repeated_keys`` counts keys that occur in more than one shard, as ``notes`` describe. ``postponed`` counts shards
    that wait for files that were set aside, ``stages`` has the sums and rates of ``rates.with_rates``, ``device`` the
    device with the least free memory, ``source_counts`` samples that were read, as ``source_lines`` describes, and
    ``fast_paths`` the calls of models. The fields are the keys of summary.json.
    """

    run: str | None = None
    shards: int = 0
    samples: int = 0
    seconds: float = 0.0
    busy_share: float = 0.0
    bytes: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    refused_samples: int = 0
    quarantined_shards: int = 0
    status: int = 0
    message: str
    cleaned: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    not_in_source: Mapping[str, Any] = field(default_factory=dict)
    repeated_keys: int = 0
    notes: Sequence[str] = ()
    postponed: int = 0
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    source_counts: Mapping[str, int] = field(default_factory=dict)
    fast_paths: tuple[Usage, ...] = ()

    def text(self, output: str) -> str:
        """The summary for people, a few lines."""
        output = redact(output)
        if self.run is None:
            return self.message
        rate = self.samples / self.seconds if self.seconds else 0.0
        lines = [
            f"{plural(self.shards, 'shard')}, {plural(self.samples, 'sample')} in {self.seconds:.1f} s "
            f"({rate:,.0f} samples/s, models busy {self.busy_share:.0%}), "
            f"{format_bytes(self.bytes)} written to {output}"
        ]
        lines += [*source_lines(self.source_counts), *cleaned_lines(self.cleaned)]
        if self.refused:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.refused.items()))
            of = f" of {plural(self.refused_samples, 'sample')}" if self.refused_samples else ""
            lines.append(f"quarantined rows{of}: {reasons}")
        lines += example_lines(self.examples)
        lines += self.notes
        if self.quarantined_shards:
            lines.append(
                f"quarantined shards: {self.quarantined_shards:,}; `reinforce status {output} --reasons` lists them by "
                "reason; `reinforce run --retry-quarantined` retries them"
            )
        lines += not_in_source_lines(self.not_in_source)
        if self.message != "done":
            lines.append(self.message)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from reinforce.markup import notebook_table

        rate = self.samples / self.seconds if self.seconds else 0.0
        facts = [
            ("shards", f"{self.shards:,}"),
            ("samples", f"{self.samples:,}"),
            ("time", f"{format_duration(self.seconds)}, {rate:,.0f} samples/s"),
            ("models busy", f"{self.busy_share:.0%}"),
            ("written", format_bytes(self.bytes)),
            ("quarantined", ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.refused.items())) or "0"),
            ("quarantined shards", f"{self.quarantined_shards:,}"),
            *(("note", note) for note in self.notes),
        ]
        stages = [
            (name, f"{stage['inputs']:,.0f}", f"{stage.get('per_second', 0):,.0f}")
            for name, stage in self.stages.items()
        ]
        title = f"{self.run}: {self.message}" if self.run else self.message
        heads = ("layer", "inputs", "inputs/s on the device")
        return notebook_table(title, facts if self.run else [], heads, stages)


@dataclass(frozen=True)
class Ending:
    """The exit status of a run's command, and why the run stopped if it did not finish."""

    status: int = 0
    message: str = "done"


def ending_of(error: BaseException, redactor: Callable[[str], str]) -> Ending:
    """The ending of a run whose driver raised ``error``; ``redactor`` removes secrets."""
    if isinstance(error, UserError):
        return Ending(error.exit_status, redactor(str(error)))
    if isinstance(error, KeyboardInterrupt):
        return Ending(_STOPPED_STATUS, "stopped")
    return Ending(1, redactor(f"stopped by an error: {type(error).__name__}: {error}"))


@dataclass
class RunTotals:
    """Sums over the results of a run's leases, and the first example of each reason of quarantine."""

    samples: int = 0
    bytes: int = 0
    busy: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    refused_samples: int = 0
    cleaned: dict[str, Counter[str]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)  # shards with nothing left to compute
    examples: dict[str, str] = field(default_factory=dict)  # by reason
    failed: dict[str, str] = field(default_factory=dict)  # reason by shard, of those without samples
    set_aside: list[str] = field(default_factory=list)  # files, each with its reason
    postponed: set[str] = field(default_factory=set)  # shards with files that must be computed again
    stages: Stages = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    written: int = 0  # shards with all layers written
    quarantined_shards: int = 0  # in some layer
    quarantined: Counter[str] = field(default_factory=Counter)  # those of them that failed, by reason
    read_bytes: int = 0
    times: Any = field(default_factory=Counter)  # seconds of shards by stage
    retries: Counter[str] = field(default_factory=Counter)  # shards that were leased again, by reason
    source_counts: Counter[str] = field(default_factory=Counter)
    fast_paths: tuple[Usage, ...] = ()

    def add(self, result: ShardResult) -> None:
        (self.postponed if result.set_aside else self.finished).add(result.shard)
        self.written += not (result.set_aside or result.quarantine_reason)
        self.quarantined_shards += result.quarantine_reason is not None
        self.read_bytes += result.read_bytes
        self.times.update(result.times)
        self.busy += result.busy
        self.add_sums(result)
        for reason, example in result.examples.items():
            self.examples.setdefault(reason, f"{result.shard}: {example}")

    def add_sums(self, of: ShardResult | RunSummary) -> None:
        """Add what the result of a lease and the summary of a run have in common."""
        self.samples += of.samples
        self.bytes += of.bytes
        self.refused.update(of.refused)
        self.refused_samples += of.refused_samples
        self.source_counts.update(of.source_counts)
        add_stages(self.stages, of.stages)
        self.add_usage(of.fast_paths)
        self.device = fuller(self.device, of.device)
        for captioner, counts in of.cleaned.items():
            self.cleaned.setdefault(captioner, Counter()).update(counts)

    def add_usage(self, usages: Sequence[Usage]) -> None:
        """Add calls of fast paths, such as those of a worker's shard."""
        self.fast_paths = total([*self.fast_paths, *usages])

    def sums(self) -> dict[str, Any]:
        """The same, as fields of a summary."""
        return {
            "samples": self.samples,
            "bytes": self.bytes,
            "refused": dict(self.refused),
            "refused_samples": self.refused_samples,
            "source_counts": dict(self.source_counts),
            "stages": with_rates(self.stages),
            "device": self.device,
            "fast_paths": self.fast_paths,
            "cleaned": {captioner: dict(counts) for captioner, counts in self.cleaned.items()},
        }

    def add_quarantined(self, shard: str, layer: str, reason: str, detail: str) -> None:
        """Count a shard that failed while a layer was computed."""
        self.quarantined_shards += 1
        self.quarantined[reason] += 1
        where = shard if layer == SAMPLES else f"{shard} in {layer}"
        self.examples.setdefault(reason, f"{where}: {shorten(' '.join(detail.split()), _EXAMPLE_CHARS)}")
        if layer == SAMPLES:
            self.failed[shard] = reason


def summarize(
    run: str, plan: Plan, totals: RunTotals, quarantined: int, seconds: float, alive: float, ending: Ending
) -> RunSummary:
    """The summary of run ``run`` after ``seconds``, in which workers were ``alive`` for so many worker-seconds and
    ``quarantined`` shards were quarantined."""
    if ending != Ending():
        pass
    elif totals.postponed:
        ending = Ending(
            1,
            f"not finished: {plural(len(totals.postponed), 'shard')}. Files that they need were damaged or did not "
            "fit, and are set aside, or they are not in the storage any more. Run the same command again.",
        )
    elif totals.samples == 0 and any(SAMPLES in shard.layers for shard in plan.pending):
        ending = Ending(1, f"no samples: {_why_no_samples(totals)}")
    else:
        ending = _verdict(plan, quarantined)
    return RunSummary(
        run=run,
        shards=len(totals.finished),
        seconds=round(seconds, 3),
        busy_share=round(min(1.0, totals.busy / (alive or seconds)), 4),
        quarantined_shards=quarantined,
        **asdict(ending),
        examples=totals.examples,
        not_in_source=asdict(plan.not_in_source),
        postponed=len(totals.postponed),
        **totals.sums(),
    )


def add_summaries(first: RunSummary, second: RunSummary) -> RunSummary:
    """The summary of a run and of its second pass over the shards that the first postponed."""
    seconds, totals = first.seconds + second.seconds, RunTotals()
    for summary in (first, second):
        totals.add_sums(summary)
    busy = (first.busy_share * first.seconds + second.busy_share * second.seconds) / (seconds or 1.0)
    return replace(
        second,
        run=second.run or first.run,
        shards=first.shards + second.shards,
        seconds=round(seconds, 3),
        busy_share=round(busy, 4),
        message="done" if second.status == 0 else second.message,
        examples={**second.examples, **first.examples},
        **totals.sums(),
        notes=[*first.notes, *(note for note in second.notes if note not in first.notes)],
    )


def _why_no_samples(totals: RunTotals) -> str:
    """The reason why a run has no samples."""
    if totals.failed:
        shard, reason = next(iter(totals.failed.items()))
        failed = "the shard" if len(totals.failed) == 1 else f"{len(totals.failed):,} shards, such as"
        example = totals.examples[reason]
        what = example if example.startswith(shard) else f"{shard}: {example}"
        return f"{failed} {what} ({reason}). {_REMEDIES[reason]} Then run again with --retry-quarantined."
    if not totals.refused:
        return "the source contains no image-text pair. Check `source`."
    reason, _ = totals.refused.most_common(1)[0]
    return f"not one image-text pair could be read from the source; {reason}: {totals.examples.get(reason, '')}"


def example_lines(examples: Mapping[str, str]) -> list[str]:
    """One line for each reason of quarantine with its first example."""
    lines = [f"{reason}, for example {example}" for reason, example in sorted(examples.items())]
    return [f"  {line}" for line in first_lines(lines, _MAX_EXAMPLES, "more reasons")]


def cleaned_lines(cleaned: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The effects of ``clean``, one line for each captioner that has this section."""
    lines = []
    for captioner, counts in sorted(cleaned.items()):
        parts = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in COUNTS if counts.get(name)]
        lines.append(f"captions by {captioner}: {', '.join(parts)}")
    return lines


def source_lines(counts: Mapping[str, int]) -> list[str]:
    """The samples that were read, by what joined them with reinforcements, and captions that could not be decoded."""
    sets: dict[str, dict[str, int]] = {}
    for name in sorted(counts):
        labels, _, what = name.rpartition(".")
        sets.setdefault(labels, {})[what] = counts[name]
    named = {labels.replace(".", " ", 1) or "reinforcements": describe_counts(found) for labels, found in sets.items()}
    lines = [f"samples joined with {labels}: {joined}" for labels, joined in named.items() if joined]
    if count := counts.get(CAPTIONS_REPLACED):
        lines.append(f"captions with characters that could not be decoded (U+FFFD): {count:,}; store them as UTF-8")
    return lines


def not_in_source_lines(counts: Mapping[str, Any]) -> list[str]:
    """Lines about shards of a dataset that ``source`` does not name; ``counts`` are the fields of ``NotInSource``."""
    return [
        f"not in `source`: {plural(count, f'{what} shard')}, such as {counts[f'first_{what}']}. Such shards {advice}"
        for what, advice in _ABSENT.items()
        if (count := counts.get(what))
    ]


def _verdict(plan: Plan, quarantined: int) -> Ending:
    """The ending of a run by the number of quarantined shards."""
    share = plan.config.failures.allowed_share
    if quarantined <= share * plan.shards:
        return Ending()
    shards = f"{quarantined:,} of {plan.shards:,} shards are quarantined"
    return Ending(1, f"{shards}, more than failures.allowed_share = {share:g}")


def nothing_to_do(plan: Plan) -> RunSummary:
    """The summary of a run that found every layer complete."""
    ending = _verdict(plan, plan.quarantined)
    text = (
        f"nothing to do: {plural(plan.shards, 'shard')}, {plural(len(plan.layers), 'layer')}, all complete in "
        f"{redact(plan.config.output)}"
    )
    if plan.quarantined:
        text += f" except {plural(plan.quarantined, 'quarantined shard')} (--retry-quarantined retries them)"
    text = "\n".join([text, *not_in_source_lines(asdict(plan.not_in_source))])
    if ending.status:
        text += f"\n{ending.message}"
    return RunSummary(quarantined_shards=plan.quarantined, status=ending.status, message=text)
