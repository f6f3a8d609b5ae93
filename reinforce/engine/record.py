"""A run while it goes and at its end: its record in ``runs/<run>/``, the progress that is shown, its totals and
summary, and series for Ray's metrics.

The record has the config as run, one JSON line per event, and a summary. Progress is a live line on a terminal, and a
plain line every few seconds in a log.

Ray's dashboard and Prometheus show the series, which ``SERIES`` lists. The driver and the workers record their counts
every few seconds and at the end of a shard. Ray exports a series from the node where it is recorded, with the prefix
``ray_`` and the labels of its process. The number of label values is bounded: reasons, stages, layers, fast paths of
models, and indexes of workers.
"""

from __future__ import annotations

import datetime
import heapq
import json
import logging
import os
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from reinforce.config import Config
from reinforce.dataset.layers import SAMPLES
from reinforce.engine.messages import ShardResult, shorten
from reinforce.engine.plan.plan import Plan
from reinforce.engine.rates import Stages, add_stages, fuller, unit_of, with_rates
from reinforce.errors import StorageError, UserError
from reinforce.labels.members import describe_counts
from reinforce.processes.signals import Terminated
from reinforce.source.samples import CAPTIONS_REPLACED
from reinforce.source.urls import canonical
from reinforce.storage import Storage, json_bytes
from reinforce.terminal import Screen, first_lines, format_bytes, format_duration, plural
from schemas import Reason
from teachers.decoding.postprocess import COUNTS
from teachers.fast_paths.usage import Usage, total
from teachers.redact import redact, redact_values

_PART_BYTES = 2**20
_FLUSH_SECONDS = 10.0
_FLUSH_SECONDS_LOCAL = 1.0
_SLOWEST = 5
_ERROR_CHARACTERS = 300
_MAX_FLUSH_SECONDS = 300.0  # between two writes while they fail
_LOG = logging.getLogger(__name__)


