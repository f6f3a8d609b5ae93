"""What a producer of layers must offer, the row groups that it makes tables of, and what a lease refuses or sets aside.

Refusals are of samples, of rows of a layer, or of the shard as a whole.

A layer file that is damaged, or whose rows are not those of the samples, is set aside, and the run computes it again
after its other shards. Samples decide the rows, so they stay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset import vectors
from reinforce.dataset.codecs.codebooks import find_codec, load
from reinforce.dataset.index import file_damage, set_aside
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layer_file import LayerFile, RefusedFile
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.dataset.store import Store, other_origin, parse_footer
from reinforce.engine.messages import raising_layer_failure, shorten
from reinforce.engine.worker.decode import Row
from reinforce.engine.worker.inference import LayerEncoder, Outputs, Session
from reinforce.engine.worker.models import Bound, Demand, Floats, LoadedModels, rows_per_batch
from reinforce.engine.worker.self_test import Start, test_rows
from reinforce.errors import UserError
from reinforce.source.samples import Refusal
from schemas import WHOLE_SHARD, Reason
from teachers.spec import ModelInfo, Precision

Mask = npt.NDArray[np.bool_]
#: What models see, and what is halved, of the augmented images.
CROPS: Final = "crops"
_EXAMPLE_CHARS = 300
_MISSING = "it does not exist any more"
_OTHER_ROWS = "its rows are not those of the samples"


class RowGroupTables:
    """The rows of one row group, the outputs of their batches, and the tables of their layers so far.

    ``stored`` are tables of layers that were committed before. Raises MisalignedLayer unless they have the keys of the
    rows, in the same order. In ``tables``, samples that were stored have the columns that producers name.
    """

    def __init__(self, rows: Sequence[Row], outputs: Sequence[Outputs], stored: Mapping[str, pa.Table]) -> None:
        self.rows, self.keys = rows, [row.key for row in rows]
        self.tables = dict(stored)
        self._outputs = outputs
        self.known: dict[str, Any] = {}  # values of layers, whose tables need not be decoded
        for name, table in stored.items():
            if table["key"].to_pylist() != self.keys:
                raise MisalignedLayer(name)

    def outputs(self, layer: str) -> list[Any]:
        """The outputs of a layer in the batches that have some, in order."""
        return [outputs[layer] for outputs in self._outputs if layer in outputs]

    def values(self, layer: str) -> Any:
        """The value of each row in a layer that was committed or computed before, as its kind decodes it."""
        if layer not in self.known:
            self.known[layer] = kind_of(layer).decode(self.tables[layer])
        return self.known[layer]


@dataclass(frozen=True)
class Capability:
    """What a model computes for layers of one kind, to be tested before a run and measured by ``reinforce check``.

    ``check`` tests a full batch of a size, or with None a few inputs -> the norms of vectors, if it returns some; it
    raises UserError. ``start`` begins a batch, with a number of ``outputs`` for each input.
    """

    check: Callable[[int | None], Floats | None]
    start: Start
    outputs: int = 1

    def prepare(self, size: int) -> Callable[[], Any]:
        """A function that runs a batch of a size on the accelerator."""
        return self.start(test_rows(size))


class Producer(LayerEncoder):
    """Computes the layers of one kind in one shard, and records what they refuse in ``refusals``.

    ``source`` is the URL of the source shard that is recorded.
    """

    #: Name of the kind, and inputs whose FLOPs are counted: compiled towers pad small batches. 0 if none are.
    kind: ClassVar[str]
    counted: ClassVar[int] = 0

    def __init__(
        self, layers: Iterable[Layer], session: Session, refusals: Refusals | None = None, source: str = ""
    ) -> None:
        super().__init__(layers, session)
        self.refusals, self.source = refusals or Refusals(), source
        self.crops = any(layer.sees == CROPS for layer in self.computed)
        self.whole = [session.models.of(layer).image for layer in self.computed if layer.sees == "image"]

    # -- models

    @staticmethod
    def side(models: LoadedModels, name: str, info: ModelInfo, precision: Precision) -> Capability | None:
        """The side of the loaded model ``name`` that makes such layers; None if it makes none, or cannot be tested."""
        raise NotImplementedError

    @staticmethod
    def full_batch(models: LoadedModels, layer: Layer, config: Config) -> int:
        """Inputs of a full batch of a layer's model."""
        rows = models.batches.fitting("rows", rows_per_batch(config))
        if layer.sees == CROPS:
            return models.batches.fitting(CROPS, rows * config.augmentations.count)
        return rows

    def demand(self, layer: Layer, rows: int) -> Demand:
        one = "one augmented image" if layer.sees == CROPS else "one image"
        bound: Bound = CROPS if layer.sees == CROPS and rows == 1 else "rows"
        fix = f"{layer.kind.section}.{layer.model}: a smaller model, or `precision: bf16`"
        return Demand(bound, f"{layer.name}: {one} does", fix)

    # -- tables

    @property
    def sample_columns(self) -> Collection[str]:
        """Columns of the samples, besides keys, that it needs in files that were stored before, if they are there."""
        return ()

    def schema(self, layer: Layer) -> pa.Schema:
        """The schema of a layer's file."""
        return layer.schema(self.session.config.images, getattr(self.session.models.of(layer), "dim", None))

    def tables(self, group: RowGroupTables) -> Iterator[tuple[str, pa.Table]]:
        """The tables of a row group by layer; records what is refused. Raises LayerFailure."""
        for layer in self.layers:
            table = group.tables[layer.name] = self.table(layer, group)
            yield layer.name, table

    @abstractmethod
    def table(self, layer: Layer, group: RowGroupTables) -> pa.Table:
        """The table of a row group."""

    def tensor_table(
        self, layer: Layer, group: RowGroupTables, values: Mapping[str, npt.NDArray[Any]], valid: Mask
    ) -> pa.Table:
        """The table of ``values`` [rows, *shape] by column, null where they are not ``valid`` [rows]."""
        schema, codebook = self.schema(layer), layer.codebook_at(self.session.config.output)
        columns = [pa.array(group.keys, pa.string())]
        for field in [*schema][1:]:
            stored = values[field.name].astype(field.type.value_type.to_pandas_dtype())
            stored[~valid] = 0
            columns.append(vectors.tensor_column(stored, field.type.shape, valid))
        table = pa.table(columns, schema=schema)
        return table.replace_schema_metadata(None if codebook is None else codebook.metadata())

    def footer(self) -> dict[str, str]:
        """What the footers of all files of the shard record of its layers."""
        return {}

    # -- refusals

    def refuse_not_finite(
        self, layer: Layer, group: RowGroupTables, given: Mask, finite: Mask, what: str = "NaN or infinity"
    ) -> Mask:
        """Record the ``given`` rows that are not ``finite`` -> those that are [rows]."""
        return self.refuse(layer, group, given, finite, Reason.NOT_FINITE, f"{layer.model} returned {what}")

    def refuse(
        self, layer: Layer, group: RowGroupTables, given: Mask, usable: Mask, reason: Reason, detail: str
    ) -> Mask:
        """Record the ``given`` rows that are not ``usable`` -> those that are [rows]."""
        for row in np.flatnonzero(given & ~usable):
            self.refusals.add(layer.name, Refusal(group.keys[row], reason, detail))
        return given & usable

    def refuse_unreadable(self, layer: Layer, group: RowGroupTables) -> Mask:
        """Record the rows of which the image cannot be read any more -> those of which it can [rows]."""
        for row in group.rows:
            if row.unreadable and not self.has_label(layer, row):
                self.refusals.add(layer.name, row.unreadable)
        return np.array([row.unreadable is None for row in group.rows], bool)

    def labels(self, layer: Layer, rows: Sequence[Row]) -> Iterator[tuple[int, Any]]:
        """The values that labels of others have, with the place of their row; records why others have none, unless a
        model computes them."""
        computed = layer in self.computed
        for place, row in enumerate(rows if layer.labels is not None else ()):
            if self.has_label(layer, row):
                yield place, row.values[layer.name]
            elif not computed and isinstance(why := row.values.get(layer.name, row.unreadable), Refusal):
                self.refusals.add(layer.name, why)  # of the image, if its decode process crashed

    @staticmethod
    def has_label(layer: Layer, row: Row) -> bool:
        """Whether published labels cover a row."""
        return layer.labels is not None and isinstance(row.values.get(layer.name), list | np.ndarray)

    def without_label(self, layer: Layer, rows: Sequence[Row]) -> list[int]:
        """The places of the rows whose values are computed."""
        if layer.labels is None:
            return [*range(len(rows))]
        return [place for place, row in enumerate(rows) if not self.has_label(layer, row)]


