"""``reinforce select``: apply rules to all samples of a dataset, and write a view.

Work is done by chunks of shards. What must be known of all samples, such as the value above which a share of them lies,
is found from counts that chunks add up, and duplicates in buckets of similar samples, so no process has all rows. What
is finished is kept under ``views/<name>/parts-<fingerprint>`` until the view is written. This fingerprint covers the
states of the files that are read, so that finished parts are used only while the files are the same.

There is one selection of a view at a time: two of one name would remove each other's parts and rows. A local dataset
has a lock file for each view. In an object store a selection creates ``views/<name>/selection.json`` by a conditional
put, and writes it again while it runs; one that was killed expires.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from reinforce.dataset.aligned import check_completeness, row_group_table, rows_of_shards
from reinforce.dataset.index import states_of
from reinforce.dataset.layers import SAMPLES, compute_fingerprint
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.dataset.view import (
    View,
    ViewFiles,
    ViewRows,
    read_views,
    remove_leftovers,
    view_fingerprint,
    write_view,
)
from reinforce.errors import UserError
from reinforce.explore.config import SelectConfig
from reinforce.explore.duplicates import Balanced, Bucketed, Buckets, Duplicates, training_places
from reinforce.explore.neighbours import Reference
from reinforce.explore.parts import Arrays, Parts
from reinforce.explore.passes import (
    CountValues,
    Measure,
    Pass,
    ShardChunk,
    WriteRows,
    chunks_of,
    digest_contents,
)
from reinforce.explore.references import (
    OtherDataset,
    Reinforce,
    check_found,
    find_datasets,
    read_reference,
)
from reinforce.explore.rules import HASH_BITS, BoundRule, Counts, ThresholdSearch, bind, layers_of, number
from reinforce.processes.parallel import open_workers
from reinforce.source.urls import FOLDER
from reinforce.storage import ClaimFile, lock_file
from reinforce.terminal import first_names, plural

_FILE = "selection.json"
_RENEWED, _EXPIRES = 20.0, 120.0  # seconds
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_view(store: Store, view: str) -> Iterator[Callable[[], None]]:
    """Lock a view against a second selection. Yields what raises UserError if the lock was lost.

    Raises UserError if another selection has it.
    """
    busy = f"another selection is making view {view} of {store.url}"
    fix = "Wait until it ends, or set another `name`."
    if store.local:
        with lock_file(store.path(".tmp", f"select-{view}.lock"), busy, fix):
            yield lambda: None
        return
    claim = ClaimFile(store, (FOLDER, view, _FILE), uuid.uuid4().hex, _EXPIRES, _has_ended)
    if (found := claim.take()).get("token") != claim.token:
        raise UserError(f"{busy} (pid {found.get('pid')} on {found.get('host')}). {fix}")
    stopped = threading.Event()

    def check() -> None:
        if (claim.read() or {}).get("token") != claim.token:
            raise UserError(f"{busy} (it began while this one did not reach the storage). {fix}")

    thread = threading.Thread(target=_renew, args=(claim, stopped), daemon=True)
    thread.start()
    try:
        yield check
    finally:
        stopped.set()
        thread.join()
        claim.release()


def _renew(claim: ClaimFile, stopped: threading.Event) -> None:
    """Write a claim again until the event is set, or until another selection has taken it."""
    while not stopped.wait(_RENEWED):
        try:
            if (claim.read() or {}).get("token") != claim.token:
                return
            claim.renew()
        except UserError as error:  # StorageError among them; it is tried again
            _LOG.warning("%s", error)


def _has_ended(claim: Mapping[str, Any]) -> bool:
    """Whether the process of a claim of this machine has ended."""
    pid = claim.get("pid")
    return isinstance(pid, int) and pid != os.getpid() and not psutil.pid_exists(pid)


_MAX_GROUPS = 2**16
_PARTS_VERSION = 3  # of the results of parts
_Log = Callable[[str], None]


def select(
    config: SelectConfig,
    log: _Log = lambda line: None,
    address: str | None = None,
    processes: int | None = None,
    reinforce: Reinforce | None = None,
) -> View:
    """Write the view of a config, in place of an earlier one of its name; ``log`` gets lines on the progress.

    Works on the Ray cluster at ``address`` (default: RAY_ADDRESS), else in ``processes`` of this machine (default: one
    a core). One that was killed continues. ``reinforce`` runs a config, for references that are no reinforced dataset.
    Raises UserError, also if another selection of this name is in progress.
    """
    store = Store(config.dataset)
    manifest = read_manifest(store)
    with lock_view(store, config.name) as check_lock:
        parts, view = _apply_rules(store, manifest, config, log, address, processes, reinforce)
        check_lock()
        problem = None
        now = states_of(store, view.inputs, [*view.counts])
        if changed := [one for one, then, at in zip(view.counts, view.files.states, now, strict=True) if then != at]:
            problem = (
                f"{store.url}: files of {first_names(changed)} have changed since this selection began; view "
                f"{view.name} is not written. Run it again."
            )
        elif not len(view):
            last = next(line["rule"] for line in reversed(view.report) if line["rows"])
            problem = f"the rules keep no sample: rule {last} leaves out the last; view {view.name} is not written"
        if problem is None:
            write_view(store, view)
        else:  # only an earlier view keeps its rows
            before = [found for name, found in read_views(store) if name == view.name and isinstance(found, View)]
            remove_leftovers(store, view.name, before[0].fingerprint if before else None)
        parts.remove()
    if problem is not None:
        raise UserError(problem)
    return view


def _apply_rules(
    store: Store,
    manifest: Mapping[str, Any],
    config: SelectConfig,
    log: _Log,
    address: str | None,
    processes: int | None,
    reinforce: Reinforce | None,
) -> tuple[Parts, View]:
    """The view of a config, whose rows are written, and the results that it was made of."""
    rules = [bind(n, rule, config.seed, manifest) for n, rule in enumerate(config.rules, 1)]
    folder = f"{store.url}/{FOLDER}/{config.name}"
    compared = {rule.number: spec for rule in rules if (spec := rule.spec.decontaminate)}
    against = {number: find_datasets(spec, manifest, folder, reinforce) for number, spec in compared.items()}
    inputs = {name: str(manifest["layers"][name]["fingerprint"]) for name in layers_of(rules)}
    shards = _complete_shards(store, inputs, log)
    written = [rule.spec.model_dump(mode="json", exclude_none=True) for rule in rules]
    for of_rule, datasets in against.items():
        entry = written[of_rule - 1]["decontaminate"]
        entry.pop("config", None)  # the fingerprints say what it has led to
        entry["against"] = {url: dataset.written() for url, dataset in datasets.items()}
    # The columns that rules read, of layers of which they read only some.
    columns = {SAMPLES: sorted({"key"}.union(*(rule.sample_columns for rule in rules)))}
    states = states_of(store, inputs, [*shards])
    groups = row_group_table(store, inputs[SAMPLES], shards)
    recipe = {"version": _PARTS_VERSION, "rules": written, "seed": config.seed, "inputs": inputs, "columns": columns}
    by_shard = dict(zip(shards, states, strict=True))  # results of an earlier selection are of the same files
    dataset = store.root if store.relative else config.dataset  # workers of a cluster have another working folder
    parts = Parts(dataset, config.name, compute_fingerprint({"selection": {**recipe, "states": by_shard}}))
    if parts.remove(others=True):
        log("results of a selection of other rules or files, which was stopped, are removed")
    with open_workers(address, processes=processes) as workers:
        selection = _Selection(parts, partial(parts.compute, workers), inputs, rules, [*shards], groups, log)
        files = ViewFiles(columns, selection.contents(columns), states, array("Q"))
        fingerprint = view_fingerprint(written, config.seed, inputs, shards, files)
        for rule in rules:
            selection.add(rule, manifest, against.get(rule.number, {}))
        kept, codes, digests = selection.write(ViewRows(config.name, fingerprint))
    report = _report(selection.rules, codes, selection.found)
    rows = dict(zip(shards, rows_of_shards(groups, len(shards)), strict=True))
    files = replace(files, digests=digests)
    return parts, View(config.name, fingerprint, written, config.seed, inputs, rows, kept, report, files)


def report_lines(view: View) -> Iterator[str]:
    """Lines about what each rule of a view excluded."""
    for line in view.report:
        null = f", of which {line['null']:,} have no value" if line["null"] else ""
        threshold = line.get("threshold")
        shown = f"{threshold:,}" if isinstance(threshold, int) else f"{threshold or 0:g}"
        above = "" if threshold is None else f"; keeps values of at least {shown}"
        above = f"; in {line['groups']:,} groups" if line.get("groups") is not None else above
        if line.get("clusters") is not None:
            above = f"; of {line['clusters']:,} clusters of up to {line['largest']:,} keeps up to {line['most']:,} each"
        if without := line.get("without_vectors"):
            above += f"; compared with {line['references']:,} images, and {without:,} have no vector"
        yield f"{line['rule']}: {line['left_out']:,} of {line['rows']:,} samples are left out{null}{above}"
    yield f"view {view.name}: {len(view):,} of {sum(view.counts.values()):,} samples are kept"


def _complete_shards(store: Store, inputs: Iterable[str], log: _Log) -> dict[str, int]:
    """The shards that have all layers, with the bytes of their samples. Raises UserError if one lacks a layer that is
    not quarantined, or there are none."""
    listings = store.listings(inputs)
    found = check_completeness(store, listings)
    if found.missing:
        raise UserError(f"{store.url}: {found.describe_missing()}. Finish the run before you select.")
    if found.quarantined:
        log(found.describe_quarantined())
    if not found.complete:
        raise UserError(f"{store.url} has no shards to select from. Finish the run before you select.")
    sizes = listings[SAMPLES].sizes_of(found.complete)
    return dict(zip(found.complete, sizes.tolist(), strict=True))


def _report(
    rules: Sequence[BoundRule], counts: npt.NDArray[np.int64], found: Mapping[int, Mapping[str, int]]
) -> list[dict[str, Any]]:
    """Of each rule: the rows that it saw, how many it leaves out, for how many it has no value, and what it found."""
    left, report = int(counts.sum()), []
    for rule in rules:
        out, null = (int(count) for count in counts[2 * rule.number : 2 * rule.number + 2])
        line: dict[str, Any] = {"rule": rule.label, "rows": left, "left_out": out + null, "null": null}
        if rule.within is not None and rule.search:
            line["groups"] = len(rule.search.groups)
        elif rule.value and rule.search and out:
            line["threshold"] = number(int(rule.search.prefix[0]), rule.value.dtype)
        report.append({**line, **found.get(rule.number, {})})
        left -= out + null
    return report


@dataclass
class _Selection:
    """Rules that are applied one after the other. ``pending`` are those that the next pass applies."""

    parts: Parts
    compute: Callable[..., Iterator[Arrays]]
    inputs: dict[str, str]
    rules: list[BoundRule]
    shards: list[str]
    groups: npt.NDArray[np.int64]
    log: _Log
    pending: list[BoundRule] = field(default_factory=list)
    codes: str | None = None
    found: dict[int, dict[str, int]] = field(default_factory=dict)  # numbers for the report, by rule

    @cached_property
    def chunks(self) -> list[ShardChunk]:
        return chunks_of(dict(zip(self.shards, rows_of_shards(self.groups, len(self.shards)), strict=True)))

    def add(self, rule: BoundRule, manifest: Mapping[str, Any], against: Mapping[str, OtherDataset]) -> None:
        """Find out what a rule needs to know of all samples."""
        if rule.top is not None:
            self.log(f"rule {rule.label}: looking for the value above which it keeps samples")
            rule = replace(rule, search=self._find_values(rule, rule.top))
        elif spec := rule.spec.decontaminate:
            self.log(f"rule {rule.label}: reading {', '.join(against)}")
            stage = f"{rule.number}-reference"
            read = partial(read_reference, self.parts, stage)
            [counts] = self.compute(f"{stage}-read", read, [[*against.values()]])
            found = check_found(spec, rule.label, against, counts)
            self.found[rule.number] = dict(zip(("references", "without_vectors"), found, strict=True))
            rule = replace(rule, reference=Reference(self.parts, stage, spec.threshold))
        elif rule.in_buckets:
            self._work_in_buckets(rule, manifest["layers"][rule.layer]["dim"] if rule.layer else 0)
        self.rules[rule.number - 1] = rule
        if not rule.in_buckets:
            self.pending.append(rule)

    def contents(self, columns: Mapping[str, Sequence[str]]) -> array[int]:
        """The digest of what the rules read of each shard."""
        digest = partial(digest_contents, self.parts, {name: columns.get(name) for name in self.inputs})
        found = array("Q")
        for result in self.compute("contents", digest, self.chunks):
            found.frombytes(result["contents"].tobytes())
        return found

    def write(self, view: ViewRows) -> tuple[dict[str, array[int]], npt.NDArray[np.int64], array[int]]:
        """Write the rows of all shards -> rows of each row group that are kept, by shard, rows with each code, and the
        digest of each file. An expression fails before the first of them is written."""
        if any(rule.expressions for rule in self.pending):
            list(self._pass("applied", None))
        self.log(f"writing {plural(len(self.shards), 'shard')}")
        kept: dict[str, array[int]] = {}  # they take a tenth of the memory of lists
        # The text of a view for each code.
        names = [None, None, *(text for rule in self.rules for text in (rule.label, f"{rule.label}: null"))]
        valued = [rule for rule in self.rules if rule.spec.keep is not None and rule.within is None]
        codes, digests = np.zeros(len(names), np.int64), array("Q")
        results = self._pass("rows", WriteRows(view, names, valued), save=False, read=valued)
        for chunk, result in zip(self.chunks, results, strict=True):
            of_shards = np.split(result["kept"], np.cumsum(result["groups"])[:-1])
            kept |= {shard: array("i", of.tobytes()) for shard, of in zip(chunk.shards, of_shards, strict=True)}
            codes += result["codes"]
            digests.frombytes(result["digests"].tobytes())
        return kept, codes, digests

    def _find_values(self, rule: BoundRule, top: int | float) -> ThresholdSearch:
        search = ThresholdSearch(HASH_BITS if rule.value is None else 8 * np.dtype(rule.value.dtype).itemsize)
        while search.left:
            results = self._pass(f"{rule.number}-counts-{search.left}", CountValues(rule, search))
            counts = Counts.sum(Counts(**result) for result in results)
            search = search.narrowed(counts, top)
            if len(search.groups) > _MAX_GROUPS:
                raise UserError(
                    f"rule {rule.label}: `within` makes {len(search.groups):,} groups, more than {_MAX_GROUPS:,}. Name "
                    "an expression with fewer values, such as md5_number_lower(...) % 10000."
                )
            if not len(search.groups):
                break
        return search

    def _work_in_buckets(self, rule: BoundRule, dim: int) -> None:
        """Compute all parts of each stage, whose results are read where they are needed."""
        rows, balance = int(self.groups[:, 2].sum()), rule.spec.balance
        buckets = Buckets(rows, dim, balance.clusters[0] if balance else 0)
        if buckets.clusters > rows:
            few = f"rule {rule.label}: {plural(rows, 'sample')} cannot be {buckets.clusters:,} clusters"
            raise UserError(f"{few}. Lower `clusters`.")
        kind: type[Bucketed] = Balanced if balance else Duplicates
        found = kind(self.parts, self.inputs, rule, buckets, tuple(chunk.first for chunk in self.chunks))
        if dim:
            self.log(f"rule {rule.label}: dividing samples into cells ({buckets.cells:,})")
            places = training_places(self.groups, self.shards, rule.seed, buckets.cells)
            list(self.compute(found.stage("centroids-trained"), found.train, [places]))
        results = self._pass(found.stage("records"), found, save=True)
        if isinstance(found, Balanced):
            sizes = functools.reduce(np.add, (result["sizes"] for result in results))
            found = found.divide(sizes)
            most, clusters = int(found.shares.max()), int((sizes > 0).sum())
            self.found[rule.number] = {"clusters": clusters, "largest": int(sizes.max()), "most": most}
        else:
            list(results)
        self.log(f"rule {rule.label}: comparing samples in each part ({buckets.count:,})")
        list(self.compute(found.stage("left-out"), found.compare, found.records.ranges(len(self.chunks))))
        assert self.codes is not None
        after = found.stage("left-out-codes")
        enter = partial(found.enter, self.codes, after)
        chunks = [*zip(self.chunks, found.left_out.ranges(buckets.count), strict=True)]
        list(self.compute(found.stage("left-out-entered"), enter, chunks))
        self.codes = after

    def _pass(
        self, stage: str, measure: Measure[Any] | None, save: bool | None = None, read: Sequence[BoundRule] = ()
    ) -> Iterator[Arrays]:
        """Apply what is pending to all chunks, and measure -> the result of each chunk.

        ``save`` is whether the codes are kept for the next pass; by default if something was pending. ``read`` are
        rules whose values are measured.
        """
        after = f"{stage}-codes" if (bool(self.pending) if save is None else save) else None
        task = Pass(self.parts, self.inputs, self.codes, after, tuple(self.pending), measure, tuple(read))
        yield from self.compute(stage, task, self.chunks)
        self.codes, self.pending = after or self.codes, []