class EventDigest:
    """Figures of the events so far: counts by kind, the slowest shards, and the unfinished shards that have failed,
    each with its number of failures and its last error."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.slowest: list[tuple[float, str, str]] = []  # a heap of seconds, shard and its longest stage
        self.failing: dict[str, tuple[int, str]] = {}

    def add(self, event: str, values: Mapping[str, Any]) -> None:
        self.counts[event] += 1
        shard = values.get("shard")
        if event in ("shard", "shard_quarantined"):
            self.failing.pop(str(shard), None)
        if event == "shard":
            times = values.get("times") or {"": 0.0}
            heapq.heappush(self.slowest, (values["seconds"], str(shard), max(times, key=times.__getitem__)))
            if len(self.slowest) > _SLOWEST:
                heapq.heappop(self.slowest)
        elif event in ("shard_raised", "worker_died", "worker_hung") and not values.get("node_lost"):
            for name in values.get("shards", [shard]):
                failures, _ = self.failing.pop(name, (0, ""))
                self.failing[name] = failures + 1, str(values.get("error", ""))[:_ERROR_CHARACTERS]


class Events:
    """Writes events to numbered parts. An object store cannot append, so the current part is rewritten every few
    seconds; a new part begins after one MiB."""

    def __init__(self, store: Storage, config: Config, redact: Callable[[str], str]) -> None:
        """``redact`` removes secrets from texts."""
        now = datetime.datetime.now(datetime.timezone.utc)
        # The suffix is microseconds and four random bits, so that names sort by their times.
        self.run = f"{now:%Y%m%dT%H%M%SZ}-{now.microsecond * 16 + secrets.randbelow(16):06x}"
        self._store = store
        self._redact = redact
        self._part = 0
        self._lines: list[bytes] = []
        self._dirty = self._refused = False
        self.digest = EventDigest()
        self._flushed = time.monotonic()
        self._interval = _FLUSH_SECONDS_LOCAL if store.local else _FLUSH_SECONDS
        self._folder = ("runs", self.run)
        # The config without the credentials in its URLs and options.
        data: dict[str, Any] = redact_values(config.model_dump(mode="json", by_alias=True, exclude_defaults=True))
        source = config.source if isinstance(config.source, list) else [config.source]
        data["source"] = [canonical(url) if "://" in url else url for url in source]
        data["output"] = canonical(config.output)
        if config.moved:
            data["moved"] = {canonical(now): canonical(before) for now, before in config.moved.items()}
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        self._put(text.encode(), "config.yaml")

    def add(self, event: str, **values: Any) -> None:
        record = {"time": round(time.time(), 3), "event": event, **values}
        line = self._redact(json.dumps(record, ensure_ascii=False, default=str))
        self._lines.append(line.encode("utf-8", "replace") + b"\n")
        self._dirty = True
        self.digest.add(event, values)

    def flush_when_due(self) -> None:
        """Write new events every few seconds, and less often while they cannot be written."""
        if self._dirty and time.monotonic() - self._flushed > self._interval:
            self.flush()

    def flush(self) -> None:
        if self._put(b"".join(self._lines), f"events-{self._part:05d}.jsonl"):
            self._dirty = False
            if sum(map(len, self._lines)) > _PART_BYTES:
                self._part, self._lines = self._part + 1, []
        self._flushed = time.monotonic()

    def finish(self, summary: dict[str, Any]) -> None:
        """Add the ``end`` event and write summary.json."""
        self.add("end", **summary)
        self.flush()
        self._put(json_bytes(summary), "summary.json")

    def _put(self, data: bytes, name: str) -> bool:
        """Write a file -> whether the storage has taken it. The run itself does not need it."""
        try:
            self._store.write_bytes(data, *self._folder, name)
        except StorageError as error:
            if not self._refused:
                _LOG.warning("%s The run goes on without its record.", self._redact(str(error)))
            self._refused, self._interval = True, min(2 * self._interval, _MAX_FLUSH_SECONDS)
            return False
        return True


_WINDOW_SECONDS = 60.0
_NAMED_HOSTS = 3


@dataclass(frozen=True)
class Snapshot:
    """Totals at one moment. ``busy`` is in accelerator-seconds, ``alive`` in worker-seconds. ``samples`` includes those
    of unfinished shards, ``samples_done`` does not. ``silent`` has the number of shards that wait for a host which does
    not answer, by its name."""

    shards_done: int
    shards: int
    samples: int
    samples_done: int
    busy: float
    alive: float
    workers: int  # that have started
    quarantined_shards: int
    refused_rows: int
    silent: Mapping[str, int] = field(default_factory=dict)
    starting: int = 0  # workers that start or load their models


@dataclass(frozen=True)
class Rates:
    """Rates over the snapshots of the last minute; None if they are not known. ``eta`` is in seconds."""

    samples_per_second: float | None = None
    busy_share: float | None = None
    eta: float | None = None


class ProgressScreen(Screen):
    """Prints snapshots. ``show`` can be called at any rate. ``expected`` samples are those of all shards by an estimate
    before the run, by which the remaining time is computed until a shard is finished."""

    def __init__(self, expected: float | None = None) -> None:
        super().__init__()
        self._history: deque[tuple[float, Snapshot]] = deque()
        self._start = self._begun = self._worked = time.monotonic()
        self._expected = expected
        self._counted = self._begun, 0  # when the number of samples has changed last, and to what

    def show(self, now: Snapshot) -> None:
        time_now = time.monotonic()
        if not now.workers and not now.samples:
            self._begun = time_now  # the rate is that of workers that have loaded their models
        if now.workers:
            self._worked = time_now
        self._history.append((time_now, now))
        while time_now - self._history[0][0] > _WINDOW_SECONDS and len(self._history) > 2:
            self._history.popleft()
        expected = self._expected_samples(now)
        self.draw(self.line(now), now.samples if expected else 0, expected or 1)

    def rates(self, now: Snapshot) -> Rates:
        """Rates over the last minute, and the remaining time at the average rate of this run."""
        then_time, then = self._history[0] if self._history else (self._start, now)
        span = time.monotonic() - then_time
        speed = (now.samples - then.samples) / span if span > 0 and now.samples > then.samples else None
        busy = None
        if now.busy > 0 and now.alive > then.alive:
            busy = min(1.0, (now.busy - then.busy) / (now.alive - then.alive))
        expected, eta = self._expected_samples(now), None
        if expected is not None and now.samples and now.workers:
            if now.samples != self._counted[1]:
                self._counted = time.monotonic(), now.samples
            at, samples = self._counted
            left = (at - self._begun) / samples * (expected - samples)
            # Workers count in steps. What has not come when it was expected has no estimate until more has come, and
            # neither has a shard that has more samples than expected.
            eta = left - (time.monotonic() - at)
            if eta <= 0:
                eta = None if now.shards_done < now.shards else 0.0
        return Rates(speed, busy, eta)

    def line(self, now: Snapshot) -> str:
        rates = self.rates(now)
        parts = [f"{now.shards_done:,} of {plural(now.shards, 'shard')}"]
        if rates.eta is not None:
            parts.append(f"ETA {format_duration(rates.eta)}")
        if not now.workers and now.starting:
            parts.append(f"{plural(now.starting, 'worker')} loading models for {time.monotonic() - self._worked:.0f} s")
        parts.append(plural(now.samples, "sample"))
        if rates.samples_per_second is not None:
            parts.append(f"{rates.samples_per_second:,.0f} samples/s")
        if rates.busy_share is not None:
            parts.append(f"models busy {rates.busy_share:.0%}")
        if now.workers or not now.starting:
            parts.append(plural(now.workers, "worker") + (f", {now.starting:,} starting" if now.starting else ""))
        if now.quarantined_shards or now.refused_rows:
            parts.append(f"quarantine: {plural(now.quarantined_shards, 'shard')}, {plural(now.refused_rows, 'row')}")
        if now.silent:
            hosts, shards = sorted(now.silent), sum(now.silent.values())
            more = f" and {len(hosts) - _NAMED_HOSTS} more" * (len(hosts) > _NAMED_HOSTS)
            verb, ending = "waits" if shards == 1 else "wait", "s" * (len(hosts) > 1)
            names = ", ".join(hosts[:_NAMED_HOSTS])
            parts.append(f"{plural(shards, 'shard')} {verb} for silent host{ending} {names}{more}")
        return "  ".join(parts)

    def _expected_samples(self, now: Snapshot) -> float | None:
        """Samples of all shards, from the mean of the finished ones, or else by the estimate; None without either."""
        if now.samples_done and now.shards_done:  # a postponed shard has samples and is not finished
            return max(now.samples, now.samples_done / now.shards_done * now.shards)
        return None if self._expected is None else max(now.samples, self._expected)


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
        from reinforce.reports import notebook_table

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
    if isinstance(error, Terminated):
        return Ending(error.status, "stopped")
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


#: Values by name of series: a number, or one for each value of the series' label.
Values: TypeAlias = "dict[str, float | Mapping[str, float]]"

#: Reasons of ``reinforce_workers_ended_total``, and the events that they are counted by.
_ENDED = {
    "died": "worker_died",
    "hung": "worker_hung",
    "replaced": "worker_replaced",
    "drained": "worker_drained",
    "recycled": "worker_recycled",
    "failed to start": "worker_failed_to_start",
}


@dataclass(frozen=True)
class Series:
    """One series; ``label`` is the name of its label, or None."""

    name: str
    text: str
    label: str | None = None

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def source(self) -> Literal["driver", "worker"]:
        """The process that records it."""
        return "worker" if self.label == "worker" else "driver"


SERIES = {
    one.name: one
    for one in (
        Series("reinforce_samples_total", "Samples of shards that were written."),
        Series("reinforce_shards_total", "Shards that were finished, or quarantined as a whole.", "result"),
        Series("reinforce_captions_total", "Captions that captioners have generated for them."),
        Series("reinforce_tokens_total", "Tokens of these captions, of captioners that report them."),
        Series(
            "reinforce_read_bytes_total", "Encoded images and texts that were read, of the source or of stored samples."
        ),
        Series("reinforce_written_bytes_total", "Bytes of the layer files that were written."),
        Series("reinforce_quarantined_total", "Samples and shards that were quarantined.", "reason"),
        Series("reinforce_stage_seconds_total", "Time of shards by stage of their reading thread.", "stage"),
        Series("reinforce_model_seconds_total", "Time of models on the accelerator.", "layer"),
        Series("reinforce_model_inputs_total", "Images, captions or texts of which models made a layer.", "layer"),
        Series("reinforce_fast_calls_total", "Calls of models that ran a fast path, such as compiled code.", "path"),
        Series("reinforce_plain_calls_total", "Calls that ran the plain way instead.", "path"),
        Series("reinforce_accelerator_busy_seconds_total", "Time in which the accelerators of all workers worked."),
        Series("reinforce_worker_seconds_total", "Time of all workers since their models were loaded."),
        Series("reinforce_retries_total", "Shards that were leased again.", "reason"),
        Series("reinforce_workers_ended_total", "Workers that ended before the run did.", "reason"),
        Series("reinforce_workers", "Workers whose models are loaded."),
        Series("reinforce_waiting_shards", "Shards that no worker has."),
        Series("reinforce_leased_shards", "Shards that workers have."),
        Series("reinforce_eta_seconds", "Estimated time until the end of the run."),
        Series(
            "reinforce_worker_samples_total",
            "Samples through the models, also of shards that are not finished.",
            "worker",
        ),
        Series("reinforce_worker_busy_seconds_total", "Time in which the worker's accelerator worked.", "worker"),
        Series("reinforce_worker_decode_queue", "Chunks of images that wait for a decode process.", "worker"),
        Series(
            "reinforce_worker_accelerator_queue",
            "Batches that wait for the accelerator; 0 if it waits for images.",
            "worker",
        ),
        Series("reinforce_worker_memory_bytes", "Memory of the worker's process.", "worker"),
    )
}


class Recorder:
    """Passes values to Ray: gauges unchanged, counters as the growth since the last call.

    ``label`` is the label value of a worker's series. Does nothing if Ray is not initialised.
    """

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._before: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()  # a worker records from several threads

    def record(self, values: Values) -> None:
        import ray

        if not ray.is_initialized():
            return
        with self._lock:
            for name, value in values.items():
                series = SERIES[name]
                for label, number in (value if isinstance(value, Mapping) else {self._label: value}).items():
                    tags = {} if series.label is None else {series.label: label}
                    grown = float(number) - self._before.get((name, label), 0.0)
                    if series.kind == "gauge":
                        _metric(name).set(float(number), tags)
                    elif grown > 0:
                        self._before[name, label] = float(number)
                        _metric(name).inc(grown, tags)


@cache
def _metric(name: str) -> Any:
    """Ray's metric of a series; a process creates it once."""
    from ray.util.metrics import Counter, Gauge

    series = SERIES[name]
    kind = Counter if series.kind == "counter" else Gauge
    return kind(name, series.text, () if series.label is None else (series.label,))


