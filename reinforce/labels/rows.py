"""The labels of the samples of a shard, in the tars of DataCompDR, DFNDR and RayGen, or in a dataset.

There is one tar for each shard of the source, which may be that shard. Labels that are a dataset are found by identity
in an index, and read a row group at a time. They are untrusted: files are read as a dataset's are, with their bounds,
and only by the names of shards that the index lists in their own folder. What an index states is a hint: each
candidate's row is compared.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset.aligned import alignment_error
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layer_file import LayerFile, RefusedFile
from reinforce.dataset.layers import (
    REINFORCEMENTS,
    SAMPLES,
    TRUE_CAPTION,
    Layer,
)
from reinforce.dataset.store import Store, other_origin, parse_footer
from reinforce.dataset.vectors import tensor_rows
from reinforce.errors import StorageError, UserError
from reinforce.images.records import Augmentation
from reinforce.labels.index import (
    DIGEST,
    KEY,
    KINDS,
    Identity,
    IdentityIndex,
    LabelFiles,
    cached_index,
    columns_of_identities,
    identity_of,
    read_fingerprint,
    stated,
)
from reinforce.labels.joining import IndexedRows, Joined, Joining, RowOf, TarRows, Why
from reinforce.labels.members import (
    BROKEN,
    CAPTIONS,
    LARGEST_IMAGE,
    PARAMETERS,
    UNCONFIRMED,
    VECTORS,
    LabelCrops,
    LabelReader,
    LabelSet,
    LabelValue,
    MemberReader,
    RowLabels,
    Unreadable,
    Wanted,
    checked_norms,
    describe_counts,
    parse_records,
)
from reinforce.source.formats.tar import read_shard
from reinforce.source.samples import Refusal, caption_of, clean_text
from reinforce.source.urls import canonical, digest_of
from schemas import TRUE_CAPTIONS, WHOLE_SHARD, Reason
from teachers.published import JOINS, Labels

_CHECKED_SAMPLES = 8
_CAPTION = "txt"  # the caption of which a tar has the vector; Apple's tars have none


class TarLabels(LabelSet):
    """The labels in one tar.

    Members are copied to an unnamed temporary file, since the source may have its images in another order. ``limit``
    bounds the samples.
    """

    at_once = 32
    decides_rows = True

    def __init__(self, url: str, config: Config, layers: Iterable[Layer], limit: int | None = None) -> None:
        super().__init__(REINFORCEMENTS)
        self.member_reader = self._reader = MemberReader(config, [layer for layer in layers if layer.published])
        self._url, self._join, self._limits = url, config.join or "url", config.input.limits
        self._rows = TarRows(self._join)
        self._members: list[dict[str, tuple[int, int]]] = []  # offset and length of each row's, by name
        self._matched: set[int] = set()
        self._refusals: list[Refusal] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        offset = 0
        for item in islice(read_shard(url, config.input.limits, images=False), limit):
            if isinstance(item, Refusal):
                self._refusals.append(Refusal(item.key, item.reason, f"reinforcements: {item.detail}"))
                continue
            members: dict[str, tuple[int, int]] = {}
            self._members.append(members)
            self._rows.add(item.key, identity_of(item.sidecars))
            for name in (PARAMETERS, CAPTIONS, *VECTORS, _CAPTION):
                if name in item.left_out:
                    self._refusals.append(item.left_out[name])
                if (data := item.sidecars.get(name)) is not None:
                    members[name] = (offset, len(data))
                    with _disk_errors():
                        offset += self._file.write(data)
        with _disk_errors():
            self._file.flush()
        self.shard_refusal = next((r for r in self._refusals if r.key is None and r.reason.value in WHOLE_SHARD), None)

    def close(self) -> None:
        self._file.close()

    def find(self, samples: Sequence[Wanted]) -> Iterator[RowLabels]:
        for sample, found in zip(samples, self._rows.match(samples), strict=True):
            if isinstance(found, Joined):
                self.counts[found.kind] += 1
                self._matched.add(found.row)
                yield self._labels(found.row, found.kind)
            else:
                self.counts[found.what] += 1
                refusal = Refusal(sample.key, Reason.NOT_REINFORCED, f"published reinforcements: {found.detail}")
                values = dict.fromkeys([layer.name for layer in self._reader.layers], refusal)
                yield RowLabels(self.name, values, refusal=refusal)

    def _labels(self, row: int, joined: str) -> RowLabels:
        places = self._members[row].items()
        members = {name: os.pread(self._file.fileno(), size, offset) for name, (offset, size) in places}
        own = caption_of({_CAPTION: members.pop(_CAPTION, b"")}, [_CAPTION], self._limits)
        captions = () if own is None else (own,)
        return RowLabels(
            self.name, joined=joined, key=self._rows.identities[row][KEY], members=members, captions=captions
        )

    def left_over(self) -> Iterator[Refusal]:
        yield from self._refusals
        for row, identity in enumerate(self._rows.identities):
            if row not in self._matched:
                detail = "reinforced, but no sample of the source's shard is of its image"
                yield Refusal(identity[KEY], Reason.NO_IMAGE, detail)

    def preview(self, samples: Sequence[Wanted], where: str) -> list[str]:
        every: list[dict[str, str]] = []  # what of the first samples cannot be read, independently of their images
        for row in range(min(_CHECKED_SAMPLES, len(self._members))):
            labels = self._labels(row, KEY)
            values = labels.unpacked(self._reader, "")
            errors = {
                name: value.detail
                for name, value in values.items()
                if isinstance(value, Refusal) and value.reason is not Reason.NOT_REINFORCED
            }
            try:
                labels.crops(self._reader, *LARGEST_IMAGE)
            except Unreadable as error:
                errors = {SAMPLES: str(error), **errors}
            every.append(errors)
        for layer in every[0] if every else ():
            if all(layer in others for others in every):
                raise UserError(
                    f"{layer}: cannot be read from any of the first {len(every)} samples of {canonical(self._url)}: "
                    f"{every[0][layer]}"
                )
        refused = [one.refusal for one in self.find(samples) if one.refusal is not None]
        if not samples or not self._members:
            return []
        first = f"the first {len(samples)} samples of {where}"
        example = f"{refused[0].key}: {refused[0].detail}" if refused else ""
        if self.counts[UNCONFIRMED] and self._join != KEY and not any(self.counts[kind] for kind in KINDS):
            raise UserError(
                f"reinforcements: none of {first} is proven to be the image that was labelled. {example}. Keep `uid`, "
                "`sha256` or `url` in the json member of the source's samples; or, if you know that equal keys are "
                "equal images and neither side states anything else, set `join: key`."
            )
        joined = f"{first} join the first {len(self._members)} published ones: {describe_counts(self.counts)}"
        return [f"reinforcements: {joined}" + (f"; {example}" if example else "")]


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn an error of the temporary file into a StorageError with the fix."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"reinforcements cannot be copied to {tempfile.gettempdir()}: {error}; make room there, or set TMPDIR."
        ) from error


_CACHED_BYTES = 128 * 2**20  # of decoded row groups
_OPEN_FILES = 16


def open_labels(
    config: Config, layers: Iterable[Layer], tar: str | None = None, *, values: bool = True, planned: bool = False,
    limit: int | None = None,
) -> LabelReader:  # fmt: skip
    """The labels of the samples of a shard for ``layers`` of a config: of ``tar``, or of datasets. Without ``values``,
    they are only joined, with at most ``limit`` samples of the tar. If a plan has read labels before (``planned``),
    they are lost if they do not exist."""
    named: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.labels is not None:
            named.setdefault(layer.labels, []).append(layer)
    return LabelReader(
        TarLabels(str(tar), config, found, limit)
        if name == REINFORCEMENTS
        else _StoredSet(name, config, found, values, planned)
        for name, found in named.items()
    )


class _Row(NamedTuple):
    """What the samples of labels have of a row, the ``number``th of ``rows`` in its row group."""

    where: str
    shard: str
    group: int
    number: int
    key: str
    rows: int
    image: LabelCrops
    captions: Sequence[str]


class _StoredSet(LabelSet):
    """Labels that are a dataset."""

    def __init__(self, name: str, config: Config, layers: Sequence[Layer], values: bool, planned: bool) -> None:
        super().__init__(name)
        self._config, self._labels = config, config.labels[name]
        self._crops = name == config.labels_of_crops
        self._layers = [layer for layer in layers if layer.name != SAMPLES]
        store = Store(self._labels.url)
        # The description is read each time: labels may have been extended since.
        self._index = cached_index(self._labels.url, read_fingerprint(store, planned))
        self._joins = JOINS[: JOINS.index(self._labels.join) + 1]
        self.has_digests = DIGEST in self._index.kinds
        self._true_captions = next((layer.count for layer in layers if layer.texts == TRUE_CAPTION), 0)
        true = (self._labels.taken.layers[layer.name] for layer in layers if layer.texts == TRUE_CAPTION)
        self._stored_captions = next((int(entry["count"]) for entry in true), 0)
        columns = ["width", "height", *(["augmentations"] if self._crops else [])]
        columns += ["caption", TRUE_CAPTIONS] if self._true_captions else []
        check = functools.partial(read_fingerprint, store)
        files = LabelFiles(store, config.failures.attempts, check, self.unread)
        self._files = _Files(self._index, self._labels, files, columns if values else [])

    def close(self) -> None:
        self._files.close()

    def preview(self, samples: Sequence[Wanted], where: str) -> list[str]:
        notes = []
        if samples:
            self.join(samples)
            joined = f"the first {len(samples)} samples of {where} join {canonical(self._labels.url)}"
            notes.append(f"labels.{self.name}: {joined}: {describe_counts(self.counts)}")
        own, stored = self._config.input.captions_per_sample or 1, self._stored_captions
        if stored > own:
            notes.append(
                f"labels.{self.name}: vectors of up to {stored} true captions a sample, of which {own} "
                f"{'is' if own == 1 else 'are'} read here; input.captions_per_sample: {stored} takes all"
            )
        return notes

    def find(self, samples: Sequence[Wanted]) -> Iterator[RowLabels]:
        places, why = self.join(samples)
        rows: dict[int, _Row] = {}
        refusals: dict[int, Refusal] = {}
        for number, one in why.items():
            reason = Reason.REINFORCEMENT_BROKEN if one.what == BROKEN else Reason.NOT_REINFORCED
            refusals[number] = Refusal(samples[number].key, reason, f"labels: {one.detail}")
        for number in sorted(places, key=places.__getitem__):
            found = self._read(places[number], samples[number].key)
            if isinstance(found, Refusal):
                refusals[number] = found
            else:
                rows[number] = found
        values: dict[int, dict[str, LabelValue]] = {number: {} for number in rows}
        for layer in self._layers:  # each row group is read once, even where it alone fills the cache
            for number, row in rows.items():
                key = samples[number].key
                try:
                    value = self._value(layer, row)
                except ValueError as error:
                    value = Refusal(key, Reason.REINFORCEMENT_BROKEN, f"{row.where}: {error}")
                null = Refusal(key, Reason.NOT_REINFORCED, f"{row.where}: null")
                values[number][layer.name] = null if value is None else value
        for number in range(len(samples)):
            if number in refusals:
                yield RowLabels(self.name, {layer.name: refusals[number] for layer in self._layers})
                continue
            image, texts = rows[number].image, rows[number].captions
            yield RowLabels(
                self.name, values[number], places[number].kind, image=image, captions=texts, count=self._true_captions
            )

    def join(self, samples: Sequence[Wanted]) -> tuple[dict[int, Joined], dict[int, Why]]:
        """The row of each sample that has labels, and why others have none; counts them."""
        own: dict[int, Identity] = {}
        for number, sample in enumerate(samples):
            identity = dict(sample.identity)
            if self.has_digests and sample.image is not None:
                digest = sample.image if isinstance(sample.image, int) else digest_of(sample.image)
                identity[DIGEST] = f"{digest:016x}"
            own[number] = identity | ({KEY: sample.key} if KEY in self._joins else {})
        found, why = Joining(self._files, own, (ValueError,)).join(self._joins)
        self.counts.update(found[number].kind if number in found else why[number].what for number in own)
        return found, why

    def _read(self, at: Joined, key: str) -> _Row | Refusal:
        """A row of labels, or why it has nothing for the sample ``key``."""
        shard = self._index.shards[at.shard]
        group, row = self._index.row_group(at.shard, at.row)
        where = f"labels: {shard}, row {at.row}"
        try:
            samples = self._files.samples(shard, group)[0]
            width, height = (samples[side][row].as_py() or 0 for side in ("width", "height"))
            if min(width, height) < 1:
                raise Unreadable(f"an image of {width} x {height}")
            records: tuple[Augmentation, ...] = ()
            if self._crops:
                policy = self._config.augmentations
                stored = samples["augmentations"][row].as_py()
                records = parse_records(stored, policy.count, policy.size, width, height)
            image = LabelCrops(records, width, height)
            texts = true_captions(samples.slice(row, 1))[0] if self._true_captions else ()
        except ValueError as error:  # also of texts that are no UTF-8
            return Refusal(key, Reason.REINFORCEMENT_BROKEN, f"{where}: {error}")
        return _Row(where, shard, group, row, samples["key"][row].as_py(), samples.num_rows, image, texts)

    def _value(self, layer: Layer, row: _Row) -> LabelValue | None:
        """The value of a row, None where it is null. Raises Unreadable."""
        keys, values = self._files.values(layer, row.shard, row.group)
        if len(keys) != row.rows or keys[row.number].as_py() != row.key:
            raise Unreadable(f"{layer.name} does not have the rows of its samples")
        value = values[row.number]
        if isinstance(value, np.ndarray):
            least = layer.count
            if layer.texts == TRUE_CAPTION:
                least = int(self._labels.taken.layers[layer.name]["count"])
            width = layer.dim if layer.codebook is None else value.shape[1]
            if value.shape[0] < least or value.shape[1] != width:
                raise Unreadable(f"{layer.name} has vectors {[*value.shape]}, expected {[least, layer.dim]}")
            if np.isnan(value).all():
                return None
            vectors = value[:least].copy()  # a view would keep the row group
            if layer.codebook is None:
                checked_norms(vectors, layer.name)
            return vectors
        texts = None if value is None else value.as_py()
        if texts is None:
            return None
        if len(texts) != layer.count or None in texts:
            raise Unreadable(f"{len(texts)} captions in {layer.name}, expected {layer.count}")
        return [clean_text(text, self._config.input.limits.caption_chars) for text in texts]


class _Files(IndexedRows):
    """Row groups of the files of labels, with these ``columns`` of the samples. Keeps the last ones that were read."""

    def __init__(self, index: IdentityIndex, labels: Labels, reader: LabelFiles, columns: Sequence[str]) -> None:
        super().__init__(index, labels.taken.embedded)
        self._labels, self._reader, self._columns = labels, reader, columns
        self._open: OrderedDict[tuple[str, str], tuple[contextlib.ExitStack, LayerFile]] = OrderedDict()
        self._groups: OrderedDict[tuple[str, str, int], tuple[Any, int]] = OrderedDict()  # with their bytes

    def samples(self, shard: str, group: int) -> tuple[pa.Table, list[Identity], dict[str, dict[str, int]]]:
        """The samples of a row group without images, what they state, and the first row of each value by kind."""

        def read(file: LayerFile, group: int) -> tuple[Any, int]:
            columns = ["key", *self._columns, *columns_of_identities(file.footer[1], images=False)]
            table = file.read_row_group(group, columns)
            found = [{KEY: key, **one} for key, one in zip(table["key"].to_pylist(), stated(table), strict=True)]
            rows: dict[str, dict[str, int]] = {}
            for row, one in enumerate(found):
                for kind, value in one.items():
                    rows.setdefault(kind, {}).setdefault(value, row)
            return (table, found, rows), 4 * table.nbytes

        samples: tuple[pa.Table, list[Identity], dict[str, dict[str, int]]] = self._cached(SAMPLES, shard, group, read)
        return samples

    def near(self, kind: str, values: Sequence[str]) -> dict[int, RowOf]:
        """The rows of ``values`` that are in a row group that was read last, by place in ``values``."""
        found: dict[int, RowOf] = {}
        for layer, shard, group in self._groups if kind != KEY else ():  # only lone keys join
            if layer == SAMPLES:
                rows = self._groups[layer, shard, group][0][2].get(kind, {})
                number = self.index.numbers[shard]
                first = sum(self.index.groups[number][:group])
                found |= {at: RowOf(number, first + rows[value]) for at, value in enumerate(values) if value in rows}
        return found

    def stated(self, row: RowOf) -> Identity:
        group, number = self.index.row_group(*row)
        found = self.samples(self.index.shards[row.shard], group)[1]
        if number >= len(found):
            raise RefusedFile(f"row group {group} has {len(found)} rows, and others by the index")
        return found[number]

    def values(self, layer: Layer, shard: str, group: int) -> tuple[pa.ChunkedArray, Any]:
        """The keys and values of a row group of a layer."""

        def read(file: LayerFile, group: int) -> tuple[Any, int]:
            table = file.read_row_group(group)
            if layer.codebook is not None:
                codes, valid = tensor_rows(table[layer.kind.values])
                rows = [row if one else None for row, one in zip(codes, valid, strict=True)]
                return (table["key"], rows), table.nbytes
            values = layer.kind.decode(table) if layer.kind.vectors else table[layer.kind.values]
            return (table["key"], values), table.nbytes + values.nbytes

        return self._cached(layer.name, shard, group, read)

    def _cached(self, layer: str, shard: str, group: int, read: Any) -> Any:
        place = (layer, shard, group)
        if place not in self._groups:
            file = self._reader.read(layer, shard, lambda: self._file(layer, shard))
            self._groups[place] = self._reader.read(layer, shard, lambda: read(file, group), group)
            while sum(size for _, size in self._groups.values()) > _CACHED_BYTES and len(self._groups) > 1:
                self._groups.popitem(last=False)
        self._groups.move_to_end(place)
        return self._groups[place][0]

    def _file(self, layer: str, shard: str) -> LayerFile:
        name = (layer, shard)
        if name not in self._open:
            taken, samples = self._labels.taken, None if layer == SAMPLES else self._file(SAMPLES, shard)
            fingerprint = taken.samples if layer == SAMPLES else str(taken.layers[layer]["fingerprint"])
            stack = contextlib.ExitStack()
            with stack:
                file = stack.enter_context(self._reader.store.open_layer(layer, shard, fingerprint, whole=False))
                if samples is not None:
                    of_samples, own = (parse_footer(one.metadata) for one in (samples, file))
                    if reason := other_origin(of_samples, own):
                        raise alignment_error(self._reader.store, layer, shard, reason)
                self._open[name] = (stack.pop_all(), file)
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(name)
        return self._open[name][1]

    def close(self) -> None:
        for stack, _ in self._open.values():
            stack.close()
        self._open.clear()