class Embeddings(Producer):
    """Layers of vectors. A row that is not finite, or has a vector of length 0 in its codec, is null and refused."""

    @abstractmethod
    def vectors(self, layer: Layer, group: RowGroupTables) -> tuple[Floats, Mask]:
        """Computed embeddings [rows, count, dim], and which rows have some [rows]; records why others have none."""

    def table(self, layer: Layer, group: RowGroupTables) -> pa.Table:
        codec = find_codec(layer.dtype)
        shape = (len(group.rows), layer.count, layer.dim or 0)
        values, valid = np.zeros(shape, np.float32), np.zeros(shape[0], bool)
        if layer in self.computed:
            values, valid = self.vectors(layer, group)
            values = codec.prepare(values)
        codes: dict[int, Any] = {}  # of labels, which are stored as they are
        for place, value in self.labels(layer, group.rows):
            valid[place] = True
            if codec.fitted:
                codes[place] = value
            else:
                values[place] = value
        finite = np.asarray(np.isfinite(values).all(axis=(1, 2)))
        valid = self.refuse_not_finite(layer, group, valid, finite)
        lengths = (values != 0).any(axis=2).all(axis=1)  # a zero vector has no direction
        lengths[[*codes]] = True
        valid = self.refuse(layer, group, valid, lengths, Reason.ZERO_VECTOR, vectors.zero_vector(codec))
        codebook = layer.codebook_at(self.session.config.output)
        if codebook is not None:
            load(codebook).codec.require_encoder()  # what is lost or missing ends the run: no model is the cause
        with raising_layer_failure(layer.name):
            columns = vectors.encode_as(values, codec, codebook, valid)
        if codes:
            stored, kept = (of.copy() for of in vectors.tensor_rows(columns[0]))
            for place, value in codes.items():
                stored[place], kept[place] = value, True
            columns = [vectors.tensor_column(stored, [*columns[0].type.shape], kept)]
        table = pa.table([pa.array(group.keys, pa.string()), *columns], schema=self.schema(layer))
        return table.replace_schema_metadata(None if codebook is None else codebook.metadata())


