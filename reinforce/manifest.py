"""dataset.json: what every layer of a dataset is and by which recipe it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import schemas
from reinforce.config import LAYER_NAME, Config
from reinforce.errors import UserError
from reinforce.layers import SAMPLES, Layer


def update_manifest(
    old: Mapping[str, Any] | None,
    config: Config,
    layers: Mapping[str, Layer],
    loaded: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The manifest after adding this config's layers; layers of other configs stay.

    ``loaded`` holds, by model name, what only a loaded model knows: dim, logit_scale, image preprocessing.
    """
    manifest: dict[str, Any] = {
        "format": "reinforced-dataset",
        "schema_version": schemas.SCHEMA_VERSION,
        **layers[SAMPLES].recipe,
        "teachers": dict((old or {}).get("teachers", {})),
        "captioners": dict((old or {}).get("captioners", {})),
        "layers": dict((old or {}).get("layers", {})),
    }
    for name, layer in layers.items():
        entry: dict[str, Any] = {"kind": layer.kind, "fingerprint": layer.fingerprint}
        if layer.kind == "captions":
            entry |= {"captioner": layer.model, "count": layer.count}
        elif layer.model is not None:
            known = loaded.get(layer.model, {})
            entry |= {
                "teacher": layer.model,
                "texts": layer.texts,
                "count": layer.count,
                "dim": known.get("dim", layer.dim) or manifest["layers"].get(name, {}).get("dim"),
                "dtype": layer.dtype,
            }
        manifest["layers"][name] = entry
    for name, teacher in config.teachers.items():
        before = manifest["teachers"].get(name, {})
        known = loaded.get(name, {})
        scale, origin = (teacher.logit_scale, "config") if teacher.logit_scale else (known.get("logit_scale"), "model")
        manifest["teachers"][name] = {
            "model": _model_of(layers, name, "embeddings") or before.get("model"),
            "logit_scale": scale if scale is not None else before.get("logit_scale"),
            "logit_scale_from": origin,
            "dim": known.get("dim") or before.get("dim"),
            "image": known.get("image") or before.get("image"),
        }
    for name in config.captioners:
        manifest["captioners"][name] = {"model": _model_of(layers, name, "captions")}
    return manifest


def check_names(manifest: Mapping[str, Any], where: str) -> None:
    """Raise UserError where a name that becomes part of a path cannot be one of a layer, as in a forged manifest."""
    try:
        parts = [part for name in manifest["layers"] for part in name.split("/")]
        names = [*parts, *manifest["teachers"], *manifest["captioners"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: dataset.json is not one of a reinforced dataset. Restore it.") from error
    for name in names:
        if not LAYER_NAME.fullmatch(name):
            raise UserError(f"{where}: dataset.json names a layer {name!r}, which no run does. Restore it.")


def _model_of(layers: Mapping[str, Layer], name: str, folder: str) -> Any:
    for layer in layers.values():
        if layer.model == name and layer.name.startswith(f"{folder}/"):
            return layer.recipe["model"]
    return None