def totals_values(totals: RunTotals, events: Mapping[str, int]) -> Values:
    """The series of a run's totals; ``events`` counts its events by kind."""
    stages, captions = totals.stages, [one for layer, one in totals.stages.items() if unit_of(layer) == "captions"]
    return {
        "reinforce_samples_total": totals.samples,
        "reinforce_shards_total": {"finished": totals.written, "quarantined": totals.quarantined_shards},
        "reinforce_captions_total": sum(stage["inputs"] for stage in captions),
        "reinforce_tokens_total": sum(stage["tokens"] for stage in captions),
        "reinforce_read_bytes_total": totals.read_bytes,
        "reinforce_written_bytes_total": totals.bytes,
        "reinforce_quarantined_total": totals.refused + totals.quarantined,
        "reinforce_stage_seconds_total": totals.times,
        "reinforce_model_seconds_total": {layer: stage["seconds"] for layer, stage in stages.items()},
        "reinforce_model_inputs_total": {layer: stage["inputs"] for layer, stage in stages.items()},
        "reinforce_fast_calls_total": {f"{one.model}/{one.path}": one.used for one in totals.fast_paths},
        "reinforce_plain_calls_total": {f"{one.model}/{one.path}": one.plain for one in totals.fast_paths},
        "reinforce_retries_total": totals.retries,
        "reinforce_workers_ended_total": {reason: events.get(event, 0) for reason, event in _ENDED.items()},
    }


NAME = "reinforce_grafana_dashboard.json"
_FOLDER_VARIABLE = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"  # Ray's, for its own dashboards
_SESSION_FOLDER = "/tmp/ray/session_latest/metrics/grafana/dashboards"  # noqa: S108 - Ray's default


def dashboard_text() -> str:
    return files("reinforce.engine").joinpath("grafana_dashboard.json").read_text(encoding="utf-8")


def write_dashboard(folder: Path | None = None) -> Path:
    """Write the dashboard into a folder, by default beside those of Ray. Raises UserError."""
    target = folder or Path(os.environ.get(_FOLDER_VARIABLE) or _SESSION_FOLDER)
    if folder is None and not target.is_dir():
        raise UserError(f"{target} does not exist: name a folder, or start Ray with its dashboard on this machine.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / NAME).write_text(dashboard_text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target / NAME} cannot be written: {error}.") from error
    return target / NAME
