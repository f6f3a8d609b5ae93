"""Checks of the files of one shard: footers, checksums, keys and rows.

A vector has norm 1 within 0.01 when it is stored; the storage type adds its own error. A row that a layer could not
serve is null and has a reason in the layer's quarantine, and no other row has one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reinforce.dataset.files.content import Hashes, digest_keys, hash_keys
from reinforce.dataset.files.damage import check_columns, compute_again
from reinforce.dataset.files.layer_file import LayerFile, RefusedFile, StoredKeys
from reinforce.dataset.files.origin import other_origin
from reinforce.dataset.files.store import DamagedQuarantine, Store, check_footer, parse_footer
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading.aligned import MisalignedKeys, alignment_error, layer_errors
from reinforce.dataset.runs.key_sample import ShardKeys
from reinforce.dataset.validate.inventory import Finding, quarantine_finding
from reinforce.errors import UserError
from reinforce.parquet.footers import check_together
from reinforce.source.urls import shard_name
from reinforce.terminal import first_names, plural

_NO_HASHES: Hashes = np.empty(0, np.uint64)
SHARD_CAPACITY = 2**20  # hashes of keys from one shard
_shard_name = functools.lru_cache(maxsize=256)(shard_name)  # the files of a shard have one source
_STORED_BYTES = 2**24  # of the stored keys of a shard's samples that are kept, to be compared with other layers


@dataclass(frozen=True)
class ShardFiles:
    """Listed files of a shard: bytes by layer, and the layers with a quarantine file."""

    name: str
    sizes: Mapping[str, int]
    quarantined: Collection[str] = ()


@dataclass
class CheckedShard:
    """A shard as it was read: hashes of its keys, rows, the footer of its samples, and what is wrong.

    ``source`` is the state of its source file, ``changed`` what has changed there, and ``counted`` whether its samples
    were counted there.
    """

    name: str
    keys: ShardKeys = field(default_factory=lambda: ShardKeys(_NO_HASHES))
    rows: int = 0
    footer: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    source: str = ""
    changed: str = ""
    counted: bool = False


class _Keys:
    """The keys of the samples of a shard, by row group: digests, how they are stored, and their hashes up to a limit.

    Nothing of it grows with the keys but the stored ones and the hashes, which are bounded.
    """

    def __init__(self, limit: int) -> None:
        self.digests: list[bytes] = []
        self.stored: list[StoredKeys | None] = []
        self._hashes: list[Hashes] = []
        self._limit, self._count = limit, 0
        self.free_bytes = _STORED_BYTES  # of stored keys that are kept of the next row groups

    def add(self, keys: pa.ChunkedArray, stored: StoredKeys | None) -> None:
        self.digests.append(digest_keys(keys))
        self.stored.append(stored)
        self.free_bytes -= 0 if stored is None else len(stored.chunk)
        hashes = hash_keys(keys)
        self._hashes.append(hashes[hashes <= np.uint64(self._limit)])
        self._count += len(self._hashes[-1])
        if self._count > 2 * SHARD_CAPACITY:
            kept = self.sample()
            self._hashes, self._limit, self._count = [kept.hashes], kept.limit, len(kept.hashes)

    def sample(self) -> ShardKeys:
        hashes = np.unique(np.concatenate(self._hashes)) if self._hashes else _NO_HASHES
        return ShardKeys(_NO_HASHES, self._limit).joined(ShardKeys(hashes, self._limit), SHARD_CAPACITY)


class RowChecks:
    """Problems of the rows of one file of ``layer``, in any number of row groups.

    ``entry`` is the layer's in dataset.json, ``records`` the number of augmentation records of a sample there.
    """

    def __init__(self, layer: str, entry: Mapping[str, Any], records: int | None) -> None:
        self._layer, self._records = stored_layer(layer, entry), records
        self._wrong: dict[str, list[str]] = {}  # keys of rows by what is wrong with them
        self._null: set[str] = set()
        self._present: set[str] = set()

    def add(self, table: pa.Table) -> None:
        """Check a row group with all columns of the layer."""
        kind = self._layer.kind
        if kind.values is not None:
            valid = table[kind.values].is_valid()
            self._null.update(table["key"].filter(pc.invert(valid)).to_pylist())
            self._present.update(table["key"].filter(valid).to_pylist())
        for what, wrong in kind.wrong_rows(self._layer, table, self._records):
            if wrong.any():
                self._wrong.setdefault(what, []).extend(table["key"].filter(pa.array(wrong)).to_pylist())

    def problems(self, quarantined: Collection[str] | None) -> list[str]:
        """One phrase for each kind of problem; ``quarantined`` are the keys in the layer's quarantine of the shard, or
        None if they are not known."""
        lines = [_describe(keys, what) for what, keys in self._wrong.items()]
        if quarantined is None:
            return lines
        if unexplained := self._null.difference(quarantined):
            lines.append(_describe(unexplained, "are null without a reason in the quarantine"))
        if present := self._present.intersection(quarantined):
            lines.append(_describe(present, "are in the quarantine although they have values"))
        return lines


def _describe(keys: Collection[str], what: str) -> str:
    return f"{plural(len(keys), 'row')} {what} ({first_names(sorted(keys))})"


def check_shards(
    store: Store, manifest: Mapping[str, Any], quick: bool, shards: Sequence[ShardFiles], limit: int
) -> list[CheckedShard]:
    """Read some shards, or only their keys if ``quick``; hashes of keys up to a ``limit`` are returned."""
    ends: dict[str, dict[str, LayerFile]] = {shard.name: {} for shard in shards}
    if quick:
        for shard in shards:
            for layer, size in shard.sizes.items():
                with contextlib.suppress(Exception):  # then it is opened again, which raises the same
                    ends[shard.name][layer] = store.layer_end(layer, shard.name, size)
        check_together([file.footer for files in ends.values() for file in files.values()])
    return [_ShardCheck(store, manifest, quick, shard, ends[shard.name], limit).run() for shard in shards]


class _ShardCheck:
    """The check of one shard. ``ends`` are those of its files whose end was read before, by layer."""

    def __init__(
        self,
        store: Store,
        manifest: Mapping[str, Any],
        quick: bool,
        shard: ShardFiles,
        ends: Mapping[str, LayerFile],
        limit: int,
    ) -> None:
        self._store, self._manifest, self._quick, self._shard, self._ends = store, manifest, quick, shard, ends
        self._found = CheckedShard(shard.name)
        self._keys: _Keys | None = _Keys(limit)  # of the samples; None if these are damaged

    def run(self) -> CheckedShard:
        """Read all layers, the samples first. Other layers are not compared with damaged samples."""
        found = self._found
        for layer in sorted(self._manifest["layers"], key=lambda name: name != SAMPLES):
            if layer in self._shard.sizes:
                refused = self._read_quarantine(layer)
                found.findings += self._check(layer, refused)
                found.findings += [refused] if isinstance(refused, Finding) else []
            if layer == SAMPLES and self._keys is not None:
                found.keys = self._keys.sample()
                if any(finding.kind != "rows" for finding in found.findings):
                    self._keys = None
        return found

    def _read_quarantine(self, layer: str) -> set[str] | Finding:
        """The keys in a layer's quarantine of the shard, or what is wrong with it."""
        name = self._shard.name
        if layer not in self._shard.quarantined:
            return set()
        try:
            return {row["key"] for row in self._store.quarantined(layer, name) if row["key"] is not None}
        except DamagedQuarantine as error:
            return quarantine_finding(self._store, layer, name, error.args[1])
        except (UserError, OSError) as error:
            return Finding("unreadable", str(error), layer, name)

    def _check(self, layer: str, refused: set[str] | Finding) -> Iterator[Finding]:
        """Problems of a layer's file; ``refused`` is from ``_read_quarantine``."""
        name = self._shard.name
        try:
            with layer_errors(self._store, layer, name), self._opened(layer) as file:
                footer = parse_footer(file.metadata)
                if layer == SAMPLES:
                    self._found.footer = footer
                if reason := self._why_misplaced(layer, footer):
                    yield Finding("misplaced", self._message(layer, reason), layer, name)
                if self._keys is None:
                    for number in range(file.num_row_groups):
                        file.read_row_group(number, ("key",) if self._quick else None)
                elif not reason:
                    if layer != SAMPLES and (other := other_origin(self._found.footer, footer)):
                        raise alignment_error(self._store, layer, name, other)
                    yield from self._rows(layer, file, self._keys, refused)
        except MisalignedKeys as error:
            yield Finding("misplaced", str(error), layer, name)
        except (UserError, OSError) as error:
            yield _unreadable(error, layer, name)

    def _opened(self, layer: str) -> contextlib.AbstractContextManager[LayerFile]:
        end, shard = self._ends.get(layer), self._shard
        if end is None:
            return self._store.open_layer(layer, shard.name, whole=not self._quick, size=shard.sizes[layer])
        check_footer(self._store.layer_path(layer, shard.name), end.metadata, None)
        return contextlib.nullcontext(end)

    def _why_misplaced(self, layer: str, footer: Mapping[str, str]) -> str | None:
        """Why a file is not the one of this layer and shard, by its footer."""
        expected = self._manifest["layers"][layer]["fingerprint"]
        if footer.get("layer", layer) != layer:
            return f"it is a file of layer {footer['layer'][:200]}"
        if footer.get("fingerprint") != expected:
            return f"it has fingerprint {footer.get('fingerprint', 'none')[:40]}, its layer has {expected}"
        if (source := footer.get("source")) and _shard_name(source) != self._shard.name:
            return f"it is of the source shard {source[:500]}"
        return None

    def _rows(self, layer: str, file: LayerFile, keys: _Keys, refused: set[str] | Finding) -> Iterator[Finding]:
        """Problems of the rows of a file. The ``keys`` are compared with those of the samples, or are added to them."""
        checks = RowChecks(layer, self._manifest["layers"][layer], self._manifest["augmentations"].get("count"))
        if layer != SAMPLES and file.num_row_groups != len(keys.digests):
            raise alignment_error(self._store, layer, self._shard.name)
        for number in range(file.num_row_groups):
            stored = None
            if self._quick:
                stored = file.stored_keys(number, keys.free_bytes if layer == SAMPLES else _STORED_BYTES)
                if layer != SAMPLES and stored is not None and stored == keys.stored[number]:
                    continue
            table = file.read_row_group(number, ("key",) if self._quick else None, use_threads=False)
            if "key" not in table.column_names:
                raise RefusedFile("it has no column key")
            if layer == SAMPLES:
                keys.add(table["key"], stored)
                self._found.rows += table.num_rows
            elif digest_keys(table["key"]) != keys.digests[number]:
                raise alignment_error(self._store, layer, self._shard.name)
            if not self._quick:
                check_columns(layer, table)
                checks.add(table)
        if not self._quick:
            # Keys that the samples refuse have no row. Which ones a damaged quarantine has is not known.
            known = None if isinstance(refused, Finding) else refused if layer != SAMPLES else set()
            for problem in checks.problems(known):
                yield Finding("rows", self._message(layer, problem), layer, self._shard.name)

    def _message(self, layer: str, reason: str) -> str:
        name = self._shard.name
        return f"{self._store.layer_path(layer, name)}: {reason}. {compute_again(self._store.url, layer, name)}"


def _unreadable(error: UserError | OSError, layer: str, shard: str) -> Finding:
    """The finding for an error of reading: the file is damaged if its content was refused."""
    cause = error if isinstance(error, RefusedFile) else error.__cause__
    if not isinstance(cause, RefusedFile):
        return Finding("unreadable", str(error), layer, shard)
    return Finding("damaged", str(error), *(cause.file or (layer, shard)))
