"""Layers of a shard read together, by row group, with their rows checked to be aligned by key; which shards are
complete in all of some layers; and row counts, from the index of the samples layer, else from the Parquet footers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.dataset.index import drop_shard_command, read_index
from reinforce.dataset.layer_file import LayerFile, RefusedFile, check_rows
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.store import Listing, Store, check_footer, other_origin, parse_footer
from reinforce.dataset.view import ShardRows, View, ViewRows, shard_rows
from reinforce.errors import UserError
from reinforce.source.parquet_file import TAIL_BYTES, read_footer
from reinforce.source.references import current_url
from reinforce.source.urls import read_range
from reinforce.terminal import escape, first_names, plural


class MisalignedKeys(UserError):
    """A layer's file does not have the rows of the samples of its shard."""


@dataclass(frozen=True)
class AlignedLayers:
    """Layers of a dataset that are read together.

    ``fingerprints`` maps each layer, ``samples`` included, to the fingerprint that its files must have, None if that is
    not checked. ``columns`` restricts a layer to some of its columns, among them ``key``; default: all columns.
    ``moved`` is that of dataset.json: references to images get the URLs where the source shards are now. With ``view``,
    only the rows that it keeps are read.
    """

    store: Store
    fingerprints: Mapping[str, str | None]
    columns: Mapping[str, Sequence[str]]
    moved: Mapping[str, str] = field(default_factory=dict)
    view: ViewRows | None = None

    @contextlib.contextmanager
    def open(self, shard: str, *, whole: bool = True) -> Iterator[AlignedShard]:
        """Open a shard's files, to be read as a ``whole`` or for single row groups.

        Raises UserError if one is missing, damaged, has another fingerprint, or is of another source than the samples.
        """
        rows = None if self.view is None else shard_rows(self.view, self.store, shard)
        with contextlib.ExitStack() as stack:
            files = {}
            for name, fingerprint in self.fingerprints.items():
                with layer_errors(self.store, name, shard):
                    files[name] = stack.enter_context(self.store.open_layer(name, shard, fingerprint, whole=whole))
                samples, own = (parse_footer(files[of].metadata) for of in (SAMPLES, name))
                if name != SAMPLES and (reason := other_origin(samples, own)):
                    raise alignment_error(self.store, name, shard, reason)
                if files[name].num_row_groups != files[SAMPLES].num_row_groups:
                    raise alignment_error(self.store, name, shard)
            yield AlignedShard(self, shard, files, rows)


class AlignedShard:
    """The open files of one shard's layers."""

    def __init__(
        self, aligned: AlignedLayers, shard: str, files: Mapping[str, LayerFile], rows: ShardRows | None
    ) -> None:
        self.store, self.shard, self.layers = aligned.store, shard, tuple(files)
        self.row_groups: int = files[SAMPLES].num_row_groups
        self._aligned, self._files, self._rows = aligned, files, rows

    @property
    def source(self) -> str:
        """URL of the source shard where it is now, as the footer of its samples records it; empty if it does not."""
        return current_url(parse_footer(self._files[SAMPLES].metadata).get("source", ""), self._aligned.moved)

    def footer(self, layer: str) -> dict[str, str]:
        """The footer of a layer's file, as ``parse_footer`` returns it."""
        return parse_footer(self._files[layer].metadata)

    def row_group(self, number: int) -> RowGroup:
        """Read the samples of a row group; its other layers are read on request."""
        return RowGroup(self, number, self._rows)

    def read(self, number: int) -> dict[str, pa.Table]:
        """Read a row group of every layer. Raises UserError if they are not aligned or a file is damaged."""
        group = self.row_group(number)
        return {name: group.read(name) for name in self.layers}

    def read_unchecked(self, layer: str, number: int) -> pa.Table:
        """Read a row group of a layer without comparing its keys; references to images name the tars where they are
        now."""
        with layer_errors(self.store, layer, self.shard):
            table = self._files[layer].read_row_group(number, self._aligned.columns.get(layer))
            if "key" not in table.column_names:
                raise RefusedFile("it has no column key")
        index = table.schema.get_field_index("image_ref")
        if index < 0 or not self._aligned.moved:
            return table
        rows = [{**row, "url": current_url(row["url"], self._aligned.moved)} for row in table["image_ref"].to_pylist()]
        column = table.schema.field(index)
        return table.set_column(index, column, pa.array(rows, column.type))


