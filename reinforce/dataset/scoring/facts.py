"""Facts about a sample that no model is needed for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reinforce.config import Fact, Score
from reinforce.dataset.scoring.base import Floats, Scorer, StoredRows
from reinforce.source.references import image_digest
from schemas import IMAGE_DIGEST
from teachers.open_clip.catalog import model_config

_VERSION = 1


def _bytes(samples: pa.Table) -> Any:
    if "image" in samples.column_names:
        return pc.binary_length(samples["image"])
    return pc.struct_field(samples["image_ref"], "length")


def _aspect(samples: pa.Table) -> Any:
    width, height = (pc.cast(samples[name], pa.float64()) for name in ("width", "height"))
    return pc.divide(pc.max_element_wise(width, height), pc.min_element_wise(width, height))


def _digest(place: int) -> Callable[[pa.Table], Any]:
    """A number of 24 bits, which float32 holds, from ``place`` in the digest of the encoded image."""

    def part(samples: pa.Table) -> Any:
        if "image" in samples.column_names:
            digests = pa.array([image_digest(image.as_buffer()) for image in samples["image"]], pa.uint64())
        elif IMAGE_DIGEST in samples.column_names:
            digests = samples[IMAGE_DIGEST]
        else:  # of an earlier version
            return pa.nulls(len(samples), pa.uint64())
        return pc.bit_wise_and(
            pc.shift_right(digests, pa.scalar(place, pa.uint64())), pa.scalar(2**24 - 1, pa.uint64())
        )

    return part


#: The columns of the samples that a fact is computed from, and how, by name.
_COMPUTED: dict[Fact, tuple[tuple[str, ...], Callable[[pa.Table], Any]]] = {
    "width": (("width",), lambda samples: samples["width"]),
    "height": (("height",), lambda samples: samples["height"]),
    "aspect": (("width", "height"), _aspect),
    "bytes": (("image", "image_ref"), _bytes),
    "characters": (("caption",), lambda samples: pc.utf8_length(samples["caption"])),
    "words": (("caption",), lambda samples: pc.list_value_length(pc.utf8_split_whitespace(samples["caption"]))),
    "digest_1": (("image", IMAGE_DIGEST), _digest(0)),
    "digest_2": (("image", IMAGE_DIGEST), _digest(24)),
}


class Facts(Scorer):
    """Sizes of the image, and lengths of the true caption, which are null where there is none.

    ``tokens`` are those of the whole caption, without the marks at its start and end.
    """

    key = "facts"

    def __init__(self, spec: Score, version: int | None = None) -> None:
        self._facts, self._tokenizer = spec.facts or [], spec.tokenizer
        self._computed = {**_COMPUTED, "tokens": (("caption",), self._tokens)}
        self.names = tuple(self._facts)
        self.columns = tuple(dict.fromkeys(column for name in self._facts for column in self._computed[name][0]))
        if "tokens" in self._facts:
            model_config(self._tokenizer)  # raises what is wrong with the name
        elif "tokenizer" in spec.model_fields_set:
            raise ValueError("tokenizer: used only for the fact `tokens`; remove it")

    def identity(self) -> dict[str, Any]:
        tokenizer = {"tokenizer": self._tokenizer} if "tokens" in self._facts else {}
        return {"facts": [*self.names], "version": _VERSION, **tokenizer}

    def scores(self, rows: StoredRows) -> Mapping[str, Floats]:
        samples = rows.samples()
        found = {name: pc.cast(self._computed[name][1](samples), pa.float32(), safe=False) for name in self._facts}
        return {name: pc.fill_null(values, np.nan).to_numpy() for name, values in found.items()}

    def _tokens(self, samples: pa.Table) -> Any:
        texts = samples["caption"].to_pylist()
        return pa.array([None if text is None else self._count_tokens(text) for text in texts], pa.int64())

    @cached_property
    def _count_tokens(self) -> Callable[[str], int]:
        """The number of tokens of a text. Raises OSError or ValueError if the tokenizer cannot be loaded."""
        import open_clip

        tokenizer = open_clip.get_tokenizer(self._tokenizer)
        if isinstance(tokenizer, open_clip.SimpleTokenizer):
            return lambda text: len(tokenizer.encode(text))
        return lambda text: len(tokenizer.tokenizer.encode(tokenizer.clean_fn(text), add_special_tokens=False))
