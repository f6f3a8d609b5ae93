"""The labels of the samples of a shard: found by identity in an index, and read a row group at a time.

The labels are somebody else's. Files are read as a dataset's are, with their bounds, and only by the names of shards
that the index lists in their own folder. What an index states is a hint: each candidate's row is compared.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from reinforce.config import Config
from reinforce.datacompdr.matching import (
    ABSENT,
    BROKEN,
    DIGEST,
    KEY,
    OTHER_IMAGE,
    PREFIX,
    Identity,
    difference,
    only_keys,
)
from reinforce.datacompdr.members import Unreadable
from reinforce.datacompdr.values import PublishedValue, checked_norms
from reinforce.dataset.augment.records import Augmentation
from reinforce.dataset.files.layer_file import LayerFile, RefusedFile
from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.errors import UserError
from reinforce.labels.crops import LabelCrops, RowLabels, parse_records
from reinforce.labels.identities import columns_of_identities, hash_text, stated
from reinforce.labels.index import DESCRIPTION, FOLDER, IdentityIndex, open_index
from reinforce.source.captions import clean_text
from reinforce.source.references import image_digest
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.published.family import JOINS, Labels, crops_of

_CACHED_BYTES = 128 * 2**20  # of decoded row groups
_OPEN_FILES = 16
_MAX_CANDIDATES = 16  # rows with the same hash that are compared with a sample


@dataclass(frozen=True)
class Wanted:
    """A sample whose labels are wanted: its key, what it states, and its encoded image or the digest of that."""

    key: str
    identity: Identity
    image: bytes | int | None = None


@functools.lru_cache(maxsize=4)
def _open_index(url: str, fingerprint: str) -> IdentityIndex:
    """The index of labels, which all shards of a worker share. Raises UserError."""
    return open_index(Store(url))


class LabelReader:
    """Reads the labels of samples for ``layers`` of a config. A context manager. ``counts`` are samples by the name of
    the labels and what joined them, or why nothing did."""

    def __init__(self, config: Config, layers: Iterable[Layer]) -> None:
        named: dict[str, list[Layer]] = {}
        for layer in layers:
            if layer.labels is not None:
                named.setdefault(layer.labels, []).append(layer)
        self._sets = {name: _LabelSet(name, config, found) for name, found in named.items()}

    @property
    def counts(self) -> dict[str, int]:
        return {f"{PREFIX}{name}.{what}": n for name, one in self._sets.items() for what, n in (+one.counts).items()}

    def find(self, samples: Sequence[Wanted]) -> list[tuple[RowLabels, ...]]:
        """The labels of samples, in their order, of each set. Raises UserError if an index is damaged, and what the
        storage raises."""
        return [*zip(*(one.find(samples) for one in self._sets.values()), strict=True)]

    @property
    def needs_digests(self) -> bool:
        """Whether some labels have digests of images."""
        return any(one.has_digests for one in self._sets.values())

    def refuse(self, labels: RowLabels) -> None:
        """Count labels that were joined as those of another image."""
        assert labels.image is not None
        counts = self._sets[labels.name].counts
        counts[labels.image.joined] -= 1
        counts[OTHER_IMAGE] += 1

    def close(self) -> None:
        for one in self._sets.values():
            one.close()


class _Place(NamedTuple):
    """A row of labels: number of its shard, row in it, and the kind of agreement."""

    shard: int
    row: int
    kind: str


class _LabelSet:
    def __init__(self, name: str, config: Config, layers: Sequence[Layer]) -> None:
        self.name, self._config, self._labels = name, config, config.labels[name]
        self._crops = name == crops_of(config.labels)
        self._layers = [layer for layer in layers if layer.name != SAMPLES]
        self._store = Store(self._labels.url)
        # The description is read each time: labels may have been extended since.
        described = (self._store.read_json(FOLDER, DESCRIPTION) or {}).get("fingerprint")
        self._index = _open_index(self._labels.url, str(described))
        self._joins = JOINS[: JOINS.index(self._labels.join) + 1]
        self._files = _Files(self._store, self._labels)
        self.counts: Counter[str] = Counter()

    def close(self) -> None:
        self._files.close()

    @property
    def has_digests(self) -> bool:
        return DIGEST in self._index.kinds

    def find(self, samples: Sequence[Wanted]) -> list[RowLabels]:
        places, refusals = self._join(samples)
        order = sorted(places, key=places.__getitem__)  # each row group is read once
        labels = {number: self._read(samples[number].key, places[number]) for number in order}
        for number, refusal in refusals.items():
            labels[number] = RowLabels(self.name, values={layer.name: refusal for layer in self._layers})
        return [labels[number] for number in range(len(samples))]

    # -- joining

    def _join(self, samples: Sequence[Wanted]) -> tuple[dict[int, _Place], dict[int, Refusal]]:
        """The place of each sample that has labels, and why others have none."""
        places: dict[int, _Place] = {}
        why: dict[int, tuple[str, str]] = {}
        own = [self._identity(sample) for sample in samples]
        same = self._candidates(DIGEST, own, range(len(own))) if self._labels.taken.embedded else None
        for kind in self._joins:
            open_ = [number for number in range(len(own)) if number not in places]
            self._compare(kind, samples, own, self._near_or_indexed(kind, own, open_), same, places, why)
            # A row that was near may be of another image, and a row elsewhere of this one.
            open_ = [number for number in open_ if number not in places and number in why]
            self._compare(kind, samples, own, self._candidates(kind, own, open_), same, places, why)
        self.counts.update(
            places[number].kind if number in places else why.get(number, (ABSENT,))[0] for number in range(len(own))
        )
        refusals = {}
        for number in {*range(len(own))} - places.keys():
            named = [kind for kind in own[number] if kind in self._joins]
            count, detail = why.get(number, (ABSENT, f"none with its {', '.join(named) or 'key'}"))
            reason = Reason.REINFORCEMENT_BROKEN if count == BROKEN else Reason.NOT_REINFORCED
            refusals[number] = Refusal(samples[number].key, reason, f"labels: {detail}")
        return places, refusals

    def _compare(
        self,
        kind: str,
        samples: Sequence[Wanted],
        own: Sequence[Identity],
        candidates: Iterable[tuple[int, int, int]],
        same: Container[tuple[int, int, int]] | None,
        places: dict[int, _Place],
        why: dict[int, tuple[str, str]],
    ) -> None:
        """Add the first candidate of each sample that is of its image to ``places``, and to ``why`` what differs."""
        for place in candidates:
            number = place[0]
            if number in places:
                continue
            try:
                theirs = self._stated(place, own[number], same)
            except (RefusedFile, UserError, FileNotFoundError) as error:
                why.setdefault(number, (BROKEN, str(error)))
                continue
            if theirs.get(kind) != own[number][kind]:
                continue  # another text with the same hash
            if kind == KEY and not only_keys(samples[number].key, own[number], theirs):
                continue
            if differs := difference(own[number], theirs, kind):
                why[number] = (OTHER_IMAGE, f"{self._name(place)} is of another image: {differs}")
            else:
                places[number] = _Place(place[1], place[2], kind)

    def _identity(self, sample: Wanted) -> dict[str, str]:
        """What a sample states, with the digest of its image if the labels have digests, and its key if keys join."""
        found = dict(sample.identity)
        if self.has_digests and sample.image is not None:
            digest = sample.image if isinstance(sample.image, int) else image_digest(sample.image)
            found[DIGEST] = f"{digest:016x}"
        return found | ({KEY: sample.key} if KEY in self._joins else {})

    def _near_or_indexed(
        self, kind: str, own: Sequence[Identity], numbers: Iterable[int]
    ) -> dict[tuple[int, int, int], None]:
        """Number of the sample, shard and row of each candidate: those in row groups that were read last, and for the
        others those of the index. A copy in the order of the labels needs the index once for each row group."""
        found: dict[tuple[int, int, int], None] = {}
        missing, probed = [number for number in numbers if kind in own[number]], 1
        while missing:
            values = [own[number][kind] for number in missing]
            near = {} if kind == KEY else self._files.near(kind, values, self._index)  # only lone keys join
            found |= {(missing[at], *place): None for at, place in near.items()}
            missing = [number for at, number in enumerate(missing) if at not in near]
            part, missing = missing[:probed], missing[probed:]
            indexed = self._candidates(kind, own, part)
            for _, shard, row in indexed if missing else ():
                with contextlib.suppress(RefusedFile, UserError, FileNotFoundError):  # reported where they are compared
                    self._files.identities(self._index.shards[shard], self._index.row_group(shard, row)[0])
            found |= indexed
            probed *= 2
        return dict.fromkeys(sorted(found, key=_file_order))

    def _candidates(
        self, kind: str, own: Sequence[Identity], numbers: Iterable[int]
    ) -> dict[tuple[int, int, int], None]:
        """Number of the sample, shard and row of each entry of the index with the hash of a sample."""
        stating = [number for number in numbers if kind in own[number]]
        if kind not in self._index.kinds or not stating:
            return {}
        texts = [own[number][kind] for number in stating]
        hashes = np.array([int(text, 16) if kind == DIGEST else hash_text(text) for text in texts], np.uint64)
        found = self._index.lookup(kind, hashes)
        rows = zip(found.places.tolist(), found.shards.tolist(), found.rows.tolist(), strict=True)
        candidates = sorted(((stating[place], shard, row) for place, shard, row in rows), key=_file_order)
        found_of = Counter[int]()
        kept: dict[tuple[int, int, int], None] = {}
        for candidate in candidates:  # in the order of the files, of which each row group is read once
            found_of[candidate[0]] += 1
            if found_of[candidate[0]] <= _MAX_CANDIDATES:
                kept[candidate] = None
        return kept

    def _stated(
        self, place: tuple[int, int, int], own: Identity, same: Container[tuple[int, int, int]] | None
    ) -> Identity:
        """What the labels state of a row. Of labels with their images, ``same`` are the rows with the digest of a
        sample by the index, so that no image is read."""
        _, shard, row = place
        group, number = self._index.row_group(shard, row)
        found = self._files.identities(self._index.shards[shard], group)[number]
        if same is not None and DIGEST in own:
            return {**found, DIGEST: own[DIGEST] if place in same else "another"}
        return found

    def _name(self, place: tuple[int, int, int]) -> str:
        return f"{self._index.shards[place[1]]}, row {place[2]},"

    # -- values

    def _read(self, key: str, at: _Place) -> RowLabels:
        shard = self._index.shards[at.shard]
        group, row = self._index.row_group(at.shard, at.row)
        where = f"labels: {shard}, row {at.row}"
        samples = self._files.samples(shard, group)
        try:
            image = self._image(samples, row, at.kind)
        except Unreadable as error:
            refusal = Refusal(key, Reason.REINFORCEMENT_BROKEN, f"{where}: {error}")
            return RowLabels(self.name, values={layer.name: refusal for layer in self._layers})
        values: dict[str, PublishedValue] = {}
        for layer in self._layers:
            try:
                value = self._value(layer, shard, group, row, samples)
                values[layer.name] = Refusal(key, Reason.NOT_REINFORCED, f"{where}: null") if value is None else value
            except (Unreadable, RefusedFile, UserError, FileNotFoundError) as error:
                values[layer.name] = Refusal(key, Reason.REINFORCEMENT_BROKEN, f"{where}: {error}")
        return RowLabels(self.name, image, samples["caption"][row].as_py(), values)

    def _image(self, samples: pa.Table, row: int, kind: str) -> LabelCrops:
        """The image of a row, with its records if they are taken. Raises Unreadable."""
        policy = self._config.augmentations
        width, height = (samples[side][row].as_py() or 0 for side in ("width", "height"))
        if min(width, height) < 1:
            raise Unreadable(f"an image of {width} x {height}")
        records: tuple[Augmentation, ...] = ()
        if self._crops:
            records = parse_records(samples["augmentations"][row].as_py(), policy.count, policy.size, width, height)
        return LabelCrops(records, width, height, kind)

    def _value(self, layer: Layer, shard: str, group: int, row: int, samples: pa.Table) -> PublishedValue | None:
        """The value of a row, None where it is null. Raises Unreadable."""
        keys, values = self._files.values(layer, shard, group)
        if len(keys) != samples.num_rows or keys[row] != samples["key"][row]:
            raise Unreadable(f"{layer.name} does not have the rows of its samples")
        value = values[row]
        if isinstance(value, np.ndarray):
            if value.shape[0] < layer.count or value.shape[1] != layer.dim:
                raise Unreadable(f"{layer.name} has vectors {[*value.shape]}, expected {[layer.count, layer.dim]}")
            if np.isnan(value).all():
                return None
            vectors = value[: layer.count].copy()  # a view would keep the row group
            checked_norms(vectors, layer.name)
            return vectors
        if value is None:
            return None
        if len(value) != layer.count or None in value:
            raise Unreadable(f"{len(value)} captions in {layer.name}, expected {layer.count}")
        return [clean_text(text, self._config.input.limits.caption_chars) for text in value]


def _file_order(place: tuple[int, int, int]) -> tuple[int, int]:
    return place[1:]


class _Files:
    """Row groups of the files of labels, and the last ones that were read."""

    def __init__(self, store: Store, labels: Labels) -> None:
        self._store, self._labels = store, labels
        self._open: OrderedDict[tuple[str, str], tuple[contextlib.ExitStack, LayerFile]] = OrderedDict()
        self._groups: OrderedDict[tuple[str, str, int], Any] = OrderedDict()
        self._sizes: dict[tuple[str, str, int], int] = {}

    def samples(self, shard: str, group: int) -> pa.Table:
        """The samples of a row group, without images."""
        return self._cached(SAMPLES, shard, group, self._read_samples)[0]

    def near(self, kind: str, values: Sequence[str], index: IdentityIndex) -> dict[int, tuple[int, int]]:
        """Number of the shard and row of those of ``values``, by place, that a row group states which was read last."""
        found: dict[int, tuple[int, int]] = {}
        for layer, shard, group in self._groups:
            if layer == SAMPLES:
                rows = self._groups[layer, shard, group][2].get(kind, {})
                number, first = index.place(shard, group)
                found |= {at: (number, first + rows[value]) for at, value in enumerate(values) if value in rows}
        return found

    def identities(self, shard: str, group: int) -> Sequence[Identity]:
        """What each row of a row group states, with its key."""
        return self._cached(SAMPLES, shard, group, self._read_samples)[1]

    def values(self, layer: Layer, shard: str, group: int) -> tuple[pa.ChunkedArray, Any]:
        """The keys and values of a row group of a layer."""

        def read(file: LayerFile, group: int) -> tuple[Any, int]:
            table = file.read_row_group(group, use_threads=False)
            values = layer.kind.decode(table)
            return (table["key"], values), table.nbytes + getattr(values, "nbytes", table.nbytes)

        return self._cached(layer.name, shard, group, read)

    def _read_samples(self, file: LayerFile, group: int) -> tuple[Any, int]:
        names = file.footer[1]
        columns = ["key", "caption", "width", "height", *columns_of_identities(names, images=False)]
        if self._labels.taken.crops:
            columns.append("augmentations")
        table = file.read_row_group(group, columns, use_threads=False)
        found = [{KEY: key, **one} for key, one in zip(table["key"].to_pylist(), stated(table), strict=True)]
        rows: dict[str, dict[str, int]] = {}
        for row, one in enumerate(found):
            for kind, value in one.items():
                rows.setdefault(kind, {}).setdefault(value, row)
        return (table, found, rows), 4 * table.nbytes

    def _cached(self, layer: str, shard: str, group: int, read: Any) -> Any:
        place = (layer, shard, group)
        if place not in self._groups:
            value, self._sizes[place] = read(self._file(layer, shard), group)
            self._groups[place] = value
            while sum(self._sizes.values()) > _CACHED_BYTES and len(self._groups) > 1:
                oldest, _ = self._groups.popitem(last=False)
                del self._sizes[oldest]
        self._groups.move_to_end(place)
        return self._groups[place]

    def _file(self, layer: str, shard: str) -> LayerFile:
        name = (layer, shard)
        if name not in self._open:
            fingerprint = self._labels.taken.samples if layer == SAMPLES else None
            if layer != SAMPLES:
                fingerprint = str(self._labels.taken.layers[layer]["fingerprint"])
            stack = contextlib.ExitStack()
            with stack:
                file = stack.enter_context(self._store.open_layer(layer, shard, fingerprint, whole=False))
                self._open[name] = (stack.pop_all(), file)
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(name)
        return self._open[name][1]

    def close(self) -> None:
        for stack, _ in self._open.values():
            stack.close()
        self._open.clear()
