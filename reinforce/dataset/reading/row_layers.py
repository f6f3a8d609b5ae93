"""What the layers of a row group have of its samples, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, captions_layer, embeddings_layer


class RowGroupLayers:
    """The captions and vectors of a row group, by row."""

    def __init__(self, tables: Mapping[str, pa.Table], teachers: Sequence[str], captioners: Sequence[str]) -> None:
        inputs = (TRUE_CAPTION, *captioners)
        self.true_captions = true_captions(tables[SAMPLES])
        values = {name: kind_of(name).decode(table) for name, table in tables.items() if name != SAMPLES}
        self._captions = {c: values.pop(name) for c in captioners if (name := captions_layer(c)) in values}
        self._images = {t: values.pop(name) for t in teachers if (name := embeddings_layer(t, "images")) in values}
        self._texts = {
            t: {i: values.pop(name) for i in inputs if (name := embeddings_layer(t, i)) in values} for t in teachers
        }
        self._values = values

    def values(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self._values.items()}

    def captions(self, row: int) -> dict[str, list[str] | None]:
        return {name: texts[row] for name, texts in self._captions.items()}

    def images(self, row: int) -> dict[str, np.ndarray]:
        return {teacher: values[row] for teacher, values in self._images.items()}

    def texts(self, row: int) -> dict[str, dict[str, np.ndarray]]:
        # A row with fewer true captions than vectors has the same ones again.
        ends = {TRUE_CAPTION: max(1, len(self.true_captions[row]))}
        return {t: {n: values[row][: ends.get(n)] for n, values in of.items()} for t, of in self._texts.items()}
