"""Other datasets whose images must not be in a selection: their vectors by the same teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES, embeddings_layer, mapping_at
from reinforce.dataset.manifest.manifest import find_manifest
from reinforce.dataset.reading.aligned import AlignedLayers
from reinforce.dataset.reading.completeness import check_completeness
from reinforce.errors import UserError
from reinforce.selection import neighbours
from reinforce.selection.parts import Arrays, Parts
from reinforce.selection.rules import BoundRule
from teachers.redact import redact


@dataclass(frozen=True)
class OtherDataset:
    """A dataset, with its teacher's layer and the fingerprints of what is read of it."""

    url: str
    layer: str
    fingerprints: Mapping[str, str]
    shards: Sequence[str]

    def written(self) -> dict[str, str]:
        """What a view states of it."""
        shards = hashlib.blake2b("\0".join(self.shards).encode(), digest_size=8).hexdigest()
        return {"fingerprint": self.fingerprints[self.layer], "shards": shards}


def find_datasets(rule: BoundRule, manifest: Mapping[str, Any]) -> dict[str, OtherDataset]:
    """The datasets of a rule by URL. Raises UserError if one cannot be compared with a dataset of this manifest."""
    spec = rule.spec.decontaminate
    assert spec is not None
    return {redact(url): _find(url, spec.teacher, manifest) for url in spec.against}


def _find(url: str, teacher: str, manifest: Mapping[str, Any]) -> OtherDataset:
    store = Store(url)
    model = mapping_at(manifest, "teachers", teacher, "model")
    recipe = f"with the teacher {teacher}, and the `augmentations` and the image policy of this dataset"
    other = None if store.url.endswith((".tar", ".parquet")) or "{" in url or "*" in url else find_manifest(store)
    if other is None:
        raise UserError(
            f"against: {store.url} is not a reinforced dataset. Run `reinforce run` on its images {recipe}, and name "
            "the output."
        )
    names = [name for name, entry in other["teachers"].items() if entry.get("model") == model]
    layers = [embeddings_layer(name, "images") for name in names]
    found = [layer for layer in layers if layer in other["layers"]]
    differing = [
        name
        for name in ("augmentations", "policies.image", "policies.augmentation")
        if _policy(manifest, name) != _policy(other, name)
    ]
    if not found:
        raise UserError(f"against: {store.url} has no images by the model of {teacher}. Reinforce it {recipe}.")
    if differing:
        raise UserError(f"against: {store.url} has other {', '.join(differing)}. Reinforce it {recipe}.")
    fingerprints = {name: str(other["layers"][name]["fingerprint"]) for name in (SAMPLES, found[0])}
    completeness = check_completeness(store, store.listings(fingerprints))
    if completeness.missing or not completeness.complete:
        lacking = completeness.describe_missing() or "it has no shards"
        raise UserError(f"against: {store.url}: {lacking}. Finish its run before you select.")
    return OtherDataset(url, found[0], fingerprints, completeness.complete)


def _policy(manifest: Mapping[str, Any], name: str) -> Any:
    """What decides about crops: an entry of dataset.json, without the number of crops."""
    *parents, last = name.split(".")
    found = mapping_at(manifest, *parents).get(last) if parents else manifest.get(last)
    return {key: value for key, value in found.items() if key != "count"} if isinstance(found, Mapping) else found


@dataclass(frozen=True)
class ReadReference:
    """Reads the vectors of datasets [N, D], and saves them in ``stage``."""

    parts: Parts
    stage: str

    def __call__(self, number: int, datasets: Sequence[OtherDataset]) -> Arrays:
        found = []
        for dataset in datasets:
            layers = AlignedLayers(Store(dataset.url), dataset.fingerprints, {SAMPLES: ["key"]})
            for shard in dataset.shards:
                with layers.open(shard) as files:
                    for index in range(files.row_groups):
                        vectors, valid = neighbours.mean_vectors(files.read_unchecked(dataset.layer, index))
                        found.append(vectors[valid])
        vectors = np.concatenate(found)
        if not len(vectors):
            names = ", ".join(redact(one.url) for one in datasets)
            raise UserError(f"against: {names} has no vectors. Name datasets with images.")
        self.parts.save(self.stage, number, {"vectors": vectors})
        return {"vectors": np.array(len(vectors))}