class Refusals:
    """Refusals by layer, kept until they are written to the quarantine.

    ``shard_reason`` is the reason for which the shard as a whole is refused, or None. ``cleaned`` counts the captions
    that the rules of ``clean`` have changed or dropped, by captioner and rule.
    """

    def __init__(self) -> None:
        self.shard_reason: str | None = None
        self.cleaned: dict[str, Counter[str]] = {}
        self.by_layer: dict[str, list[Refusal]] = {}

    def add(self, layer: str, refusal: Refusal) -> None:
        self.by_layer.setdefault(layer, []).append(refusal)
        if refusal.key is None and refusal.reason.value in WHOLE_SHARD:
            self.shard_reason = refusal.reason.value

    def counts(self) -> dict[str, int]:
        return dict(Counter(refusal.reason.value for rows in self.by_layer.values() for refusal in rows))

    @property
    def samples(self) -> int:
        """Number of samples that are refused in any layer."""
        return len({row.key for rows in self.by_layer.values() for row in rows} - {None})

    def examples(self, redact: Callable[[str], str]) -> dict[str, str]:
        """Key and detail of the first refusal of each reason, in one line; ``redact`` removes secrets from details."""
        first: dict[str, str] = {}
        for row in (row for rows in self.by_layer.values() for row in rows):
            if row.reason.value not in first:
                text = redact(row.detail) if row.key is None else f"{row.key}: {redact(row.detail)}"
                first[row.reason.value] = shorten(" ".join(text.split()), _EXAMPLE_CHARS)
        return first

    def write(self, store: Store, shard: str, redact: Callable[[str], str]) -> None:
        """Write the quarantine files of a shard; ``redact`` removes secrets from details."""
        for layer, rows in self.by_layer.items():
            store.quarantine(layer, shard, [(row.key, row.reason, redact(row.detail)) for row in rows])


