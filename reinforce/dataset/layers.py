"""Layers: their description, names and fingerprints.

A fingerprint covers all that determines a layer's content. Fingerprints form a chain: each layer's recipe includes the
fingerprint of ``samples`` (rows, images, augmentation records), and that of embeddings of synthetic captions includes
the fingerprint of the captions. Settings that change no stored number (logit scales, batch sizes, workers) are in none.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

import schemas

SAMPLES = "samples"
#: Name of the true caption among the texts that teachers encode; the other names are captioners.
TRUE_CAPTION = "caption"
Kind = Literal["samples", "captions", "images", "texts"]


@dataclass(frozen=True)
class Layer:
    """One product for all shards.

    Attributes:
        name: its folder in the dataset.
        needs: names of the layers it is computed from.
        model: captioner or teacher that makes it.
        texts: what a teacher encodes in a layer of texts: ``caption`` or a captioner's name.
        count: vectors or captions per row (K or N).
        dim: dimension of the vectors, None until a model of unknown dimension has been loaded.
        published: whether it is read from published reinforcements, without loading a model.
        recipe: what the fingerprint covers.
        code: hash of the file that defines the model's class, if it is a custom one; the fingerprint does not cover it.
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
    code: str | None = field(default=None, compare=False)

    @property
    def row_bytes(self) -> int | None:
        """Stored bytes of one row's vectors, None if the dimension is unknown or the row holds text."""
        if self.kind not in ("images", "texts") or self.dim is None:
            return None
        width = {"float16": 2, "float32": 4, "int8": 1}[self.dtype]
        return self.count * (self.dim * width + (4 if self.dtype == "int8" else 0))

    def schema(self, images: str, dim: int | None = None) -> pa.Schema:
        """The pyarrow schema of its files; ``images`` is the config's key, ``dim`` that of the loaded model."""
        if self.kind == "samples":
            return schemas.samples_schema(images)
        if self.kind == "captions":
            return schemas.captions_schema()
        dim = dim or self.dim
        assert dim is not None
        return schemas.embeddings_schema(self.count, dim, self.dtype)


def reads_reinforcements(layers: Iterable[Layer]) -> bool:
    """Whether computing any of these layers reads the published reinforcements, if the config names any."""
    return any(layer.published or layer.name == SAMPLES for layer in layers)


def captions_layer(captioner: str) -> str:
    """Name of a captioner's layer."""
    return f"captions/{captioner}"


def embeddings_layer(teacher: str, inputs: str) -> str:
    """Name of a teacher's layer. ``inputs`` is ``images``, ``caption`` (the true one) or a captioner's name."""
    return f"embeddings/{teacher}/{inputs}"


def captions_recipe(samples: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """What the fingerprint of a captions layer covers: that of the samples, and the identity of the captioner."""
    return {"samples": samples, "model": model}


def embeddings_recipe(source: str, model: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """What the fingerprint of an embeddings layer covers besides its kind: that of the layer it is computed from, the
    identity of the teacher, and the storage type."""
    return {"source": source, "model": model, "dtype": dtype}


def embeddings_fingerprint(recipe: Mapping[str, Any], kind: str) -> str:
    """The fingerprint of an embeddings layer, of images or texts."""
    return compute_fingerprint({**recipe, "what": kind})


def compute_fingerprint(recipe: Mapping[str, Any]) -> str:
    """Hash the schema version and a recipe -> 16 hex digits."""
    text = json.dumps({"schema": schemas.SCHEMA_VERSION, **recipe}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


_ORDER = ("embeddings", "captions", SAMPLES)  # layers are deleted after those that depend on them


def with_dependants(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Layers by name, and those of ``known`` that are computed from them, in the order of deletion."""
    names = {*names}
    dependants = {name for name in known if any(depends(name, on) for on in names)}
    return sorted(names | dependants, key=deletion_order)


def drop_command(url: str, names: Collection[str], known: Collection[str]) -> str:
    """The command that drops layers, with a pattern where all of a teacher's ``known`` layers are among them."""
    if SAMPLES in names:
        return shlex.join(["reinforce", "drop", url, "*"])
    arguments: dict[str, None] = {}
    for name in names:
        folder = posixpath.dirname(name)
        of_teacher = {layer for layer in {*known, *names} if posixpath.dirname(layer) == folder}
        whole = folder.startswith("embeddings/") and len(of_teacher) > 1 and of_teacher <= {*names}
        arguments[f"{folder}/*" if whole else name] = None
    return shlex.join(["reinforce", "drop", url, *arguments])


def depends(layer: str, on: str) -> bool:
    """Whether a layer is computed from another one: all from the samples, embeddings of captions from these."""
    if on == SAMPLES:
        return layer != SAMPLES
    folder, _, texts = layer.rpartition("/")
    return folder.startswith("embeddings/") and texts not in ("images", TRUE_CAPTION) and on == captions_layer(texts)


def deletion_order(layer: str) -> tuple[int, str]:
    return _ORDER.index(layer.partition("/")[0]), layer
