"""The rows of a report: those of a seeded sample of row groups, kept as a few numbers and texts each.

Targets are those of a batch as a student would get them: how certain each teacher is, and how far teachers agree. For a
batch of B pairs, teacher t at scale s gives P = softmax(s I_t X_t^T) for images, and the transpose for texts. The
entropy of P is divided by log B: 0 is one-hot, 1 uniform. The agreement of a sample is 1 - the Jensen-Shannon
divergence of the teachers' P at their scales / log T; both are means over the two directions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reinforce.dataset import vectors
from reinforce.dataset.aligned import AlignedLayers, layer_errors
from reinforce.dataset.index import read_index
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layer_file import row_errors
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, captions_layer, embeddings_layer
from reinforce.dataset.reading import Dataset
from reinforce.dataset.vectors import Floats, agreements, entropies, normalized, softmax
from reinforce.dataset.view import View
from reinforce.errors import UserError
from reinforce.images.backends import known_operations
from reinforce.source.samples import parse_json
from schemas import TRUE_CAPTIONS
from schemas.seeds import permutation

_SHARDS = 64  # opened at least, if there are so many; more only while these have fewer rows than the limit
_GROUPS = 256  # row groups at most: each takes a request for every layer


@dataclass(frozen=True, order=True)
class SampledGroup:
    """A row group, and how many of its rows are looked at, from the first; with a view, of those that it keeps."""

    shard: str
    number: int
    rows: int


#: Where a sample is: its row group, and the row in it.
Place: TypeAlias = tuple[SampledGroup, int]


@dataclass(frozen=True)
class Selection:
    """The row groups that are looked at, in the order of the shards.

    ``samples`` is the number of samples of the dataset, estimated from the opened shards unless it is ``exact``.
    """

    groups: tuple[SampledGroup, ...]
    samples: int
    exact: bool
    problems: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    def by_shard(self) -> dict[str, list[SampledGroup]]:
        found: dict[str, list[SampledGroup]] = {}
        for group in self.groups:
            found.setdefault(group.shard, []).append(group)
        return found


def select(data: Dataset, limit: int, seed: int, view: View | None = None) -> Selection:
    """Select row groups with at most ``limit`` rows together, the last of them cut; of a ``view`` its rows.

    Reads the index and the footers of the shards that it opens; a shard whose footer is damaged is a problem. A view
    has the rows of all shards.
    """
    if view is not None:
        kept = {shard: [*view.kept[shard]] for shard in data.shards if any(view.kept.get(shard, ()))}
        return Selection(_cut(data, kept, limit, seed), sum(map(sum, kept.values())), True, ())
    opened: dict[str, list[int]] = {}
    problems = []
    total = 0
    for shard in (data.shards[place] for place in permutation(len(data.shards), seed, "inspected shards").tolist()):
        if len(opened) >= min(_SHARDS, limit) and total >= limit:
            break
        store, fingerprint = data.store, data.fingerprints[SAMPLES]
        try:
            opening = store.open_layer(SAMPLES, shard, fingerprint, whole=False)
            with layer_errors(store, SAMPLES, shard), opening as file:
                groups = range(file.num_row_groups)
                opened[shard] = [file.metadata.row_group(number).num_rows for number in groups]
        except UserError as error:
            problems.append(str(error))
            continue
        total += sum(opened[shard])
    exact, samples = len(opened) == len(data.shards), total
    if not exact:
        index = read_index(data.store, SAMPLES, data.fingerprints[SAMPLES]).table
        known = index.filter(pc.is_in(index["shard"], value_set=pa.array(data.shards, pa.string())))
        samples, exact = pc.sum(known["rows"]).as_py() or 0, len(known) == len(data.shards)
        if not exact:
            samples = round((samples + total) / max(1, len(known) + len(opened)) * len(data.shards))
    return Selection(_cut(data, opened, limit, seed), samples, exact, tuple(problems))


def _cut(data: Dataset, opened: dict[str, list[int]], limit: int, seed: int) -> tuple[SampledGroup, ...]:
    """Row groups with at most ``limit`` rows together, in the order of the shards."""
    groups = [
        SampledGroup(shard, n, rows) for shard, counts in opened.items() for n, rows in enumerate(counts) if rows > 0
    ]
    chosen: list[SampledGroup] = []
    for place in permutation(len(groups), seed, "inspected row groups").tolist():
        if limit <= 0 or len(chosen) == _GROUPS:
            break
        group = groups[place]
        chosen.append(SampledGroup(group.shard, group.number, min(group.rows, limit)))
        limit -= group.rows
    places = {shard: place for place, shard in enumerate(data.shards)}
    return tuple(sorted(chosen, key=lambda group: (places[group.shard], group.number)))


_SHOWN = 12  # samples of each side
LEFT_OUT, KEPT, NO_VALUE = "left out", "kept", "left out, without a value"


@dataclass
class RuleSide:
    """The samples of one side of a rule, those that are shown first: the distance by which each is chosen, the value by
    which the rule decides, '' if it has none, and where the sample is."""

    name: str
    samples: list[tuple[float, str, Place]] = field(default_factory=list)

    def add(self, group: SampledGroup, places: np.ndarray, distances: np.ndarray, values: np.ndarray | None) -> None:
        """Add the rows at some places of a row group; the smallest distances are shown."""
        for place in places[np.argsort(distances[places], kind="stable")[:_SHOWN]].tolist():
            value = "" if values is None or np.isnan(values[place]) else f"{values[place]:.4g}"
            self.samples.append((float(distances[place]), value, (group, place)))
        self.samples = sorted(self.samples, key=lambda sample: sample[0])[:_SHOWN]

    @property
    def shown(self) -> list[tuple[str, Place]]:
        """The value and place of each sample."""
        return [(value, place) for _, value, place in self.samples]


@dataclass
class RuleSides:
    """A rule of a view, the ``line`` of the view's report on it, and its sides. ``value`` is the place of its values
    among those that the view has of each row, None if it has none of the rule."""

    number: int
    rule: Mapping[str, Any]
    line: Mapping[str, Any]
    value: int | None
    sides: tuple[RuleSide, ...] = field(
        default_factory=lambda: (RuleSide(LEFT_OUT), RuleSide(KEPT), RuleSide(NO_VALUE))
    )

    @property
    def text(self) -> str:
        return json.dumps(self.rule, ensure_ascii=False)

    def add(
        self, group: SampledGroup, codes: np.ndarray, null: np.ndarray, order: np.ndarray, stored: np.ndarray
    ) -> None:
        """Add the rows of a row group: ``codes`` number the rule that leaves a row out, 0 for none, and ``stored`` are
        the values of the view [rows, N]."""
        threshold, values, distances = self.line.get("threshold"), None, order
        if self.value is not None and isinstance(threshold, int | float):
            values = stored[:, self.value].astype(np.float64)
            distances = np.where(np.isnan(values), order, np.abs(values - threshold))
        out, kept, without = self.sides
        here = codes == self.number
        out.add(group, np.flatnonzero(here & ~null), distances, values)
        kept.add(group, np.flatnonzero((codes == 0) | (codes > self.number)), distances, values)
        without.add(group, np.flatnonzero(here & null), order, None)


class RuleSamples:
    """Samples on both sides of each rule of a view, some that it leaves out and some that it keeps, from the row groups
    that are added.

    Where a rule keeps the largest values, these are the samples with the values next to its threshold; else random
    ones. A view may be untrusted: its expressions are not computed, and values are those that it has.
    """

    def __init__(self, data: Dataset, view: View, seed: int) -> None:
        self.view, self._seed = view, seed
        if len(view.rules) != len(view.report):
            raise UserError(f"{data.store.url}: view {view.name} does not state what each rule takes. Make it again.")
        keeps = (rule.get("keep") for rule in view.rules)
        valued = [place for place, keep in enumerate(keeps) if keep and not keep.get("within")]
        self._count = len(valued)
        self.rules = [
            RuleSides(place + 1, rule, line, valued.index(place) if place in valued else None)
            for place, (rule, line) in enumerate(zip(view.rules, view.report, strict=True))
        ]

    def add(self, group: SampledGroup, tables: Mapping[str, pa.Table], reasons: pa.Table) -> np.ndarray:
        """Add a row group; returns the places of the rows that the view keeps. Raises UserError."""
        from pandas.util import hash_array

        keys = tables[SAMPLES]["key"]
        if not reasons["key"].equals(keys):
            raise UserError(f"view {self.view.name} is of other samples of {group.shard}. Make it again.")
        left_out = reasons["left_out"]
        rule_numbers = pc.struct_field(pc.extract_regex(left_out, r"^(?P<number>\d+) "), "number")
        codes = pc.fill_null(rule_numbers.cast(pa.int64()), 0).to_numpy()  # 0 where a row is kept
        null = pc.fill_null(pc.ends_with(left_out, ": null"), False).to_numpy()
        salt = hashlib.blake2b(f"{self._seed} {group.shard}".encode(), digest_size=8).hexdigest()
        order = hash_array(keys.to_numpy(), hash_key=salt, categorize=False).astype(np.float64)
        lists = reasons["values"].combine_chunks()
        if lists.null_count or (np.asarray(lists.value_lengths()) != self._count).any():
            raise UserError(f"view {self.view.name} does not have a value for each of its rules. Make it again.")
        stored = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), self._count)
        for rule in self.rules:
            rule.add(group, codes, null, order, stored)
        return np.flatnonzero(codes == 0)


_COLUMNS = ["key", "caption", TRUE_CAPTIONS, "width", "height", "augmentations", "metadata"]
#: Fields of metadata that may have the class of a sample, in the order of preference.
_CLASSES = ("class", "label", "category")
BATCH = 256
#: Logit scales at which the entropy is measured.
SCALES = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 70, 85, 100, 125, 150, 200)
_ENTROPY_BATCHES = 8
NORM_BINS = np.linspace(0.98, 1.02, 41)


@dataclass
class LayerFigures:
    """Rows of a layer: how many, how many are null, and the norms of their vectors."""

    rows: int = 0
    null: int = 0
    vectors: int = 0
    outside: int = 0  # vectors whose norm differs from 1 by more than ``vectors.NORM_TOLERANCE``
    lowest: float = np.inf
    highest: float = -np.inf
    norms: np.ndarray = field(default_factory=lambda: np.zeros(len(NORM_BINS) - 1, np.int64))

    def add_vectors(self, values: Floats) -> None:
        """Add vectors [R, N, D], NaN in null rows."""
        norms = np.linalg.norm(values, axis=2)
        valid = np.isfinite(norms).all(axis=1)
        self.rows, self.null = self.rows + len(valid), self.null + int((~valid).sum())
        norms = norms[valid].ravel()
        if len(norms):
            self.vectors += len(norms)
            self.outside += int((np.abs(norms - 1) > vectors.NORM_TOLERANCE).sum())
            self.lowest, self.highest = min(self.lowest, float(norms.min())), max(self.highest, float(norms.max()))
            self.norms += np.histogram(norms.clip(NORM_BINS[0], NORM_BINS[-1]), NORM_BINS)[0]


@dataclass
class Targets:
    """Collects rows in batches. ``scales`` has the logit scale in force of each teacher with vectors of both sides."""

    scales: Mapping[str, float | None]
    agreement: list[np.ndarray] = field(default_factory=list)
    _rows: list[dict[str, tuple[Floats, Floats]]] = field(default_factory=list)
    _waiting: int = 0
    _entropies: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, rows: Mapping[str, tuple[Floats, Floats]]) -> None:
        """Add rows: by teacher, the vectors [R, D] of the first augmentation and of the true caption; NaN if null."""
        self._rows.append(dict(rows))
        self._waiting += len(next(iter(rows.values()))[0]) if rows else 0
        while self._waiting >= 2 * BATCH:  # what remains in the end is a batch of at least this size
            self._take(BATCH)

    def finish(self) -> None:
        """Use the rows that are left."""
        if self._waiting:
            self._take(self._waiting)

    def entropy(self, teacher: str) -> list[float]:
        """Mean entropy at each of ``SCALES``; empty without rows."""
        found = self._entropies.get(teacher)
        return np.mean(found, axis=0).tolist() if found else []

    def agreements(self) -> np.ndarray:
        """Agreement of each row that was added, NaN where there is none."""
        return np.concatenate([np.empty(0), *self.agreement])

    def _take(self, count: int) -> None:
        joined = {
            teacher: tuple(np.concatenate([rows[teacher][side] for rows in self._rows]) for side in (0, 1))
            for teacher in self.scales
        }
        self._rows = [{teacher: (images[count:], texts[count:]) for teacher, (images, texts) in joined.items()}]
        self._waiting -= count
        batch = {teacher: (images[:count], texts[:count]) for teacher, (images, texts) in joined.items()}
        agreement = np.full(count, np.nan)
        valid = np.ones(count, bool)
        for images, texts in batch.values():
            valid &= np.isfinite(images).all(axis=1) & np.isfinite(texts).all(axis=1)
        if valid.sum() >= 2:
            cosines = {t: normalized(i[valid]) @ normalized(x[valid]).T for t, (i, x) in batch.items()}
            for teacher, values in cosines.items():
                measured = self._entropies.setdefault(teacher, [])
                if len(measured) < _ENTROPY_BATCHES:
                    both = ([entropies(softmax(one)).mean() for one in (s * values, s * values.T)] for s in SCALES)
                    measured.append(np.array([float(np.mean(one) / np.log(len(values))) for one in both]))
            scaled = [scale * cosines[t] for t, scale in self.scales.items() if scale is not None]
            if len(scaled) > 1:
                agreed = [agreements([softmax(one) for one in side]) for side in (scaled, [one.T for one in scaled])]
                agreement[valid] = np.mean(agreed, axis=0)
        self.agreement.append(agreement)


@dataclass
class SampledRows:
    """Values of the sampled rows, one entry of each list per row, in the order of ``places``.

    ``areas`` and ``operations`` are [R, K] by row group: the crop's share of the image, and a bit for each of
    ``known_operations``. ``crops`` of a teacher are similarities of the first true caption to each augmentation [R, K];
    ``texts`` of a teacher and kind of text are those of each caption, mean over the augmentations [R, N]. ``numbers``
    are scores by layer and name. ``image_teachers`` are those without vectors of texts, with their number of
    augmentations, and ``images`` of them and of ``compared``, the first teacher of images, are the means of the
    augmentations' vectors, float16 [R, D]. ``classes`` are those that the metadata states.
    """

    teachers: list[str]
    captioners: list[str]
    targets: Targets
    places: list[Place] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)  # the true ones
    synthetic: dict[str, list[list[str] | None]] = field(default_factory=dict)
    areas: list[np.ndarray] = field(default_factory=list)
    operations: list[np.ndarray] = field(default_factory=list)
    crops: dict[str, list[np.ndarray]] = field(default_factory=dict)
    texts: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    numbers: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    image_teachers: dict[str, int] = field(default_factory=dict)
    images: dict[str, list[np.ndarray]] = field(default_factory=dict)
    compared: str | None = None
    classes: list[str | None] = field(default_factory=list)
    layers: dict[str, LayerFigures] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_texts(self) -> bool:
        """Whether some row has a caption, or may have one of a captioner."""
        return bool(self.captioners) or any(self.captions)

    def image_vectors(self, teacher: str) -> np.ndarray:
        """The mean vectors of a teacher's augmentations [R, D], NaN where there is none."""
        return self.joined(self.images.get(teacher)).astype(np.float32)

    def similarities(self, teacher: str, texts: str) -> np.ndarray:
        """Similarity of each caption [R, N], NaN where there is none; [R, 0] if the teacher has no vectors of both."""
        return self.joined(self.texts.get((teacher, texts)))

    def crop_similarities(self, teacher: str) -> np.ndarray:
        """Similarity of the first true caption to each augmentation [R, K]; [R, 0] as above."""
        return self.joined(self.crops.get(teacher))

    def joined(self, parts: list[np.ndarray] | None) -> np.ndarray:
        """Arrays [n, K] of row groups one below the other [R, K], with as many columns as all have; [R, 0] of none."""
        count = min((part.shape[1] for part in parts or ()), default=0)
        return np.concatenate([part[:, :count] for part in parts]) if parts else np.empty((len(self), 0), np.float32)

    def scores(self) -> dict[tuple[str, str], np.ndarray]:
        """Each score of all rows [R], NaN where there is none, by layer and name."""
        return {name: np.concatenate(parts) for name, parts in self.numbers.items()}

    def true_similarity(self, teacher: str) -> np.ndarray:
        """Similarity of the first true caption, mean over the augmentations [R]; NaN where there is none."""
        values = self.crop_similarities(teacher)
        return values.mean(axis=1) if values.shape[1] else np.full(len(self), np.nan, np.float32)