class MisalignedLayer(Exception):
    """A layer of the shard, the first of ``args``, does not have the rows of its samples, or is of another source."""

    def __str__(self) -> str:
        return f"{self.args[0]} does not have the rows of the samples"


def set_inputs_aside(
    store: Store,
    shard: str,
    layers: Collection[str],
    error: RefusedFile | MisalignedLayer,
    replaceable: Callable[[], bool],
) -> dict[str, str] | None:
    """Set aside the files because of which reading has failed with ``error``; returns the reasons by layer.

    ``layers`` are those of the shard that the lease does not compute. Returns None if no file is at fault: a file that
    reads well at the second time was damaged on its way. Samples are set aside only where ``replaceable()``; otherwise
    raises RefusedFile.
    """
    if isinstance(error, MisalignedLayer):
        if SAMPLES in layers:
            try:
                with store.open_layer(SAMPLES, shard) as file:
                    keys, origin = _keys(file), parse_footer(file.metadata)
            except RefusedFile as refused:
                raise UserError(f"{store.layer_path(SAMPLES, shard)} cannot be read: {refused}.") from refused
            return set_stale_aside(store, shard, layers, keys, origin, new=False)
        set_aside(store, error.args[0], shard)  # the samples are being computed
        return {error.args[0]: _OTHER_ROWS}
    if error.file is None:
        return None
    layer = error.file[0]
    try:
        reason = file_damage(store, layer, shard)
    except FileNotFoundError:
        return {layer: _MISSING}
    if reason is None:
        return None
    if layer == SAMPLES and not replaceable():
        raise RefusedFile(
            f"{store.layer_path(layer, shard)} is damaged ({reason}). It stays, because its source cannot be read or "
            "has changed, and it may be the only copy of its images. Restore it, or its source."
        )
    set_aside(store, layer, shard)
    return {layer: reason}


def set_stale_aside(
    store: Store,
    shard: str,
    layers: Iterable[str],
    groups: Sequence[Sequence[str]],
    origin: Mapping[str, str],
    *,
    new: bool = True,
) -> dict[str, str]:
    """Set aside the files of layers that do not fit the samples, whose row groups have the keys ``groups``.

    ``origin`` are the footer entries of the samples about their source file. A file whose source had another content is
    of other images, even if the keys are the same. Of ``new`` samples, a file that does not exist is one that an
    earlier attempt has set aside. Returns the reasons.
    """
    reasons = {}
    for layer in layers:
        if layer == SAMPLES:
            continue
        try:
            with store.open_layer(layer, shard) as file:
                reason = other_origin(origin, parse_footer(file.metadata))
                if not reason and _keys(file) != [*map(list, groups)]:
                    reason = _OTHER_ROWS
        except RefusedFile as error:
            reason = str(error)
        except FileNotFoundError:
            if new:
                reasons[layer] = _MISSING
            continue
        if reason:
            set_aside(store, layer, shard)
            reasons[layer] = reason
    return reasons


def _keys(file: LayerFile) -> list[list[str]]:
    """The keys of each row group."""
    return [file.read_row_group(number, ["key"])["key"].to_pylist() for number in range(file.num_row_groups)]
