"""Reading a reinforced dataset: samples with the layers of some teachers and captioners."""

from __future__ import annotations

import copy
import logging
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reinforce import settings
from reinforce.dataset.aligned import AlignedLayers, check_completeness, kept_rows, row_group_table
from reinforce.dataset.index import (
    describe_damaged,
    drop_shard_command,
    find_damaged,
    read_index,
    without_files,
)
from reinforce.dataset.kinds.registry import SECTIONS, stored_layer
from reinforce.dataset.layers import (
    MODEL_SECTIONS,
    SAMPLES,
    TRUE_CAPTION,
    captions_layer,
    embeddings_layer,
)
from reinforce.dataset.manifest import read_manifest, select_names
from reinforce.dataset.sample import ImagePolicies, Sample, Samples, read_samples
from reinforce.dataset.store import Listing, Store
from reinforce.dataset.view import View, open_view
from reinforce.errors import UserError
from reinforce.source.config import LIMITS
from reinforce.source.references import ChangedImages, ImageRoots
from reinforce.terminal import escape, format_bytes, plural
from schemas.seeds import Ints

if TYPE_CHECKING:
    from reinforce.dataset.torch_dataset import TorchSamples


_LOG = logging.getLogger(__name__)
_SHOWN_LAYERS = 40  # in a notebook


@settings.checked_arguments
def open(
    url: settings.Address,
    teachers: settings.Names | None = None,
    captioners: settings.Names | None = None,
    *,
    view: str | None = None,
    strict: bool = False,
    images_from: settings.Names = (),  # type: ignore[assignment]
    **models: Sequence[str] | None,
) -> Dataset:
    """Open the dataset at a folder or fsspec URI with the layers of some teachers and captioners; default: all.

    ``models`` are the names of those of other sections of its config, such as ``classifiers``; default: all.

    Shards that a layer lacks are not read: a warning names the layers and numbers, or with ``strict`` a UserError.
    Quarantined shards are not read either, and are only logged. Raises UserError if there is no dataset, or it has no
    teacher or captioner of a given name.

    With ``view``, only the samples that a view of `reinforce select` keeps. Raises UserError if there is none of that
    name, or a layer that it was made from has changed. Shards that are newer than the view are not read: a warning
    counts them.

    If the dataset stores its images by reference, ``images_from`` are the folders or URLs of tars that it may read them
    from, such as the folder of its ``source``.

    Published labels have no images: ``image`` of their samples is empty, and to decode it raises UserError.
    """
    every: dict[str, Sequence[str] | None] = dict.fromkeys(SECTIONS)
    if unknown := models.keys() - every:
        known = ", ".join(("view", "strict", "images_from", *every))
        raise UserError(f"open: got an unexpected keyword argument {min(unknown)!r}. It takes: url, {known}.")
    chosen = {**every, **models, "teachers": teachers, "captioners": captioners}
    return Dataset(url, chosen, view=view, strict=strict, images_from=images_from)


