"""Opening the datasets of a training run: their layers and row counts.

Missing layers and shards, damaged files and datasets that do not fit together are reported before the first step.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from reinforce.dataset.aligned import AlignedLayers, check_completeness, kept_rows, row_group_table
from reinforce.dataset.index import describe_damaged, find_damaged, read_index
from reinforce.dataset.kinds.registry import kind_of, owner_of
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, inputs_of, model_of, require_images
from reinforce.dataset.manifest import read_manifest, select_names
from reinforce.dataset.sample import ImagePolicies
from reinforce.dataset.store import Store
from reinforce.dataset.view import View, open_view
from reinforce.errors import UserError
from reinforce.evaluation.reading import is_in_json, read_captions
from reinforce.images.backends import load_backend
from reinforce.images.device_records import DEVICE_BACKEND
from reinforce.source.config import Limits
from reinforce.source.references import ImageRoots
from reinforce.student.config import Data, Source
from reinforce.student.data.examples import ExampleSpec
from reinforce.student.data.stream import StreamedDataset, TargetShape
from reinforce.student.teachers import captioner_names
from reinforce.terminal import plural

_LOG = logging.getLogger(__name__)
#: Names of models by their section in dataset.json; None: all of them.
Models: TypeAlias = "Mapping[str, Sequence[str] | None]"
#: Shards that are opened in all layers before the training run; the others are checked when they are read.
_CHECKED_SHARDS = 16
#: Shards of datasets of which the unusable rows are found, and left out, when they are opened.
COUNTED_SHARDS = 64


def open_datasets(
    data: Data, seed: int, models: Models | None = None, leave_out: bool = False
) -> list[StreamedDataset]:
    """Open the datasets of a training run; ``models`` are those whose targets are read, by default ``data.teachers``.

    With ``leave_out``, datasets of few shards are without the rows that lack what an example takes: otherwise others
    replace these when they are read, of which small datasets have too few to be apart.
    Raises UserError if something is missing, damaged or does not fit together.
    """
    wanted = {"teachers": data.teachers} if models is None else models
    datasets = [_open_dataset(source, data, seed, wanted) for source in data.datasets]
    first = datasets[0]
    for other in datasets[1:]:
        if (other.targets, other.spec.kinds) != (first.targets, first.spec.kinds):
            raise UserError(
                f"{first.url} and {other.url} give different examples: {_describe(first)}; {_describe(other)}. "
                "Name models that they share under `data`."
            )
    if leave_out:
        return [one if len(one.shards) > COUNTED_SHARDS else one.leave_out_unusable() for one in datasets]
    return datasets


def _open_dataset(source: Source, data: Data, seed: int, models: Models) -> StreamedDataset:
    url = source.url
    store = Store(url)
    manifest = read_manifest(store)
    require_images(manifest, url)
    policies = ImagePolicies.from_manifest(manifest, url)
    policies.check()
    policies = replace(policies, augmentation=data.backend or policies.augmentation)
    if policies.augmentation != DEVICE_BACKEND:
        load_backend(policies.augmentation)  # loader processes use it; here an error is reported before the first step
    layers = manifest["layers"]
    crops, texts = _layers_of(models, url, manifest)
    parallel = data.parallel or {}
    select_names(url, "captioners", [name for name in parallel if not is_in_json(name)], manifest)  # raises UserError
    captioners = [*captioner_names(data, url, manifest), *parallel]
    if data.images == "none":
        crops = ()
    weights = {**(data.captioners or {}), **parallel}  # by name, else by the first pattern that a name matches
    spec = ExampleSpec(
        crops=crops,
        texts=texts,
        captioners={
            name: weights.get(name, next((one for key, one in weights.items() if fnmatchcase(name, key)), 1.0))
            for name in captioners
        },
        captions=data.captions,
        synthetic=data.synthetic,
        pick=data.pick,
        seed=seed,
        several=bool(layers[SAMPLES].get("count")),
        parallel=frozenset(parallel),
        images=data.images != "none",
    )
    columns = spec.columns(manifest["images"])
    for layer in columns:
        if layer not in layers:
            raise UserError(
                f"{url} has no layer {layer}. Run a config with both models on it, or leave one out under `data`."
            )
    fingerprints = {layer: layers[layer]["fingerprint"] for layer in columns}
    view = None if source.view is None else open_view(store, manifest, source.view)
    rows = None if view is None else view.rows
    aligned = AlignedLayers(store, fingerprints, columns, manifest.get("moved", {}), rows)
    sizes, groups = samples_groups(store, fingerprints, view)
    shards = tuple(sizes)
    roots = ImageRoots.named(data.images_from or (), 'data.images_from: ["{}"]', policies.limits.image_bytes)
    _check_some_shards(aligned, shards, roots if manifest["images"] == "reference" and spec.images else None)
    _check_fields(aligned, shards[0], data)
    if unfinished := [layer for layer, _ in spec.targets if layers[layer].get("dim", 0) is None]:
        raise UserError(f"{url}: dataset.json has no dimension of {unfinished[0]}. Finish the run.")
    targets = tuple(
        TargetShape(model_of(layer), tensor.name or of, *tensor[1:])
        for layer, of in spec.targets
        for tensor in kind_of(layer).target_tensors(layers[layer])
    )
    size = manifest["augmentations"]["size"]
    files = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
    return StreamedDataset(url, source.weight, aligned, spec, targets, policies, size, shards, groups, roots, files)


def _check_fields(aligned: AlignedLayers, shard: str, data: Data) -> None:
    """Raise UserError if no row of the first row group has texts at a field of ``data.parallel``."""
    for field in filter(is_in_json, data.parallel or ()):
        with replace(
            aligned, columns={SAMPLES: ("key", "metadata")}, fingerprints={SAMPLES: aligned.fingerprints[SAMPLES]}
        ).open(shard, whole=False) as layers:
            rows = layers.row_group(0).samples["metadata"].to_pylist() if layers.row_groups else []
        if rows and not any(read_captions({"json": (row or "{}").encode()}, [field], Limits()) for row in rows):
            known = dict.fromkeys(key for row in rows for key in json.loads(row or "{}"))
            raise UserError(
                f"data.parallel: the first {len(rows):,} samples of {aligned.store.url} have no text at {field}; their "
                f"metadata has {', '.join(known) or 'nothing'}. It is kept by input.metadata of the run."
            )


def _layers_of(models: Models, url: str, manifest: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers with targets of the crop, and the models with targets of the texts. Raises UserError."""
    crops, texts = [], []
    for section, names in models.items():
        for model in select_names(url, owner_of(section), names, manifest):
            of_model = [layer for layer in manifest["layers"] if model_of(layer) == model]
            own = [layer for layer in of_model if kind_of(layer).target_section == section]
            crops += [layer for layer in own if kind_of(layer).picks == "crop"]
            if any(kind_of(layer).picks == "text" and inputs_of(layer) == TRUE_CAPTION for layer in own):
                texts.append(model)
    return tuple(crops), tuple(texts)


