"""Other datasets whose images must not be in a selection: their vectors by the same teacher.

What is no reinforced dataset, such as the shards of an evaluation, becomes one by the config of the dataset's run, with
this teacher alone. It is kept in ``views/<name>/references``, so that it is embedded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from reinforce.config import Config, load_config
from reinforce.dataset.aligned import AlignedLayers, check_completeness
from reinforce.dataset.layers import SAMPLES, embeddings_layer, mapping_at
from reinforce.dataset.manifest import find_manifest, read_manifest
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.explore import neighbours
from reinforce.explore.config import Decontaminate
from reinforce.explore.parts import Arrays, Parts, content_digest
from reinforce.processes.attempts import prefetch
from reinforce.source.config import Input
from reinforce.source.urls import canonical
from reinforce.terminal import plural
from teachers.redact import redact

#: The folder of a view with datasets that were made of its references.
REFERENCES = "references"
_READ_AT_ONCE = 8  # shards


@dataclass(frozen=True)
class OtherDataset:
    """A dataset, with its teacher's layer and the fingerprints of what is read of it; ``contents`` are digests of what
    is read of each shard."""

    url: str
    layer: str
    fingerprints: Mapping[str, str]
    shards: Sequence[str]
    contents: Sequence[int]

    def written(self) -> dict[str, str]:
        """The entry of a view for it."""
        named = (f"{shard} {content:016x}" for shard, content in zip(self.shards, self.contents, strict=True))
        shards = hashlib.blake2b("\0".join(named).encode(), digest_size=8).hexdigest()
        return {"fingerprint": self.fingerprints[self.layer], "shards": shards}


#: Runs a config: ``reinforce.engine.run.run``, which this package does not import.
Reinforce = Callable[[Config], object]


def find_datasets(
    spec: Decontaminate, manifest: Mapping[str, Any], view: str, reinforce: Reinforce | None
) -> dict[str, OtherDataset]:
    """The datasets of a rule by URL; ``view`` is the URL of the folder of the view.

    Raises UserError if one cannot be compared with a dataset of this manifest.
    """
    embedded = {url: _embedded(url, spec, view, reinforce) for url in spec.against}
    return {redact(url): _find(found, spec.teacher, manifest) for url, found in embedded.items()}


def _is_dataset(url: str) -> bool:
    store = Store(url)
    is_pattern = store.url.endswith((".tar", ".parquet")) or "{" in url or "*" in url
    return not is_pattern and find_manifest(store) is not None


def _embedded(url: str, spec: Decontaminate, view: str, reinforce: Reinforce | None) -> str:
    """The URL of a dataset: ``url``, or if it is none, what a run makes of it. Raises UserError."""
    if spec.config is None or reinforce is None or _is_dataset(url):
        return url
    run = load_config(spec.config)
    models = [name for name, model in run.teachers.items() if not model.published]
    if spec.teacher not in models:
        known = ", ".join(models) or "none"
        raise UserError(f"decontaminate.config: {spec.config} has no model of teacher {spec.teacher}. It has: {known}.")
    digest = hashlib.blake2b(f"{canonical(url)}\0{spec.teacher}".encode(), digest_size=8).hexdigest()
    images = Input(captions=[], metadata="none", limits=run.input.limits, reduce_to=run.input.reduce_to)
    changes = {
        "source": url, "output": f"{view}/{REFERENCES}/{digest}", "input": images, "images": "embed", "moved": {},
        "reinforcements": None, "join": None, "labels": {},  # published augmentations are of other images
    }  # fmt: skip
    alone = run.with_models({"teachers": {spec.teacher: run.teachers[spec.teacher]}})
    reinforce(alone.model_copy(update=changes))
    return str(changes["output"])


def _find(url: str, teacher: str, manifest: Mapping[str, Any]) -> OtherDataset:
    store = Store(url)
    # Whether a run has computed the vectors of a model or has taken them from labels makes no difference.
    model = {**mapping_at(manifest, "teachers", teacher, "model"), "labels": None}
    recipe = f"with the teacher {teacher}, and the `augmentations` and the image policy of this dataset"
    if model.get("family") == "published":  # no run computes it
        recipe = f"with the published vectors of {teacher}, and the image policy of this dataset"
    if not _is_dataset(url):
        raise UserError(
            f"against: {store.url} is not a reinforced dataset. Run `reinforce run` on its images {recipe}, and name "
            "the output; or set `config` to the config of this dataset's run, by which its images are embedded."
        )
    other = read_manifest(store)
    teachers = {name: mapping_at(other, "teachers", name, "model") for name in other["teachers"]}
    names = [name for name, identity in teachers.items() if {**identity, "labels": None} == model]
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
    digest = partial(content_digest, store, {found[0]: None, SAMPLES: ["key"]})
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        contents = [*prefetch(pool, digest, completeness.complete, 2 * _READ_AT_ONCE)]
    there = store.root if store.relative else url  # workers of a cluster have another working folder
    return OtherDataset(there, found[0], fingerprints, completeness.complete, contents)


def _policy(manifest: Mapping[str, Any], name: str) -> Any:
    """The crop policy: an entry of dataset.json, without the number of crops and their origin."""
    *parents, last = name.split(".")
    found = mapping_at(manifest, *parents).get(last) if parents else manifest.get(last)
    if not isinstance(found, Mapping):
        return found
    return {key: value for key, value in found.items() if key not in ("count", "labels")}


def read_reference(parts: Parts, stage: str, number: int, datasets: Sequence[OtherDataset]) -> Arrays:
    """Read the vectors of datasets [N, D], and save them in ``stage``.

    Counts images without one [datasets]: rows that are ``null``, samples that are ``refused`` and so have no row, and
    quarantined ``shards``.
    """
    found = []
    counts = {name: np.zeros(len(datasets), np.int64) for name in ("null", "refused", "shards")}
    for place, dataset in enumerate(datasets):
        store = Store(dataset.url)
        layers = AlignedLayers(store, dataset.fingerprints, {SAMPLES: ["key"]})
        quarantine = store.listings(f"quarantine/{layer}" for layer in (SAMPLES, dataset.layer))
        keys: dict[str, set[str]] = {}  # of shards with quarantined samples
        for shard in dataset.shards:
            with layers.open(shard) as files:
                for index in range(files.row_groups):
                    vectors, valid = neighbours.mean_vectors(files.read_unchecked(dataset.layer, index))
                    found.append(vectors[valid])
                    counts["null"][place] += np.count_nonzero(~valid)
                    if shard in quarantine[f"quarantine/{SAMPLES}"]:
                        keys.setdefault(shard, set()).update(files.read_unchecked(SAMPLES, index)["key"].to_pylist())
        quarantined = set()
        for layer in (SAMPLES, dataset.layer):
            for shard, rows in store.quarantined_rows(layer, quarantine[f"quarantine/{layer}"]):
                if any(row["key"] is None for row in rows):
                    quarantined.add(shard)
                if layer == SAMPLES:  # those of the other layer have a row that is null
                    counts["refused"][place] += len({row["key"] for row in rows} - {None} - keys.get(shard, set()))
        counts["shards"][place] = len(quarantined)
    vectors = np.concatenate(found)
    if not len(vectors):
        names = ", ".join(redact(one.url) for one in datasets)
        raise UserError(f"against: {names} has no embeddings of images. Name datasets that have some.")
    parts.save(stage, number, {"vectors": vectors})
    return {"vectors": np.array(len(vectors)), **counts}


def check_found(
    spec: Decontaminate, label: str, datasets: Mapping[str, OtherDataset], counts: Arrays
) -> tuple[int, int]:
    """The vectors of a rule's datasets, and their images without one. Raises UserError if these are not accepted."""
    lines, missing = [], 0
    for place, (url, dataset) in enumerate(datasets.items()):
        null, refused, shards = (int(counts[name][place]) for name in ("null", "refused", "shards"))
        parts = {f"{null:,} null in {dataset.layer}": null, f"{refused:,} refused in {SAMPLES}": refused}
        parts[plural(shards, "quarantined shard")] = shards
        if named := [text for text, count in parts.items() if count]:
            lines.append(f"{url} has {', '.join(named)}")
        missing += null + refused + shards
    if missing > (spec.without_vectors or 0):
        raise UserError(
            f"rule {label}: samples with the images that have no vector would be kept: {'; '.join(lines)}. "
            "`reinforce status` shows why. Name datasets in which every image has a vector, or accept this by "
            f"`without_vectors: {missing}`."
        )
    return int(counts["vectors"]), missing
