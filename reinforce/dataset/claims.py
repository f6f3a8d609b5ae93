"""Claims on the recipes of layers that ``dataset.json`` does not list yet: ``claims/<layer>.json``.

A run lists its layers in dataset.json once its models are loaded. Until then a claim prevents a run of another config
from starting. Only one of several runs can create a claim; the others compare their recipes with it. Runs of one config
share it. There is one claim for each layer, so runs that add different layers can start at the same time.

- A run takes its claims before it writes anything, then reads dataset.json once more, because another run may have
  written it in between. It does both again just before it writes dataset.json, and then removes its claims.
- A claim of a run that was killed expires. On a local disk, which is locked for the run, it does so at once.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from reinforce.dataset.layers import Layer, mapping_at
from reinforce.dataset.manifest import (
    check_loaded,
    check_recipes,
    difference_lines,
    find_manifest,
    update_manifest,
    write_manifest,
)
from reinforce.dataset.store import Store
from reinforce.errors import StorageError, UserError
from reinforce.storage import ClaimFile

if TYPE_CHECKING:
    from reinforce.config import Config

FOLDER = "claims"
MIN_SECONDS = 3600.0  # after which a claim expires, or twice workers.start_timeout
_THREADS = 8


class Claims:
    """The claims of one run on the ``layers`` of a config. A context manager takes and removes them."""

    def __init__(self, store: Store, config: Config, layers: Mapping[str, Layer]) -> None:
        self.store, self.config, self.layers = store, config, layers
        self.seconds = max(MIN_SECONDS, 2 * config.workers.start_timeout)
        self.token = uuid.uuid4().hex
        self._owned: set[str] = set()
        self._shared: set[str] = set()  # of other runs of this config
        self._manifest: dict[str, Any] = {}
        self._published: dict[str, Any] | None = None  # what this run has written as dataset.json

    def take(self) -> None:
        """Claim the layers that dataset.json does not list. Raises UserError if dataset.json lists a layer with another
        recipe, or another run has claimed it with another recipe. What it has claimed is given back if it raises."""
        manifest = find_manifest(self.store)
        unlisted = [name for name in self.layers if name not in (manifest or {}).get("layers", {})]
        self._manifest = update_manifest(manifest, self.config, self.layers, {})
        before = {*self._owned}
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                found = dict(zip(unlisted, pool.map(self._claim, unlisted), strict=True))
            if others := {name: claim for name, claim in found.items() if claim is not None}:
                first = next(iter(others.values()))
                minutes = max(0.0, time.time() - float(first["time"])) / 60
                fingerprints = {name: str(claim.get("fingerprint")) for name, claim in others.items()}
                manifests = {name: mapping_at(claim, "manifest") for name, claim in others.items()}
                lines = [
                    f"another run writes to {self.store.url} with another config: pid {first.get('pid')} on "
                    f"{first.get('host')}, which started {minutes:.0f} minutes ago. The results would be mixed:",
                    *difference_lines(manifests, self.layers, fingerprints, "that run"),
                    f"Use its config, or write to another `output`. If it is not running any more, delete "
                    f"{self.store.url}/{FOLDER}, or wait: claims end {self.seconds / 60:.0f} minutes after the start "
                    "of a run that was killed.",
                ]
                raise UserError("\n".join(lines))
            manifest = find_manifest(self.store)
            listed = (manifest or {}).get("layers", {})
            stored = {name: listed[name]["fingerprint"] for name in self.layers if name in listed}
            check_recipes(self.store, manifest, self.layers, stored)
        except BaseException:
            self.release({*unlisted} - before)  # also one that was stored although its put has failed
            raise

    def publish(self, loaded: Mapping[tuple[str, str], Mapping[str, Any]], computed: Collection[str]) -> None:
        """Write dataset.json, with arguments as of ``update_manifest``, and remove the claims. Raises UserError as
        ``take`` and ``check_loaded``."""
        self.take()
        found = find_manifest(self.store) or self._published
        check_loaded(self.store, found, self.layers, loaded)
        self._published = update_manifest(found, self.config, self.layers, loaded, computed)
        write_manifest(self.store, self._published)
        for name in self._shared:  # dataset.json replaces them; a run that was killed does not remove its own
            with contextlib.suppress(StorageError):
                self.store.remove(*self._file(name).path)
        self.release()

    @property
    def is_published(self) -> bool:
        """Whether dataset.json lists the layers. Raises UserError if it is damaged."""
        return self.layers.keys() <= mapping_at(find_manifest(self.store) or {}, "layers").keys()

    def release(self, names: Collection[str] | None = None) -> None:
        """Remove the claims that this run has created, or those on some layers."""
        names = {*self._owned} if names is None else names
        for name in sorted(names):
            self._file(name).release()
        self._owned.difference_update(names)
        if self.store.local:
            with contextlib.suppress(OSError):
                os.rmdir(self.store.path(FOLDER))

    def __enter__(self) -> Claims:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _claim(self, name: str) -> dict[str, Any] | None:
        """Claim a layer -> the claim of another recipe, or None."""
        fingerprint = self.layers[name].fingerprint
        found = self._file(name).take(lambda claim: claim.get("fingerprint") == fingerprint)
        if found.get("token") != self.token and found.get("fingerprint") != fingerprint:
            return found
        (self._owned if found.get("token") == self.token else self._shared).add(name)
        return None

    def _file(self, name: str) -> ClaimFile:
        content = {"layer": name, "fingerprint": self.layers[name].fingerprint, "manifest": self._manifest}
        path = FOLDER, f"{name.replace('/', '@')}.json"
        # On a local disk this run has the lock of the dataset, so that no other on this machine has a claim.
        return ClaimFile(self.store, path, self.token, self.seconds, lambda claim: self.store.local, content)