class RowGroup:
    """One row group of an open shard: its ``samples``, and other layers on request."""

    def __init__(self, shard: AlignedShard, number: int, rows: ShardRows | None) -> None:
        self._shard, self._number = shard, number
        self.samples: pa.Table = shard.read_unchecked(SAMPLES, number)
        self._kept = None if rows is None else rows.kept(number, self.samples["key"])
        if self._kept is not None:
            self.samples = self.samples.filter(self._kept)

    def read(self, layer: str) -> pa.Table:
        """Read a layer. Raises UserError if its keys are not those of the samples or its file is damaged."""
        if layer == SAMPLES:
            return self.samples
        table = self._shard.read_unchecked(layer, self._number)
        if self._kept is not None and len(table) == len(self._kept):
            table = table.filter(self._kept)
        if not table["key"].equals(self.samples["key"]):
            raise alignment_error(self._shard.store, layer, self._shard.shard)
        return table

    def stored(self, layer: str, column: str) -> npt.NDArray[np.bool_]:
        """The rows of a layer's tensor that are not null; it is not read if the footer shows that all are stored."""
        with layer_errors(self._shard.store, layer, self._shard.shard):
            has_nulls = self._shard._files[layer].has_nulls(self._number, column)
        if not has_nulls:
            return np.ones(len(self.samples), np.bool_)
        return np.asarray(self.read(layer)[column].is_valid())


def alignment_error(store: Store, layer: str, shard: str, reason: str = "") -> MisalignedKeys:
    """The error for a file whose rows are not those of the samples of its shard; without a ``reason``, by its keys."""
    what = (
        f"is not of {SAMPLES}/{shard}.parquet: {reason}."
        if reason
        else (f"does not have the keys of {SAMPLES}/{shard}.parquet: one of them was changed.")
    )
    command = drop_shard_command(store.url, [layer], shard)
    return MisalignedKeys(
        f"{layer}/{shard}.parquet {what} Restore the file that was replaced, or set the file of the layer aside by "
        f"{command} --yes, and run again."
    )


@contextlib.contextmanager
def layer_errors(store: Store, layer: str, shard: str) -> Iterator[None]:
    """Turn what reading a layer's file raises into a UserError that names it and the command that sets it aside."""
    path = store.layer_path(layer, shard)
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. `reinforce run` with its config computes what is missing.") from error
    except Exception as error:  # each storage driver has its own exceptions
        kind = "" if isinstance(error, RefusedFile) else f"{type(error).__name__}: "
        command = drop_shard_command(store.url, [layer], shard)
        raise UserError(
            f"{path} cannot be read ({kind}{escape(str(error)[:500])}). If it is damaged, set it aside by {command} "
            "--yes: `reinforce run` with its config computes what is missing."
        ) from error


@dataclass(frozen=True)
class Completeness:
    """The shards of some layers.

    Attributes:
        complete: names of the shards that every layer has, sorted.
        total: number of shards that some layer has or had: those of ``samples``, unless files of it were lost.
        missing: for each layer that lacks shards, their names. Quarantined shards are not among them.
        quarantined: number of shards that are not complete because they are quarantined in a layer.
    """

    complete: list[str]
    total: int
    missing: Mapping[str, list[str]]
    quarantined: int

    def describe_missing(self) -> str:
        """For each layer, how many and which shards it lacks."""
        parts = []
        for layer, shards in self.missing.items():
            parts.append(f"{layer} lacks {len(shards):,} of {plural(self.total, 'shard')} ({first_names(shards)})")
        return "; ".join(parts)

    def describe_quarantined(self) -> str:
        """The number of quarantined shards, as a sentence without its full stop."""
        if self.quarantined == 1:
            return "1 shard is left out because it is quarantined in a layer"
        return f"{self.quarantined:,} shards are left out because they are quarantined in a layer"


