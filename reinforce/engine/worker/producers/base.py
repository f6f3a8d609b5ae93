"""What a producer of layers must offer, and the row groups that it makes tables of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset import vectors
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.engine.decode.row import Row
from reinforce.engine.inference.batch_sizes import Bound, Demand, rows_per_batch
from reinforce.engine.inference.inference import Encoder, Outputs
from reinforce.engine.inference.models import Models, crops_per_batch
from reinforce.engine.inference.outputs import Floats
from reinforce.engine.inference.self_test import Start, test_rows
from reinforce.engine.inference.session import Session
from reinforce.engine.worker.refusals import Refusals
from reinforce.engine.worker.stale_files import MisalignedLayer
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.protocols import ImageSpec
from teachers.spec import ModelInfo, Precision

Mask = npt.NDArray[np.bool_]
#: What models see, and what is halved, of the augmented images.
CROPS: Final = "crops"


class RowGroup:
    """The rows of one row group, the outputs of their batches, and the tables of their layers so far.

    ``stored`` are tables of layers that were committed before. Raises MisalignedLayer unless they have the keys of the
    rows, in the same order.
    """

    def __init__(self, rows: Sequence[Row], outputs: Sequence[Outputs], stored: Mapping[str, pa.Table]) -> None:
        self.rows, self.keys = rows, [row.key for row in rows]
        self.tables = dict(stored)
        self._outputs = outputs
        self._values: dict[str, Any] = {}
        for name, table in stored.items():
            if table["key"].to_pylist() != self.keys:
                raise MisalignedLayer(name)

    def outputs(self, layer: str) -> list[Any]:
        """The outputs of a layer in the batches that have some, in order."""
        return [outputs[layer] for outputs in self._outputs if layer in outputs]

    def values(self, layer: str) -> Any:
        """The value of each row in a layer that was committed or computed before, as its kind decodes it."""
        if layer not in self._values:
            self._values[layer] = kind_of(layer).decode(self.tables[layer])
        return self._values[layer]

    def samples(self) -> pa.Table:
        """The samples, at least with the columns that a producer names."""
        return self.tables[SAMPLES]

    def set_values(self, layer: str, values: Any) -> None:
        """Keep the values of a layer, so that its table is not decoded."""
        self._values[layer] = values


@dataclass(frozen=True)
class Side:
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


class Producer(Encoder):
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

    # -- models

    @staticmethod
    def side(models: Models, name: str, info: ModelInfo, precision: Precision) -> Side | None:
        """The side of the loaded model ``name`` that makes such layers; None if it makes none, or cannot be tested."""
        raise NotImplementedError

    @staticmethod
    def full_batch(models: Models, layer: Layer, config: Config) -> int:
        """Inputs of a full batch of a layer's model."""
        if layer.sees == CROPS:
            return crops_per_batch(models, config)
        return models.batches.fitting("rows", rows_per_batch(config))

    @property
    def crops(self) -> bool:
        return any(layer.sees == CROPS for layer in self.computed)

    @property
    def whole(self) -> Iterable[ImageSpec]:
        return [self.session.models.of(layer).image for layer in self.computed if layer.sees == "image"]

    def demand(self, layer: Layer, rows: int) -> Demand:
        one = "one augmented image" if layer.sees == CROPS else "one image"
        bound: Bound = CROPS if layer.sees == CROPS and rows == 1 else "rows"
        return Demand(bound, f"{layer.name}: {one} does", self.smaller_model(layer))

    @staticmethod
    def smaller_model(layer: Layer) -> str:
        """The config keys to change if one input does not fit."""
        return f"{layer.kind.section}.{layer.model}: a smaller model, or `precision: bf16`"

    # -- tables

    @property
    def sample_columns(self) -> Collection[str]:
        """Columns of the samples, besides keys, that it needs in files that were stored before, if they are there."""
        return ()

    def schema(self, layer: Layer) -> pa.Schema:
        """The schema of a layer's file."""
        return layer.schema(self.session.config.images, getattr(self.session.models.of(layer), "dim", None))

    def tables(self, group: RowGroup) -> Iterator[tuple[str, pa.Table]]:
        """The tables of a row group by layer; records what is refused. Raises LayerFailure."""
        for layer in self.layers:
            table = group.tables[layer.name] = self.table(layer, group)
            yield layer.name, table

    @abstractmethod
    def table(self, layer: Layer, group: RowGroup) -> pa.Table:
        """The table of a row group."""

    def tensor_table(
        self, layer: Layer, group: RowGroup, values: Mapping[str, npt.NDArray[Any]], valid: Mask
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
        self, layer: Layer, group: RowGroup, given: Mask, finite: Mask, what: str = "NaN or infinity"
    ) -> Mask:
        """Record the ``given`` rows that are not ``finite`` -> those that are [rows]."""
        return self.refuse(layer, group, given, finite, Reason.NOT_FINITE, f"{layer.model} returned {what}")

    def refuse(self, layer: Layer, group: RowGroup, given: Mask, usable: Mask, reason: Reason, detail: str) -> Mask:
        """Record the ``given`` rows that are not ``usable`` -> those that are [rows]."""
        for row in np.flatnonzero(given & ~usable):
            self.refusals.add(layer.name, Refusal(group.keys[row], reason, detail))
        return given & usable

    def refuse_unreadable(self, layer: Layer, group: RowGroup) -> Mask:
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