def samples_groups(
    store: Store, fingerprints: Mapping[str, str], view: View | None
) -> tuple[dict[str, int], npt.NDArray[np.int64]]:
    """The complete shards with the bytes of their samples, and their row groups [n, 3]: number of the shard, place in
    its file, and rows, of which those are counted that a view keeps. Raises UserError as ``open_datasets``.
    """
    listings = store.listings(fingerprints)
    if damaged := find_damaged(store, listings, fingerprints):
        raise UserError(f"{store.url}: {describe_damaged(store.url, damaged)}.")
    committed = read_index(store, SAMPLES, fingerprints[SAMPLES]).listing()
    found = check_completeness(store, listings, [committed])
    if found.missing:
        raise UserError(f"{store.url}: {found.describe_missing()}. Finish it with `reinforce run` and its config.")
    if found.quarantined:
        _LOG.warning("%s: %s", store.url, found.describe_quarantined())
    sizes = dict(zip(found.complete, listings[SAMPLES].sizes_of(found.complete).tolist(), strict=True))
    if view is not None:
        sizes = {shard: size for shard, size in sizes.items() if shard in view.kept}
    groups = row_group_table(store, fingerprints[SAMPLES], sizes)
    if view is not None:
        groups = kept_rows(groups, [*sizes], view)
    if not groups[:, 2].sum():
        raise UserError(
            f"{store.url} has no sample in {len(sizes)} shards. `reinforce status {store.url}` shows what was "
            "quarantined."
        )
    return sizes, groups


def _check_some_shards(aligned: AlignedLayers, shards: Sequence[str], roots: ImageRoots | None) -> None:
    """Open some shards, the first and the last included, in all layers: footers, and keys of the first row group.

    Raises UserError if a file is damaged, has another fingerprint, or has other keys than the samples, and if its
    images are stored by reference outside ``roots``.
    """
    some = sorted({shards[round(i * (len(shards) - 1) / (_CHECKED_SHARDS - 1))] for i in range(_CHECKED_SHARDS)})

    def check(shard: str) -> None:
        with keys.open(shard, whole=False) as layers:
            if roots is not None and layers.source:
                roots.check(layers.source)
            if layers.row_groups:
                layers.read(0)

    keys = replace(aligned, columns=dict.fromkeys(aligned.fingerprints, ("key",)))
    with ThreadPoolExecutor(_CHECKED_SHARDS) as pool:
        list(pool.map(check, some))
    _LOG.info(
        "%s: opened %d of %s in %s",
        aligned.store.url, len(some), plural(len(shards), "shard"), plural(len(keys.fingerprints), "layer"),
    )  # fmt: skip


def _describe(dataset: StreamedDataset) -> str:
    targets = ", ".join(f"{t.name} of {t.model} {[*t.shape]}" for t in dataset.targets)
    return f"{dataset.url} has {' and '.join(dataset.spec.kinds) or 'images'} with {targets or 'no targets'}"