def check_completeness(store: Store, listings: Mapping[str, Listing], known: Iterable[Listing] = ()) -> Completeness:
    """Compare the listings of layers (``Store.listings``), and other listings of shards that are ``known`` to exist.

    The quarantine is listed only if a layer lacks a shard.
    """
    every = Listing.union([*listings.values(), *known])
    present = {layer: listing.has(every) for layer, listing in listings.items()}
    complete = np.logical_and.reduce([*present.values()])
    quarantined: set[str] = set()
    if not complete.all():
        lone = store.lone_quarantine(listings).values()
        quarantined = {shard for shards in lone for shard, whole in shards.items() if whole}
    missing = {}
    for layer, mask in present.items():
        absent = every.filter(pa.array(~mask)).to_pylist()
        if lacking := [shard for shard in absent if shard not in quarantined]:
            missing[layer] = lacking
    left_out = sum(shard in quarantined for shard in every.filter(pa.array(~complete)).to_pylist())
    return Completeness(every.filter(pa.array(complete)).to_pylist(), len(every), missing, left_out)


_BATCH = 1024  # files per request to the file system; object stores answer them concurrently


def row_group_table(store: Store, fingerprint: str, shards: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Array [row groups, 3] of shard number, row group number within the file, and rows.

    ``shards`` maps each shard to the bytes of its samples file. One request, and one for each shard that the index
    lacks, many at a time. Raises UserError if such a file is damaged or has another fingerprint.
    """
    counts: dict[str, Sequence[int] | npt.NDArray[np.int32]] = {}
    if shards:
        counts.update(read_index(store, SAMPLES, fingerprint).groups(shards))
    missing = [shard for shard in shards if shard not in counts]
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        paths = [store.layer_path(SAMPLES, shard) for shard in batch]
        sizes = [shards[shard] for shard in batch]
        tails = store.fs.cat_ranges(paths, [max(0, size - TAIL_BYTES) for size in sizes], sizes, on_error="return")
        for shard, path, size, tail in zip(batch, paths, sizes, tails, strict=True):
            with layer_errors(store, SAMPLES, shard):
                if isinstance(tail, Exception):
                    raise tail
                whole = len(tail) == min(size, TAIL_BYTES)
                metadata = read_footer(
                    tail if whole else read_range(store.fs, path, max(0, size - TAIL_BYTES), size), size
                )
                if metadata is None:  # the footer is longer than the tail
                    with store.open_layer(SAMPLES, shard, whole=False) as file:
                        metadata = file.metadata
                check_footer(path, metadata, fingerprint)
                groups = range(metadata.num_row_groups)
                counts[shard] = [check_rows(metadata.row_group(group).num_rows) for group in groups]
    lengths = np.array([len(counts[shard]) for shard in shards], np.int64)
    table = np.empty((int(lengths.sum()), 3), np.int64)
    table[:, 0] = np.repeat(np.arange(len(shards)), lengths)
    table[:, 1] = np.arange(len(table)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    table[:, 2] = np.concatenate([np.empty(0, np.int64), *(np.asarray(counts[shard], np.int64) for shard in shards)])
    return table


def kept_rows(groups: npt.NDArray[np.int64], shards: Sequence[str], view: View) -> npt.NDArray[np.int64]:
    """The row groups [n, 3] with the numbers of their rows that a view keeps, without those of which it keeps none.

    Raises UserError if the view has another number of row groups.
    """
    kept = [view.kept[shard] for shard in shards]
    if [len(one) for one in kept] != np.bincount(groups[:, 0], minlength=len(shards)).tolist():
        raise UserError(f"view {view.name} is of other samples. Make it again with reinforce select.")
    groups = groups.copy()
    groups[:, 2] = [count for one in kept for count in one]
    return groups[groups[:, 2] > 0]


def rows_of_shards(groups: npt.NDArray[np.int64], shards: int) -> list[int]:
    """Rows of each of so many shards, by the table of ``row_group_table``."""
    return [int(rows) for rows in np.bincount(groups[:, 0], groups[:, 2], shards)]