def read_rows(data: Dataset, selection: Selection, sides: RuleSamples | None = None) -> SampledRows:
    """Read the selected row groups, without images. One that cannot be read is a problem of the rows.

    With ``sides``, only the rows that its view keeps; kept and excluded rows are added to ``sides``.
    """
    inputs, stored = ("images", TRUE_CAPTION, *data.captioners), data.manifest["layers"]
    encoded = {name: {one for one in inputs if embeddings_layer(name, one) in data.layers} for name in data.teachers}
    both = [name for name, of in encoded.items() if {"images", TRUE_CAPTION} <= of]
    alone = [name for name, of in encoded.items() if of == {"images"}]
    rows = SampledRows(
        [*data.teachers],
        [*data.captioners],
        Targets({name: data.manifest["teachers"][name].get("logit_scale") for name in both}),
        synthetic={name: [] for name in data.captioners},
        layers={name: LayerFigures() for name in data.layers if name != SAMPLES},
        image_teachers={name: stored[embeddings_layer(name, "images")]["count"] for name in alone},
        compared=next((name for name, of in encoded.items() if "images" in of), None),
        problems=[*selection.problems],
    )
    layers = AlignedLayers(data.store, data.fingerprints, {SAMPLES: _COLUMNS})
    for shard, groups in selection.by_shard().items():
        try:
            reasons = sides.view.rows.read(data.store, shard, values=True) if sides else None
            with layers.open(shard, whole=False) as files:
                for group in groups:
                    tables = files.read(group.number)
                    places = np.arange(group.rows)
                    with row_errors(f"{data.store.url}, shard {shard}"):
                        if sides and reasons:
                            places = sides.add(group, tables, reasons[group.number])[: group.rows]
                        _add(rows, group, places, {name: table.take(places) for name, table in tables.items()})
        except UserError as error:
            rows.problems.append(str(error))
    rows.targets.finish()
    return rows


