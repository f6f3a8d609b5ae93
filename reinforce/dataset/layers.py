"""What a layer is, by which names layers go, and the fingerprint of all that determines one's content.

Fingerprints form a chain: every layer's holds that of ``samples`` (rows, images, augmentation records), and an
embedding of synthetic captions holds that of the captions. What changes no stored number (logit scales, batch
sizes, workers) is in no fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

import schemas

SAMPLES = "samples"
#: The true caption among the texts that teachers encode; the others are captioners.
TRUE_CAPTION = "caption"
Kind = Literal["samples", "captions", "images", "texts"]


@dataclass(frozen=True)
class Layer:
    """One product for all shards; ``name`` is its folder in the dataset.

    ``needs`` names the layers it is computed from, ``model`` the captioner or teacher that makes it, ``texts`` what
    the latter encodes (``caption`` or a captioner's name), ``count`` the vectors or captions a row (K or N). ``dim``
    is None until a model of unknown dimension has been loaded. A ``published`` layer is read from the reinforcements
    that others have stored, and no model is loaded for it.
    """

    name: str
    kind: Kind
    fingerprint: str
    needs: tuple[str, ...] = ()
    model: str | None = None
    texts: str | None = None
    count: int = 0
    dim: int | None = None
    dtype: Literal["float16", "float32", "int8"] = "float16"
    published: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def row_bytes(self) -> int | None:
        """Stored bytes of one row's vectors; None where the dimension is not known or the row holds text."""
        if self.kind not in ("images", "texts") or self.dim is None:
            return None
        width = {"float16": 2, "float32": 4, "int8": 1}[self.dtype]
        return self.count * (self.dim * width + (4 if self.dtype == "int8" else 0))

    def schema(self, images: str, dim: int | None = None) -> pa.Schema:
        """The pyarrow schema of its files; ``images`` is the config's, ``dim`` that of the loaded model."""
        if self.kind == "samples":
            return schemas.samples_schema(images)
        if self.kind == "captions":
            return schemas.captions_schema()
        dim = dim or self.dim
        assert dim is not None
        return schemas.embeddings_schema(self.count, dim, self.dtype)


def reads_reinforcements(layers: Iterable[Layer]) -> bool:
    """Whether any of them holds something of the reinforcements that others have published, if a config names such."""
    return any(layer.published or layer.name == SAMPLES for layer in layers)


def captions_layer(captioner: str) -> str:
    return f"captions/{captioner}"


def embeddings_layer(teacher: str, what: str) -> str:
    """``what`` is ``images``, ``caption`` (the true one) or a captioner's name."""
    return f"embeddings/{teacher}/{what}"


def compute_fingerprint(recipe: Mapping[str, Any]) -> str:
    """16 hex digits over the schema version and the recipe."""
    text = json.dumps({"schema": schemas.SCHEMA_VERSION, **recipe}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
