"""The layers that a config asks for, what each needs, and the fingerprint of all that determines its content.

Fingerprints form a chain: every layer's holds that of ``samples`` (rows, images, augmentation records), and an
embedding of synthetic captions holds that of the captions. What changes no stored number (logit scales, batch
sizes, workers) is in no fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

import schemas
from reinforce.augment import AUGMENTATION_BACKEND
from reinforce.config import Config
from reinforce.errors import UserError
from reinforce.image import IMAGE_POLICY
from reinforce.text import CAPTION_POLICY
from teachers.registry import ModelInfo, describe_captioner, describe_teacher

SAMPLES = "samples"
Kind = Literal["samples", "captions", "images", "texts"]


@dataclass(frozen=True)
class Layer:
    """One product for all shards; ``name`` is its folder in the dataset.

    ``model`` names the captioner or teacher that makes it, ``source`` the layer its texts come from (``texts``
    only), ``count`` the vectors or captions a row (K or N). ``dim`` is None until a model of unknown dimension
    has been loaded.
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
    recipe: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def reads_images(self) -> bool:
        return self.kind != "texts"

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


def captions_layer(captioner: str) -> str:
    return f"captions/{captioner}"


def embeddings_layer(teacher: str, what: str) -> str:
    """``what`` is ``images``, ``caption`` (the true one) or a captioner's name."""
    return f"embeddings/{teacher}/{what}"


def describe_models(config: Config) -> dict[str, ModelInfo]:
    """What is known of every model of the config without loading it, by layer prefix. Raises UserError."""
    infos: dict[str, ModelInfo] = {}
    try:
        for name, captioner in config.captioners.items():
            infos[captions_layer(name)] = describe_captioner(name, captioner)
        for name, teacher in config.teachers.items():
            infos[f"embeddings/{name}"] = describe_teacher(name, teacher)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    return infos


def layers_of(config: Config, infos: Mapping[str, ModelInfo]) -> dict[str, Layer]:
    """Every layer of the config by name, each after the ones it needs."""
    recipe: dict[str, Any] = {
        "images": config.images,
        "seed": config.seed,
        "policies": {"image": IMAGE_POLICY, "caption": CAPTION_POLICY, "augmentation": AUGMENTATION_BACKEND},
        "input": config.input.model_dump(mode="json"),
        "augmentations": config.augmentations.model_dump(mode="json"),
    }
    samples = Layer(SAMPLES, "samples", fingerprint_of(recipe), recipe=recipe)
    layers = {SAMPLES: samples}

    for name, captioner in config.captioners.items():
        recipe = {"samples": samples.fingerprint, "model": infos[captions_layer(name)].identity}
        layer = Layer(
            captions_layer(name),
            "captions",
            fingerprint_of(recipe),
            needs=(SAMPLES,),
            model=name,
            count=captioner.captions,
            recipe=recipe,
        )
        layers[layer.name] = layer

    for name, teacher in config.teachers.items():
        info = infos[f"embeddings/{name}"]
        sides: list[tuple[str, Kind, str, int]] = []
        if info.images:
            sides.append(("images", "images", SAMPLES, config.augmentations.count))
        if info.texts:
            sides.append(("caption", "texts", SAMPLES, 1))
            sides += [(c, "texts", captions_layer(c), spec.captions) for c, spec in config.captioners.items()]
        for what, kind, source, count in sides:
            recipe = {"source": layers[source].fingerprint, "model": info.identity, "dtype": teacher.dtype}
            layer = Layer(
                embeddings_layer(name, what),
                kind,
                fingerprint_of({**recipe, "what": kind}),
                needs=(SAMPLES,) if source == SAMPLES else (SAMPLES, source),
                model=name,
                texts=what if kind == "texts" else None,
                count=count,
                dim=info.dim,
                dtype=teacher.dtype,
                recipe=recipe,
            )
            layers[layer.name] = layer
    return layers


def fingerprint_of(recipe: Mapping[str, Any]) -> str:
    """16 hex digits over the schema version and the recipe."""
    text = json.dumps({"schema": schemas.SCHEMA_VERSION, **recipe}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
