"""The samples: rows of all other layers, with images, captions, metadata and augmentation records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import schemas
from reinforce.dataset.layers import (
    LABELS,
    NO_IMAGES,
    SAMPLES,
    Content,
    Layer,
    LayerKind,
    Recorded,
    compute_fingerprint,
    mapping_at,
)
from reinforce.images.policy import image_policy, reads_crops
from reinforce.source.samples import CAPTION_POLICY

if TYPE_CHECKING:
    from reinforce.config import Config
    from teachers.spec import ModelInfo

#: Format of published reinforcements, from which the augmentation records are read.
PUBLISHED_FORMAT = "datacompdr-1"
_RECIPE = ("images", "seed", "policies", "input", "augmentations")


class SamplesKind(LayerKind):
    name = "samples"
    pattern = SAMPLES
    level = 0
    columns = ("key", "caption", "augmentations")
    stored_plain = ("image",)
    values = None
    unit = "samples"
    producer = "samples:SamplesProducer"
    file_schemas = tuple(schemas.samples_schema(images, True, True) for images in ("embed", "reference", NO_IMAGES))

    def layers(
        self, config: Config, infos: Mapping[tuple[str, str], ModelInfo], known: Mapping[str, Layer]
    ) -> Iterable[Layer]:
        # The first two say which files are read, and reduce_to is recorded in the name of the image policy.
        source = config.input.model_dump(mode="json", exclude={"format", "images_from", "reduce_to"}, exclude_none=True)
        source["captions"] = config.input.caption_fields
        source["limits"] = config.input.limits.model_dump()  # a name alone would not say which
        if reads_crops(config):
            count, size = config.augmentations.count, config.augmentations.size
            augmentations: dict[str, Any] = {"published": PUBLISHED_FORMAT, "count": count, "size": size}
        else:
            # The backend is recorded among the policies.
            augmentations = config.augmentations.model_dump(mode="json", exclude={"backend", "own"})
            if (of_crops := config.labels_of_crops) is not None:
                labels = config.labels[of_crops]
                augmentations["labels"] = {"samples": labels.taken.samples, "join": labels.join}
        recipe: dict[str, Any] = {
            "images": config.images,
            "seed": config.seed,
            "policies": {
                "image": image_policy(config),
                "caption": CAPTION_POLICY,
                "augmentation": config.augmentations.backend,
            },
            "input": source,
            "augmentations": augmentations,
        }
        count = config.input.captions_per_sample or 0
        yield Layer(SAMPLES, self, compute_fingerprint(recipe), count=count, recipe=recipe)

    def schema(self, layer: Layer, images: str) -> pa.Schema:
        return schemas.samples_schema(images, bool(layer.count), bool(layer.labels))

    def row_bytes(self, layer: Layer, sample: float) -> float | None:
        return sample

    def entry(self, layer: Layer, stated: Mapping[str, Any]) -> dict[str, Any]:
        return {"count": layer.count} if layer.count else {}

    def recorded(self, layer: Layer, manifest: Mapping[str, Any]) -> Recorded:
        fingerprint, recipe = None, {key: manifest[key] for key in _RECIPE if key in manifest}
        if len(recipe) == len(_RECIPE):
            if recipe["images"] == NO_IMAGES:  # those of who has published these samples
                recipe["images"] = mapping_at(manifest, LABELS).get("images")
            fingerprint = compute_fingerprint(recipe)
        before = {key: manifest[key] for key in ("schema_version", *layer.recipe) if key in manifest}
        now = {"schema_version": schemas.SCHEMA_VERSION, **layer.recipe} if before else {}
        return Recorded(fingerprint, before, now)

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        if records is not None:
            wrong = pc.not_equal(pc.list_value_length(table["augmentations"]), records)
            yield f"do not have {records} augmentation records", pc.fill_null(wrong, True).to_numpy()
        if layer.count:
            found = zip(table["caption"].to_pylist(), true_captions(table), strict=True)
            wrong = np.array([len(texts) > layer.count or one != next(iter(texts), None) for one, texts in found], bool)
            yield f"do not have their caption as the first of at most {layer.count} true captions", wrong

    def content(self, layer: Layer) -> Content:
        own = f"identities ({', '.join(layer.names)})" if layer.names else "images"
        card = "identities of images, captions" if layer.names else "images, captions, metadata"
        return Content(
            f"rows and {own}" + (f", up to {layer.count} true captions" if layer.count else ""),
            card=f"{card}, augmentation records",
            report="keys, captions, images, augmentation records",
        )


def true_captions(samples: pa.Table) -> list[list[str]]:
    """The true captions of each row: one or none where the dataset does not keep several."""
    if schemas.TRUE_CAPTIONS in samples.column_names:
        return [texts or [] for texts in samples[schemas.TRUE_CAPTIONS].to_pylist()]
    return [[] if text is None else [text] for text in samples["caption"].to_pylist()]
