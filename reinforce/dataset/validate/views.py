"""The views of a dataset: their files, and whether these have the rows of the samples and the counts of the view."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading.aligned import AlignedLayers
from reinforce.dataset.validate.findings import Finding
from reinforce.dataset.view import View, read_views
from reinforce.errors import StorageError, UserError

_THREADS = 16


def check_views(
    store: Store, manifest: Mapping[str, Any], shards: Listing, chosen: Collection[str]
) -> tuple[list[Finding], list[str]]:
    """Problems of the files of views, and lines about views that are refused because their inputs have changed.

    ``shards`` are those of the samples, of which the files of the ``chosen`` ones are read.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    for name, view in read_views(store):
        if isinstance(view, UserError):
            findings.append(Finding("view", str(view), f"views/{name}"))
            continue
        if changes := view.changes(store, manifest):
            notes.append(f"view {name} is refused: {'; '.join(changes)}. Make it again with reinforce select.")
            continue
        if lost := [shard for shard in view.counts if shard not in shards]:
            message = f"{store.url}: view {name} has {len(lost):,} shards without samples, such as {lost[0]}"
            findings.append(Finding("view", message, f"views/{name}"))
        findings += _check_files(store, manifest, view, [shard for shard in chosen if shard in view.counts])
    return findings, notes


def _check_files(store: Store, manifest: Mapping[str, Any], view: View, shards: Collection[str]) -> Iterator[Finding]:
    fingerprints = {SAMPLES: manifest["layers"][SAMPLES]["fingerprint"]}
    aligned = AlignedLayers(store, fingerprints, {SAMPLES: ["key"]}, view=view.rows)

    def check(shard: str) -> str | None:
        try:
            with aligned.open(shard, whole=False) as files:
                kept = [files.row_group(number).samples.num_rows for number in range(files.row_groups)]
        except StorageError:
            raise
        except UserError as error:
            return str(error)
        if kept == list(view.kept[shard]):
            return None
        return f"{store.url}: view {view.name} keeps other rows of {shard} than it states. Make it again."

    with ThreadPoolExecutor(_THREADS) as pool:
        for shard, message in zip(shards, pool.map(check, shards), strict=True):
            if message is not None:
                yield Finding("view", message, f"views/{view.name}", shard)
