"""Values of dataset.json that no run writes: by the keys that are changed, and a part of the message."""

from __future__ import annotations

from typing import Any

FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "layers that are a list": ({"layers": []}, "is not that of a reinforced dataset"),
    "no layers": ({"layers": {}}, "lists no samples"),
    "a layer that is text": ({"layers__samples": "x"}, r"layers\.samples"),
    "a fingerprint that is a number": ({"layers__samples__fingerprint": 1}, r"layers\.samples\.fingerprint"),
    "a dimension of a million million": ({"layers": {"embeddings/red/images": {"dim": 10**12}}}, "dataset.json"),
    "images in a way that is not known": ({"images": "both"}, "images: Input should be 'embed', 'reference' or 'none'"),
    "a logit scale that is text": ({"teachers__red__logit_scale": "\x1b[2J"}, r"teachers\.red\.logit_scale"),
    "an infinite logit scale": ({"teachers__red__logit_scale": float("inf")}, r"teachers\.red\.logit_scale"),
    "a schema version that is text": ({"schema_version": "one"}, "schema_version"),
    "augmentations of 60,000 pixels": ({"augmentations__size": 60_000}, r"augmentations\.size"),
    "policies that are a list": ({"policies": []}, "does not record image policies"),
    "a policy that is null": ({"policies__image": None}, "does not record image policies"),
    "a layer of images without its dimension": ({"layers__embeddings/red/images": {"kind": "images"}}, "dataset.json"),
    "another name of a layer": ({"layers__../../x": {}}, "not a valid layer name"),
    "other dimensions than the files": ({"layers__embeddings/red/images__dim": 9}, "shapes in dataset.json"),
}
