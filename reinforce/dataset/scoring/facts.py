"""Facts about a sample that no model is needed for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reinforce.config import Fact, Score
from reinforce.dataset.scoring.base import Floats, Scorer, StoredRows

_VERSION = 1


def _bytes(samples: pa.Table) -> Any:
    if "image" in samples.column_names:
        return pc.binary_length(samples["image"])
    return pc.struct_field(samples["image_ref"], "length")


def _aspect(samples: pa.Table) -> Any:
    width, height = (pc.cast(samples[name], pa.float64()) for name in ("width", "height"))
    return pc.divide(pc.max_element_wise(width, height), pc.min_element_wise(width, height))


def _words(samples: pa.Table) -> Any:
    return pc.list_value_length(pc.utf8_split_whitespace(samples["caption"]))


#: The columns of the samples that a fact is computed from, and how, by name.
_COMPUTED: dict[Fact, tuple[tuple[str, ...], Callable[[pa.Table], Any]]] = {
    "width": (("width",), lambda samples: samples["width"]),
    "height": (("height",), lambda samples: samples["height"]),
    "aspect": (("width", "height"), _aspect),
    "bytes": (("image", "image_ref"), _bytes),
    "characters": (("caption",), lambda samples: pc.utf8_length(samples["caption"])),
    "words": (("caption",), _words),
}


class Facts(Scorer):
    """Sizes of the image, and lengths of the true caption, which are null where there is none."""

    key = "facts"

    def __init__(self, spec: Score) -> None:
        self._facts = spec.facts or []
        self.names = tuple(self._facts)
        self.columns = tuple(dict.fromkeys(column for name in self._facts for column in _COMPUTED[name][0]))

    def identity(self) -> dict[str, Any]:
        return {"facts": [*self.names], "version": _VERSION}

    def scores(self, rows: StoredRows) -> Mapping[str, Floats]:
        samples = rows.samples()
        found = {name: pc.cast(_COMPUTED[name][1](samples), pa.float32(), safe=False) for name in self._facts}
        return {name: pc.fill_null(values, np.nan).to_numpy() for name, values in found.items()}