def _add(rows: SampledRows, group: SampledGroup, places: np.ndarray, tables: Mapping[str, pa.Table]) -> None:
    """Add the rows at some places of a row group. Nothing is added if something in it cannot be read."""
    samples = tables[SAMPLES]
    areas, operations = _augmentations(samples)
    names = [embeddings_layer(t, i) for t in rows.teachers for i in ("images", TRUE_CAPTION, *rows.captioners)]
    decoded = {name: vectors.decode(tables[name]) for name in names if name in tables}
    crops, similarities = _similarities(rows, samples, decoded)
    captions = {name: tables[captions_layer(name)]["captions"].to_pylist() for name in rows.captioners}
    rows.keys += samples["key"].to_pylist()
    rows.captions += true_captions(samples)
    rows.places += [(group, place) for place in places.tolist()]
    rows.areas.append(areas)
    rows.operations.append(operations)
    for name, texts in captions.items():
        rows.synthetic[name] += texts
    for name, figures in rows.layers.items():
        column = kind_of(name).values
        if name in decoded:
            figures.add_vectors(decoded[name])
        elif column is not None:
            nulls = tables[name][column].null_count
            figures.rows, figures.null = figures.rows + len(samples), figures.null + nulls
        for number, values in kind_of(name).numbers(tables[name]).items():
            rows.numbers.setdefault((name, number), []).append(values)
    rows.classes += map(_class_of, samples["metadata"].to_pylist())
    for teacher in dict.fromkeys([*rows.image_teachers, *([rows.compared] if rows.compared else [])]):
        unit = normalized(decoded[embeddings_layer(teacher, "images")])
        rows.images.setdefault(teacher, []).append(unit.mean(axis=1).astype(np.float16))
    for teacher, values in crops.items():
        rows.crops.setdefault(teacher, []).append(values)
    for which, values in similarities.items():
        rows.texts.setdefault(which, []).append(values)
    rows.targets.add(
        {
            teacher: (
                decoded[embeddings_layer(teacher, "images")][:, 0],
                decoded[embeddings_layer(teacher, TRUE_CAPTION)][:, 0],
            )
            for teacher in rows.targets.scales
        }
    )


