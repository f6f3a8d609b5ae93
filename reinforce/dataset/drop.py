"""Deleting layers of a dataset, with their quarantine, index and entries in ``dataset.json``, and views.

A layer's files are deleted first, then its quarantine and its index, and last its entry. So an interrupted drop leaves
a layer that ``dataset.json`` still lists: a run of its config computes the deleted files again, a run of another config
is refused, and dropping it again deletes the rest. With the samples, the lists of their source files are deleted, so
that the next run reads the source as a first one does. The files of a single shard are set aside instead: a damaged
file may be the only copy.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from reinforce.dataset.codecs import codebooks
from reinforce.dataset.index import FOLDER, index_file, set_aside
from reinforce.dataset.kinds.registry import (
    KINDS,
    deletion_order,
    drop_command,
    find_kind,
    kind_of,
    with_dependants,
)
from reinforce.dataset.layers import MODEL_SECTIONS, SAMPLES, mapping_at, matches, model_of, parts_of
from reinforce.dataset.manifest import TUNED_KEY, find_manifest, write_manifest
from reinforce.dataset.store import LISTS, MANIFEST, Store
from reinforce.dataset.view import DESCRIPTION, read_view
from reinforce.errors import UserError
from reinforce.source.urls import FOLDER as VIEWS
from reinforce.terminal import format_bytes

_DELETED_AT_ONCE = 16  # requests in flight


@dataclass(frozen=True)
class DropPlan:
    """Files and entries that dropping some layers would delete.

    Attributes:
        url: of the dataset.
        sizes: for each layer, in the order of deletion, the bytes of its files and of its quarantine files.
        entries: for each teacher or captioner that loses its last layer, such as ``teachers.dfn2b``, its entry.
        dependants: other layers of the dataset that were computed from these.
        known: all layers of the dataset, with their entries in dataset.json.
        views: for each view, the bytes of its files.
        refused: lines on the views that stay, and that are refused without the layers.
        lists: with the samples, the bytes of the lists of their source files.
    """

    url: str
    sizes: Mapping[str, tuple[list[int], list[int]]]
    entries: Mapping[str, Mapping[str, Any]]
    dependants: list[str]
    known: Mapping[str, Mapping[str, Any]]
    views: Mapping[str, list[int]] = field(default_factory=dict)
    refused: Sequence[str] = ()
    lists: Sequence[int] = ()

    def lines(self) -> list[str]:
        lines = [f"{view}: {_describe_files(files)}" for view, files in self.views.items()]
        for layer, (files, quarantine) in self.sizes.items():
            text = f"{layer}: {_describe_files(files)}"
            lines.append(f"{text}, and {_describe_files(quarantine)} in its quarantine" if quarantine else text)
        for name, entry in self.entries.items():
            tuned = f" with the tuned logit scale {entry['logit_scale']:g}" if TUNED_KEY in entry else ""
            lines.append(f"{MANIFEST}: the entry {name}{tuned}")
        lines += [f"{LISTS}, which name the files or rows of each shard: {_describe_files(self.lists)}"] * bool(
            self.lists
        )
        every = [size for sizes in self.sizes.values() for part in sizes for size in part]
        every += [*self.lists, *(size for of in self.views.values() for size in of)]
        lines.append(f"in total: {_describe_files(every)}")
        lines += self.refused
        lines += [f"depends on this: {layer}" for layer in self.dependants]
        return lines

    def command(self) -> str:
        views = () if SAMPLES in self.sizes else self.views
        return " ".join([drop_command(self.url, [*self.sizes], self.known), *map(shlex.quote, views)])

    def check(self) -> None:
        """Raise UserError with the full command if other layers depend on these."""
        if not self.dependants:
            return
        command = drop_command(self.url, with_dependants(self.sizes, self.known), self.known)
        verb = "depend" if self.dependants[1:] else "depends"
        raise UserError(
            f"nothing was deleted: {', '.join(self.dependants)} {verb} on {', '.join(self.sizes)}. "
            f"Name them, too: {command}"
        )


def plan_drop(store: Store, patterns: Iterable[str]) -> DropPlan:
    """Find the layers and views that match any of some names or patterns, such as ``embeddings/dfn2b/*`` and
    ``views/best``. Deletes nothing.

    ``*`` matches any characters, ``/`` included. Raises UserError if there is no dataset, if nothing matches a pattern,
    and for a layer whose folder is a link.
    """
    manifest = find_manifest(store)
    listed = {name: entry for name, entry in (manifest or {}).get("layers", {}).items() if find_kind(name) is not None}
    stored = {
        name
        for name in layers_with_folders(store)
        if name not in listed and (store.shards(name) or store.shards(f"quarantine/{name}"))
    }
    known = {name: listed.get(name, {}) for name in sorted({*listed, *stored}, key=deletion_order)}
    if not known:
        raise UserError(f"{store.url} is not a reinforced dataset: it has no {MANIFEST} and no layers.")
    views = [f"{VIEWS}/{name}" for name in store.names(VIEWS, folders=True)]  # also what an interrupted drop has left
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in (*known, *views) if fnmatchcase(name, pattern)}
        if not fitting:
            raise UserError(f"{store.url} has no layer {pattern}; it has: {', '.join([*known, *views])}.")
        chosen |= fitting
    dropped = {}
    for view in (view for view in views if view in chosen):
        _check_links(store, [VIEWS], [view])
        with store.storage_errors("listed", view):
            files = store.fs.find(store.path(view), detail=True).values()
            dropped[view] = [int(info["size"]) for info in files]
    others = [view for view in views if view not in dropped]
    chosen -= {*dropped}
    names = sorted(chosen, key=deletion_order)
    for name in names:
        folders = [parts_of(name)[:depth] for depth in range(1, len(parts_of(name)) + 1)]
        _check_links(store, *folders, *(["quarantine", *folder] for folder in ([], *folders)))
    sizes = {
        name: (store.shards(name).sizes.tolist(), store.shards(f"quarantine/{name}").sizes.tolist()) for name in names
    }
    dependants = [name for name in with_dependants(names, known) if name not in chosen]
    if SAMPLES in chosen:  # without samples, no view can be made again
        dependants += others
    refused = []
    for view in others if SAMPLES not in chosen else ():
        with contextlib.suppress(UserError):  # it is refused already
            if needs := [name for name in read_view(store, view.removeprefix(f"{VIEWS}/")).inputs if name in chosen]:
                made = f"{view} was made from {', '.join(needs)}"
                refused.append(f"{made}: it stays, and is refused until a run computes the same again")
    lists: list[int] = []
    if SAMPLES in chosen:
        with store.storage_errors("listed", LISTS), contextlib.suppress(FileNotFoundError):
            lists = [int(info["size"]) for info in store.fs.find(store.path(LISTS), detail=True).values()]
    return DropPlan(store.url, sizes, _orphans(manifest or {}, chosen), dependants, known, dropped, refused, lists)


def layers_with_shard(store: Store, patterns: Iterable[str], shard: str) -> list[str]:
    """The layers by name or pattern, those that depend on others first, of which each has a file of the shard.

    Raises UserError if one has none. Files that are not named stay: the run that computes the shard again compares
    its rows with theirs.
    """
    layers = [*plan_drop(store, patterns).sizes]
    if not layers:
        raise UserError("--shard sets the files of layers aside. Name layers, or drop the view without --shard.")
    for layer in layers:
        if shard not in store.shards(layer):
            raise UserError(f"{store.url} has no file {layer}/{shard}.parquet.")
    return layers


def drop_shard(store: Store, layers: Collection[str], shard: str) -> list[str]:
    """Set aside the files of a shard in some layers; a local dataset is locked. Returns where they are now.

    Layers that are computed from these and have no file of the shard are no longer quarantined there: what has failed
    was of the files that are set aside.
    """
    with store.lock():
        places = [set_aside(store, layer, shard) for layer in layers]
        for layer in with_dependants(layers, mapping_at(find_manifest(store) or {}, "layers")):
            if layer not in layers and shard not in store.shards(layer):
                store.forget_quarantine(layer, shard)
        return places


def drop(store: Store, plan: DropPlan) -> None:
    """Delete what a plan names; a local dataset is locked. Raises UserError if layers that are not named depend on it.

    The files are listed again, so that nothing is left of what a run wrote in the meantime.
    """
    plan.check()
    with store.lock():
        for view in plan.views:
            store.remove(view, DESCRIPTION)  # first, then what it describes, and the remains of a selection
            with store.storage_errors("removed", view):
                store.fs.rm(store.path(view), recursive=True)
            _delete_empty_folders(store, VIEWS)
        for layer in plan.sizes:
            _delete_files(store, layer)
            _delete_files(store, "quarantine", layer)
            store.remove(FOLDER, index_file(layer))
            _delete_empty_folders(store, FOLDER)
            codebook = codebooks.path_of(layer)
            store.remove(*codebook)
            _delete_empty_folders(store, posixpath.dirname(posixpath.join(*codebook)))
            if layer == SAMPLES:
                # The newest first: those that an interruption leaves are of a source that has grown since.
                for name in reversed(store.names(LISTS)):
                    store.remove(LISTS, name)
                _delete_empty_folders(store, LISTS)
            _remove_entry(store, layer)


def _describe_files(sizes: Collection[int]) -> str:
    return f"{len(sizes):,} {'file' if len(sizes) == 1 else 'files'} ({format_bytes(sum(sizes))})"


def layers_with_folders(store: Store) -> set[str]:
    """Names of the layers that have a folder, or one in the quarantine."""
    names = set()
    for root in ((), ("quarantine",)):
        above: list[tuple[str, ...]] = [()]
        while above:
            parts = above.pop()
            for folder in store.names(*root, *parts, folders=True):
                name = "/".join((*parts, folder))
                if find_kind(name) is not None:
                    names.add(name)
                elif any(
                    matches(name, "/".join(parts_of(kind.pattern)[: len(parts) + 1])) for kind in KINDS.values()
                ):  # layers may be below it
                    above.append((*parts, folder))
    return names


def _orphans(manifest: Mapping[str, Any], dropped: Collection[str]) -> dict[str, Mapping[str, Any]]:
    """Entries of the teachers and captioners of ``dropped`` layers that have no other layer, by dotted key."""
    owner = {name: (kind_of(name).section or "", model_of(name)) for name in {*manifest.get("layers", {}), *dropped}}
    kept = {owner[name] for name in manifest.get("layers", {}) if name not in dropped}
    owners = sorted({owner[name] for name in dropped} - kept)
    return {f"{kind}.{name}": manifest[kind][name] for kind, name in owners if name in manifest.get(kind, {})}


def _check_links(store: Store, *folders: Sequence[str]) -> None:
    """Raise UserError if one of the folders of a layer or view is a link: the files in it belong to others."""
    for path in (store.path(*folder) for folder in folders if store.local):
        if os.path.islink(path):
            raise UserError(
                f"{path} is a link to {os.path.realpath(path)}, and the files there may belong to another dataset. "
                "Nothing was deleted. Remove the link, and drop the layer again."
            )


def _delete_files(store: Store, *parts: str) -> None:
    """Delete the Parquet files of a folder, and the folder and its parents if they are empty then."""
    folder = posixpath.join(*parts)
    pool = ThreadPoolExecutor(_DELETED_AT_ONCE)
    try:
        list(pool.map(lambda shard: store.remove(folder, f"{shard}.parquet"), store.shards(folder)))
    finally:
        pool.shutdown(cancel_futures=True)
    _delete_empty_folders(store, folder)


def _delete_empty_folders(store: Store, folder: str) -> None:
    """Delete a local folder and its parents in the dataset, if they are empty."""
    while store.local and folder:
        with contextlib.suppress(OSError):  # it has other files, or does not exist
            os.rmdir(store.path(folder))
        folder = posixpath.dirname(folder)


def _remove_entry(store: Store, layer: str) -> None:
    """Remove a layer from ``dataset.json``, with the entry of its model if that has no other layer."""
    manifest = find_manifest(store)
    if manifest is None:
        return
    orphans = _orphans(manifest, [layer])
    for kind in MODEL_SECTIONS:
        manifest[kind] = {name: entry for name, entry in manifest[kind].items() if f"{kind}.{name}" not in orphans}
    manifest["layers"].pop(layer, None)
    if manifest["layers"]:
        write_manifest(store, manifest)
    else:
        with store.storage_errors("removed", MANIFEST):
            store.fs.rm_file(store.path(MANIFEST))