class Dataset:
    """The samples of the shards that are complete in every selected layer; ``reinforce.open`` makes one.

    ``models`` are names or patterns by section of the config; None: all of a section, or of all sections. Of their
    layers, only those in ``layers`` are read; None: all.

    Iterating yields ``Sample`` in the order of the shards. ``len(data)`` is the number of samples; the first call
    reads the footer of each shard's samples file. ``data.samples[3]`` is a sample by its number. ``data[name]`` with a
    name of ``data.shards``, ``data[3]`` and ``data[2:5]`` are the dataset restricted to these shards.

    Attributes:
        shards: names of the shards, sorted; with a view, those of which it keeps samples.
        models: names of those selected, by section of the config; ``teachers`` and ``captioners`` are two of these.
        layers: names of the layers that are read.
        manifest: content of dataset.json.
        view: the view whose samples these are, None for all.
        store: the dataset's files.
        roots: where images that are stored by reference may be read.
    """

    def __init__(
        self,
        url: str,
        models: Mapping[str, Sequence[str] | None] | None = None,
        *,
        view: str | None = None,
        strict: bool = False,
        images_from: str | Sequence[str] = (),
        images_key: str = 'images_from=["{}"]',
        layers: Collection[str] | None = None,
    ) -> None:
        self.store = Store(url)
        self.roots = ImageRoots.named(images_from, images_key, LIMITS["wide"].image_bytes)
        self.manifest = read_manifest(self.store)
        models = dict.fromkeys(SECTIONS) if models is None else models
        self.models = {one: select_names(self.store.url, one, models.get(one, []), self.manifest) for one in SECTIONS}
        self.teachers, self.captioners = self.models["teachers"], self.models["captioners"]
        wanted = [captions_layer(c) for c in self.captioners]
        wanted += [embeddings_layer(t, i) for t in self.teachers for i in ("images", TRUE_CAPTION, *self.captioners)]
        stored = [stored_layer(name, entry) for name, entry in self.manifest["layers"].items()]
        others = [layer for layer in stored if not layer.kind.taken and layer.name != SAMPLES]
        wanted += [one.name for one in others if one.model is None or one.model in self.models[str(one.kind.section)]]
        known = self.manifest["layers"].keys() if layers is None else self.manifest["layers"].keys() & {*layers}
        self.layers = [SAMPLES, *(name for name in wanted if name in known)]
        listings = self.store.listings(self.layers)
        self.shards = self._complete_shards(listings, strict)
        self.view: View | None = None
        if view is not None:
            self.view = kept = open_view(self.store, self.manifest, view)
            if newer := sum(shard not in kept.kept for shard in self.shards):
                text = plural(newer, "shard")
                _LOG.warning("%s: not read, because newer than view %s: %s", self.store.url, view, text)
            self.shards = [shard for shard in self.shards if any(kept.kept.get(shard, ()))]
        sizes = {name: listing.sizes_of(self.shards) for name, listing in listings.items()}
        self._samples_bytes = dict(zip(self.shards, sizes[SAMPLES].tolist(), strict=True))
        self._total_bytes = dict(zip(self.shards, np.sum([*sizes.values()], axis=0).tolist(), strict=True))

    def _complete_shards(self, listings: Mapping[str, Listing], strict: bool) -> list[str]:
        """Names of the shards that every layer has. Warns or raises UserError if others are missing."""
        damaged = find_damaged(self.store, listings, self.fingerprints)
        committed = read_index(self.store, SAMPLES, self.fingerprints[SAMPLES]).listing()
        known = [listings[SAMPLES], committed]
        found = check_completeness(self.store, without_files(listings, damaged), known)
        read, missing = f"{len(found.complete):,} of {plural(found.total, 'shard')} are read", found.describe_missing()
        if missing and damaged:
            missing = f"{missing}; {describe_damaged(self.store.url, damaged)}"
        notes = [missing] if missing else []
        notes += [found.describe_quarantined()] if found.quarantined else []
        if not found.complete:
            raise UserError(
                f"{self.store.url} has no shard that is complete in {', '.join(self.layers)}. Finish the run."
                + "".join(f"\n  {note}" for note in notes)
            )
        fix = "`reinforce run` with the dataset's config computes what is missing"
        if missing and strict:
            raise UserError(f"{self.store.url}: {missing}. {fix}; without `strict`, {read}.")
        if missing:
            _LOG.warning("%s: %s, because %s. %s.", self.store.url, read, "; ".join(notes), fix)
        elif notes:
            _LOG.info("%s: %s; %s", self.store.url, read, notes[0])
        return found.complete

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each layer that is read."""
        return {name: self.manifest["layers"][name]["fingerprint"] for name in self.layers}

    def __len__(self) -> int:
        if self.view is not None:
            return sum(sum(self.view.kept[shard]) for shard in self.shards)
        return int(self._groups[:, 2].sum())

    @cached_property
    def _groups(self) -> Ints:
        """The row groups [n, 3] of the shards, as ``row_group_table`` gives them, with the rows that the view keeps."""
        sizes = {shard: self._samples_bytes[shard] for shard in self.shards}
        groups = row_group_table(self.store, self.fingerprints[SAMPLES], sizes)
        return groups if self.view is None else kept_rows(groups, self.shards, self.view)

    @cached_property
    def samples(self) -> Samples:
        """The samples as a sequence: ``data.samples[3]``, ``data.samples[:5]``, ``len(data.samples)``.

        A torch ``DataLoader`` takes it as a map-style dataset. The first access reads the numbers of rows.
        """
        return Samples(self, self._groups)

    def __bool__(self) -> bool:
        return bool(self.shards)  # without the row counts

    def __getitem__(self, index: str | int | slice) -> Dataset:
        """The dataset restricted to a shard by name or number, or to a slice of the shards.

        Raises KeyError for an unknown name and IndexError for a number out of range.
        """
        if isinstance(index, str):
            if index not in self.shards:
                raise KeyError(f"{self.store.url} has no shard {index!r} that is complete in every selected layer")
            shards = [index]
        elif isinstance(index, slice):
            shards = self.shards[index]
        elif not isinstance(index, numbers.Integral):
            raise UserError(f"data[...] takes a shard by name or number, or a slice of shards, got {index!r:.100}")
        elif not -len(self.shards) <= index < len(self.shards):
            raise IndexError(
                f"shard {index} is out of range: {self.store.url} has {plural(len(self.shards), 'shard')}. A sample by "
                "its number is data.samples[...]."
            )
        else:
            shards = [self.shards[index]]
        restricted = copy.copy(self)
        for counted in ("_groups", "samples"):
            restricted.__dict__.pop(counted, None)
        restricted.shards = shards
        return restricted

    def __iter__(self) -> Iterator[Sample]:
        for shard in self.shards:
            for tables in self.row_groups(shard):
                yield from self._samples(shard, tables)

    def row_groups(self, shard: str) -> Iterator[dict[str, pa.Table]]:
        """Tables of each row group by layer, aligned by key. Raises UserError if they are not or one is damaged."""
        with self._aligned({}).open(shard) as layers:
            yield from map(layers.read, range(layers.row_groups))

    def _aligned(self, columns: Mapping[str, Sequence[str]]) -> AlignedLayers:
        view = None if self.view is None else self.view.rows
        return AlignedLayers(self.store, self.fingerprints, columns, self.manifest.get("moved", {}), view)

    def rows(self, shard: str, group: int, places: Sequence[int], *, images: bool = True) -> list[Sample]:
        """The samples at some places of a row group, or all but their images. Raises UserError as iterating does.

        With a view, places are among the rows that it keeps.
        """
        return self.samples_of(shard, self.row_group(shard, group), places, images=images)

    def row_group(self, shard: str, group: int) -> dict[str, pa.Table]:
        """Tables of a row group by layer, as ``row_groups`` gives them."""
        with self._aligned({}).open(shard, whole=False) as files:
            return files.read(group)

    def samples_of(
        self, shard: str, tables: Mapping[str, pa.Table], places: Sequence[int], *, images: bool = True
    ) -> list[Sample]:
        """The samples at some places of the tables of a row group. Raises UserError as iterating does."""
        taken = {name: table.take(pa.array(places, pa.int64())) for name, table in tables.items()}
        return list(self._samples(shard, taken, images))

    def show(self, key: str) -> Sample:
        """The sample of a key, which a notebook shows with its crops, augmentations and captions.

        Reads the keys of one shard after the other, in ``data["NAME"].show(key)`` only those of a shard. Raises
        KeyError if no shard has the key.
        """
        keys = replace(self._aligned({SAMPLES: ["key"]}), fingerprints={SAMPLES: self.fingerprints[SAMPLES]})
        for shard in self.shards:
            with keys.open(shard, whole=False) as files:
                for group in range(files.row_groups):
                    place = pc.index(files.row_group(group).samples["key"], key).as_py()
                    if place >= 0:
                        return self.rows(shard, group, [place])[0]
        raise KeyError(f"{self.store.url} has no sample {key!r} in {plural(len(self.shards), 'shard')}")

    def to_torch(self, transform: Callable[[Sample], Any] | None = None) -> TorchSamples:
        """A ``torch.utils.data.IterableDataset`` of ``transform(sample)``, or of the samples.

        Each shard is read by one DataLoader worker of one rank of ``torch.distributed``, if that is initialised.
        Samples come in the order of the shards, without shuffling. Ranks and workers can get different numbers of
        samples, and no samples if there are fewer shards. With the start method ``spawn``, ``transform`` must be
        picklable: a function of a module, not a lambda. Example:

            def image_and_vector(sample):
                pixels = np.asarray(sample.augmented(0, size=224))
                return {"image": torch.from_numpy(pixels.copy()), "vector": torch.from_numpy(sample.images["dfn2b"][0])}

            data = reinforce.open("my-data", teachers=["dfn2b"], captioners=[])
            for batch in DataLoader(data.to_torch(image_and_vector), batch_size=64, num_workers=2):
                ...  # batch["image"]: uint8 [64, 224, 224, 3], batch["vector"]: float32 [64, D]

        Without a ``transform``, pass ``batch_size=None`` or a ``collate_fn`` to the DataLoader. To train a student
        with shuffling and exact resume, use ``reinforce train``.
        """
        from reinforce.dataset.torch_dataset import TorchSamples

        return TorchSamples(self, transform)

    @property
    def nbytes(self) -> int:
        """Bytes of the files of these shards, in all layers that are read."""
        return sum(self._total_bytes[shard] for shard in self.shards)

    def __repr__(self) -> str:
        lines = [
            f"Dataset({self.store.url!r})",
            f"  {plural(len(self), 'sample')} in {plural(len(self.shards), 'shard')}, {format_bytes(self.nbytes)}",
            *(f"  {section}: {names}" for section, names in self._described_models()),
            *([f"  view: {self.view.name}"] if self.view is not None else []),
        ]
        return escape("\n".join(lines))

    def _repr_html_(self) -> str:
        from reinforce.reports import notebook_table  # other uses need no jinja

        facts = [
            ("samples", f"{len(self):,}"),
            ("shards", f"{len(self.shards):,}"),
            ("size", format_bytes(self.nbytes)),
            *self._described_models(),
        ]
        layers = [stored_layer(name, self.manifest["layers"][name]) for name in self.layers[:_SHOWN_LAYERS]]
        lines = [(layer.name, layer.kind.content(layer).plan, layer.fingerprint) for layer in layers]
        more = len(self.layers) - len(layers)
        return notebook_table(self.store.url, facts, ("layer", "a row", "fingerprint"), lines, more)

    def _described_models(self) -> Iterator[tuple[str, str]]:
        """The selected models of each section, for people; sections besides these two only where they have some."""
        layers, teachers = self.manifest["layers"], []
        for name in self.teachers:
            scale = self.manifest["teachers"][name].get("logit_scale")
            images = layers.get(embeddings_layer(name, "images"))
            layer = images or layers.get(embeddings_layer(name, TRUE_CAPTION)) or {}
            details = [
                f"dim {layer.get('dim')}",
                f"K {images['count']}" if images else "texts only",
                "no logit scale" if scale is None else f"logit scale {scale:g}",
            ]
            teachers.append(f"{name} ({', '.join(details)})")
        captioners = [f"{name} (N {layers.get(captions_layer(name), {}).get('count')})" for name in self.captioners]
        yield "teachers", ", ".join(teachers) or "none"
        yield "captioners", ", ".join(captioners) or "none"
        yield from (
            (section, ", ".join(of)) for section, of in self.models.items() if of and section not in MODEL_SECTIONS
        )

    @cached_property
    def _policies(self) -> ImagePolicies:
        return ImagePolicies.from_manifest(self.manifest, self.store.url)

    def _samples(self, shard: str, tables: Mapping[str, pa.Table], with_images: bool = True) -> Iterator[Sample]:
        try:
            yield from read_samples(
                tables, self.manifest, self.teachers, self.captioners, self._policies, self.roots, with_images
            )
        except ChangedImages as error:
            raise UserError(error.describe(drop_shard_command(self.store.url, [SAMPLES], shard))) from error