def _class_of(metadata: str | None) -> str | None:
    """The class that metadata states, a name or a number."""
    document = None if metadata is None else parse_json(metadata.encode())
    stated = (document.get(name) for name in _CLASSES) if isinstance(document, dict) else ()
    found = next((value for value in stated if isinstance(value, str | int) and value != ""), None)
    return None if found is None else str(found)


def _similarities(
    rows: SampledRows, samples: pa.Table, decoded: Mapping[str, Floats]
) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """The similarities of a row group as in ``crops`` and ``texts`` of ``rows``; each true caption counts once."""
    crops, found = {}, {}
    for teacher in rows.teachers:
        images = decoded.get(embeddings_layer(teacher, "images"))
        for inputs in (TRUE_CAPTION, *rows.captioners):
            texts = decoded.get(embeddings_layer(teacher, inputs))
            if images is None or texts is None:
                continue
            found[teacher, inputs] = vectors.mean_cosines(texts, images)
            if inputs == TRUE_CAPTION:
                found[teacher, inputs][~vectors.own_slots(samples, texts.shape[1])] = np.nan
                one = normalized(texts[:, :1])
                crops[teacher] = np.einsum("rnd,rkd->rk", one, normalized(images))
    return crops, found


def _augmentations(samples: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Areas of the crops as shares of their images, and bits of the operations: float32 and int32 [R, K].

    K is the smallest number of records of a row.
    """
    column = samples["augmentations"].combine_chunks()
    offsets = np.asarray(column.offsets)
    count = int(np.diff(offsets).min(initial=0 if not len(samples) else 2**16))
    places = offsets[:-1, None] + np.arange(count)
    records = column.values
    crop = records.field("crop")
    crops = np.asarray(crop.field("width")).astype(np.float64) * np.asarray(crop.field("height"))
    pixels = samples["width"].to_numpy().astype(np.float64) * samples["height"].to_numpy()
    areas = crops[places] / np.maximum(pixels, 1)[:, None]
    operations = records.field("ops")
    bits = np.zeros(len(operations), np.int32)
    names = pc.index_in(operations.values.field("name"), value_set=pa.array(known := known_operations()))
    bit = np.asarray(names.fill_null(len(known)))
    lengths = np.asarray(pc.fill_null(pc.list_value_length(operations), 0))
    starts = np.asarray(operations.offsets)[:-1]
    for nth in range(int(lengths.max(initial=0))):
        has = lengths > nth
        bits[has] |= (1 << bit[starts[has] + nth]).astype(np.int32)
    return areas.astype(np.float32), bits[places]
