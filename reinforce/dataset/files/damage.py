"""Layer files that are not what a run has committed: found by their sizes, and set aside.

A listing has the sizes of all files, and the index those that were committed, so looking for damage costs one request
for each layer. Only a file whose size differs is opened. If its footer can be read, and is of the source of the
samples, it was replaced by a complete file, and counts. A file that was set aside is no layer file any more: a run
computes it again.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from reinforce.dataset.files.index import LayerIndex, read_index
from reinforce.dataset.files.layer_file import RefusedFile
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.origin import other_origin
from reinforce.dataset.files.store import QUARANTINE, DamagedFile, Store, parse_footer
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import SAMPLES
from reinforce.terminal import first_lines

SET_ASIDE = "set-aside"
MIN_BYTES = 12  # of a Parquet file
_THREADS = 16
_NAMED = 3


def find_damaged(
    store: Store,
    listings: Mapping[str, Listing],
    fingerprints: Mapping[str, str],
    indexes: Mapping[str, LayerIndex] | None = None,
) -> list[DamagedFile]:
    """Files of listings by layer (``Store.listings``) that are damaged, by their sizes and those in the indexes.

    Indexes that are not given are read.
    """

    def suspects(layer: str) -> list[tuple[str, str]]:
        listing = listings[layer]
        names = {*listing.only(listing.sizes < MIN_BYTES)}
        if listing:
            index = read_index(store, layer, fingerprints[layer]) if indexes is None else indexes[layer]
            names.update(index.differing(listing))
        return [(layer, shard) for shard in sorted(names)]

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [suspect for of_layer in pool.map(suspects, listings) for suspect in of_layer]
        reasons = pool.map(lambda one: footer_damage(store, *one), found)
        return [DamagedFile(*one, reason) for one, reason in zip(found, reasons, strict=True) if reason is not None]


def without_files(listings: Mapping[str, Listing], files: Sequence[DamagedFile]) -> dict[str, Listing]:
    names: dict[str, list[str]] = {}
    for file in files:
        names.setdefault(file.layer, []).append(file.shard)
    return {**listings, **{layer: listings[layer].without(shards) for layer, shards in names.items()}}


def footer_damage(store: Store, layer: str, shard: str) -> str | None:
    """Why a file cannot be one of its shard, by its footer; None if it can. Raises what the storage raises."""
    try:
        with store.open_layer(layer, shard, whole=False) as file:
            rows, footer = file.metadata.num_rows, parse_footer(file.metadata)
    except RefusedFile as error:
        return str(error)
    if (stored := footer.get("rows")) not in (None, str(rows)):
        return f"its footer states {stored[:20]} rows, its row groups {rows:,}"
    opened = store.open_layer(SAMPLES, shard, whole=False)
    with contextlib.suppress(RefusedFile, FileNotFoundError), opened as samples:  # damaged samples are found themselves
        return other_origin(parse_footer(samples.metadata), footer)
    return None


def check_columns(layer: str, table: pa.Table) -> None:
    """Raise RefusedFile if rows of a layer's file lack columns."""
    if missing := {*kind_of(layer).columns} - {*table.column_names}:
        raise RefusedFile(f"it has no column {', '.join(sorted(missing))}")


def file_damage(store: Store, layer: str, shard: str) -> str | None:
    """Why a file cannot be read, None if all of it can. Raises what the storage raises."""
    try:
        with store.open_layer(layer, shard) as file:
            for number in range(file.num_row_groups):
                check_columns(layer, file.read_row_group(number))
    except RefusedFile as error:
        return str(error)
    return None


def set_aside(store: Store, layer: str, shard: str) -> str:
    """Move a file to a name that no reader looks at, below ``set-aside``; returns the new path. Raises StorageError.

    The refused rows of its quarantine are forgotten: whoever computes the file again writes them again. The layer of a
    quarantine file is that of the rows after ``quarantine/``.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    target = store.path(SET_ASIDE, layer, f"{shard}.{now:%Y%m%dT%H%M%S.%fZ}.parquet")
    with store.storage_errors("moved", layer, f"{shard}.parquet"):
        if store.local:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(store.layer_path(layer, shard), target)
        else:
            store.fs.mv(store.layer_path(layer, shard), target)
    if not layer.startswith(QUARANTINE):
        store.forget_quarantine(layer, shard)
    return target


def drop_shard_command(url: str, layers: Sequence[str], shard: str) -> str:
    """The command that shows the files of a shard in some layers, and with ``--yes`` sets them aside."""
    return shlex.join(["reinforce", "drop", url, *layers, "--shard", shard])


def compute_again(url: str, layer: str, shard: str) -> str:
    """The sentence with the command that computes a layer's file of a shard again."""
    return f"To compute it again: {drop_shard_command(url, [layer], shard)} --yes, and run again."


def describe_damaged(url: str, files: Sequence[DamagedFile]) -> str:
    """The damaged files and what to do, as a line without its full stop; empty if there are none."""
    if not files:
        return ""
    what, them = ("1 file is damaged", "it") if len(files) == 1 else (f"{len(files):,} files are damaged", "them")
    layer, shard = files[0].layer, files[0].shard
    named = "; ".join(first_lines([file.line() for file in files], _NAMED))
    if layer.startswith(QUARANTINE):
        command = shlex.join(["reinforce", "validate", url, "--repair"])
    else:
        command = f"{drop_shard_command(url, [layer], shard)} --yes"
    return (
        f"{what} ({named}). `reinforce run` with the dataset's config sets {them} "
        f"aside and computes {them} again; to set one aside before: {command}"
    )


def set_aside_notes(files: Sequence[str]) -> list[str]:
    """A line of a run's summary about the files that it has set aside, each given with its reason."""
    if not files:
        return []
    what = "1 file was" if len(files) == 1 else f"{len(files):,} files were"
    named = "; ".join(first_lines(files, _NAMED))
    return [f"{what} damaged or did not fit, moved to {SET_ASIDE}/ to be computed again: {named}"]
