"""Before the first step: which layers a training reads, whether they are whole and fit together, and their rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from reinforce.dataset.aligned import AlignedLayers
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, embeddings_layer
from reinforce.dataset.manifest import read_manifest, select_names
from reinforce.dataset.row_counts import row_group_table
from reinforce.dataset.sample import ImagePolicies
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.student.config import Data
from reinforce.student.data.examples import Choice
from reinforce.student.data.reader import Corpus, Targets

_LOG = logging.getLogger(__name__)
#: Shards that are opened beforehand, in all layers; the others are checked when they are read.
_OPENED = 16


def survey(data: Data, seed: int, teachers: Sequence[str] | None) -> list[Corpus]:
    """The datasets of a training. ``teachers`` are those whose vectors are read; default: all.

    Raises UserError where something is missing, damaged or does not fit together.
    """
    corpora = [_corpus(source.url, source.weight, data, seed, teachers) for source in data.datasets]
    first = corpora[0]
    for corpus in corpora[1:]:
        if (corpus.targets, corpus.choice.kinds) != (first.targets, first.choice.kinds):
            raise UserError(
                f"{first.url} and {corpus.url} give different examples: {_told(first)}; {_told(corpus)}. "
                "Name teachers and captioners that they share under `data`."
            )
    return corpora


def _corpus(url: str, weight: float, data: Data, seed: int, teachers: Sequence[str] | None) -> Corpus:
    store = Store(url)
    manifest = read_manifest(store)
    policies = ImagePolicies.from_manifest(manifest, url)
    policies.check()
    layers = manifest["layers"]
    chosen_teachers = select_names(url, "teachers", teachers, manifest)
    captioners = select_names(url, "captioners", None if data.captioners is None else list(data.captioners), manifest)
    choice = Choice(
        seeing=tuple(t for t in chosen_teachers if embeddings_layer(t, "images") in layers),
        reading=tuple(t for t in chosen_teachers if embeddings_layer(t, TRUE_CAPTION) in layers),
        captioners={name: (data.captioners or {}).get(name, 1.0) for name in captioners},
        captions=data.captions,
        synthetic=data.synthetic,
        pick=data.pick,
        seed=seed,
    )
    columns = choice.columns(manifest["images"])
    for layer in columns:
        if layer not in layers:
            raise UserError(
                f"{url} has no layer {layer}. Run a config with both models on it, or leave one out under `data`."
            )
    fingerprints = {layer: layers[layer]["fingerprint"] for layer in columns}
    zipped = AlignedLayers(store, fingerprints, columns)
    sizes = _whole(store, list(columns))
    groups = row_group_table(store, fingerprints[SAMPLES], sizes)
    if not groups[:, 2].sum():
        raise UserError(f"{url} has no sample in {len(sizes)} shards. `reinforce status {url}` tells what was refused.")
    shards = tuple(sizes)
    _open_some(zipped, shards)
    targets: Targets = tuple(
        ((teacher, what), layers[embeddings_layer(teacher, "images" if what == "image" else TRUE_CAPTION)]["dim"])
        for teacher, what in choice.targets
    )
    size = manifest["augmentations"]["size"]
    return Corpus(url, weight, zipped, choice, targets, policies.limits, policies.image, size, shards, groups)


def _whole(store: Store, layers: Sequence[str]) -> dict[str, int]:
    """Shards that every layer has, and the bytes of their samples.

    Shards that a run has given up in some layer are left out. Raises UserError where others are missing.
    """
    listings = {layer: store.shards(layer) for layer in layers}
    samples = listings[SAMPLES]
    lacking = {layer: samples.keys() - listing.keys() for layer, listing in listings.items()}
    lost: set[str] = set()
    if any(lacking.values()):
        lost = set().union(*(store.quarantined_shards(layer, listing) for layer, listing in listings.items()))
    for layer, shards in lacking.items():
        if missing := sorted(shards - lost):
            raise UserError(
                f"{store.url}: {layer} lacks {len(missing):,} of {len(samples):,} shards ({', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}). Finish it by `reinforce run` with its config."
            )
    whole = {shard: size for shard, size in sorted(samples.items()) if shard not in lost}
    if len(whole) < len(samples):
        _LOG.warning(
            "%s: %d shards are left out, since a layer was given up there", store.url, len(samples) - len(whole)
        )
    return whole


def _open_some(zipped: AlignedLayers, shards: Sequence[str]) -> None:
    """Open some shards in all layers, first and last among them: footers, and keys of the first row group.

    Raises UserError where a file is damaged, of another recipe or out of step.
    """
    some = sorted({shards[round(i * (len(shards) - 1) / (_OPENED - 1))] for i in range(_OPENED)})

    def check(shard: str) -> None:
        with keys.open(shard, whole=False) as layers:
            if layers.row_groups:
                layers.read(0)

    keys = AlignedLayers(zipped.store, zipped.fingerprints, dict.fromkeys(zipped.fingerprints, ("key",)))
    with ThreadPoolExecutor(_OPENED) as pool:
        list(pool.map(check, some))
    _LOG.info(
        "%s: opened %d of %d shards in %d layers", zipped.store.url, len(some), len(shards), len(keys.fingerprints)
    )


def _told(corpus: Corpus) -> str:
    targets = ", ".join(f"{what} of {teacher} [{dim}]" for (teacher, what), dim in corpus.targets)
    return f"{corpus.url} has {' and '.join(corpus.choice.kinds)} with {targets or 'no vectors'}"
