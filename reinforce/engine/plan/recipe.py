"""The layers of a config, each with the recipe that its fingerprint covers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from reinforce.config import Config, Limits
from reinforce.datacompdr.members import FORMAT
from reinforce.dataset.layers import (
    SAMPLES,
    TRUE_CAPTION,
    Kind,
    Layer,
    captions_layer,
    captions_recipe,
    compute_fingerprint,
    embeddings_fingerprint,
    embeddings_layer,
    embeddings_recipe,
)
from reinforce.engine.messages.tracebacks import user_frames
from reinforce.errors import UserError
from reinforce.images.policy import image_policy
from reinforce.source.captions import CAPTION_POLICY
from teachers.registry import ModelInfo, describe_captioner, describe_teacher


def describe_models(config: Config) -> dict[str, ModelInfo]:
    """Name, identity and dimensions of every model of the config, by layer prefix, without loading it.

    Raises UserError.
    """
    infos: dict[str, ModelInfo] = {}
    try:
        for name, captioner in config.captioners.items():
            infos[captions_layer(name)] = describe_captioner(name, captioner)
        for name, teacher in config.teachers.items():
            infos[f"embeddings/{name}"] = describe_teacher(name, teacher)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{error}{user_frames(error)}") from error
    return infos


#: Limits that were added after the first datasets were made. At their defaults they are left out of the recipe, so
#: that the fingerprints of those datasets stay valid.
_LATER_LIMITS = ("scans", "members", "key_chars", "shard_samples")
#: Keys of `input` that were added later, in the same way.
_LATER_KEYS = ("image", "key", "rows_per_shard")


def _input_recipe(config: Config) -> dict[str, Any]:
    # The first two say which files are read, and reduce_to is recorded in the name of the image policy.
    recipe = config.input.model_dump(mode="json", exclude={"format", "images_from", "reduce_to"})
    for name in _LATER_KEYS:
        if recipe[name] is None:
            del recipe[name]
    for name in _LATER_LIMITS:
        if recipe["limits"][name] == Limits.model_fields[name].default:
            del recipe["limits"][name]
    return recipe


def _augmentations_recipe(config: Config) -> dict[str, Any]:
    if config.reinforcements is not None:
        return {"published": FORMAT, "count": config.augmentations.count, "size": config.augmentations.size}
    # The backend is recorded among the policies.
    return config.augmentations.model_dump(mode="json", exclude={"backend"})


def build_layers(config: Config, infos: Mapping[str, ModelInfo]) -> dict[str, Layer]:
    """Every layer of the config by name, each after the layers it needs."""
    recipe: dict[str, Any] = {
        "images": config.images,
        "seed": config.seed,
        "policies": {
            "image": image_policy(config),
            "caption": CAPTION_POLICY,
            "augmentation": config.augmentations.backend,
        },
        "input": _input_recipe(config),
        "augmentations": _augmentations_recipe(config),
    }
    samples = Layer(SAMPLES, "samples", compute_fingerprint(recipe), recipe=recipe)
    layers = {SAMPLES: samples}

    for name, captioner in config.captioners.items():
        recipe = captions_recipe(samples.fingerprint, infos[captions_layer(name)].identity)
        layer = Layer(
            captions_layer(name),
            "captions",
            compute_fingerprint(recipe),
            needs=(SAMPLES,),
            model=name,
            count=captioner.captions,
            published=captioner.family == "published",
            recipe=recipe,
            code=infos[captions_layer(name)].code,
        )
        layers[layer.name] = layer

    for name, teacher in config.teachers.items():
        info = infos[f"embeddings/{name}"]
        sides: list[tuple[str, Kind, str, int]] = []
        if info.images:
            sides.append(("images", "images", SAMPLES, config.augmentations.count))
        if info.texts:
            sides.append((TRUE_CAPTION, "texts", SAMPLES, 1))
            sides += [
                (c, "texts", captions_layer(c), spec.captions)
                for c, spec in config.captioners.items()
                if spec.family == "published" or teacher.family != "published"
            ]
        for what, kind, source, count in sides:
            recipe = embeddings_recipe(layers[source].fingerprint, info.identity, teacher.dtype)
            layer = Layer(
                embeddings_layer(name, what),
                kind,
                embeddings_fingerprint(recipe, kind),
                needs=(SAMPLES,) if source == SAMPLES else (SAMPLES, source),
                model=name,
                texts=what if kind == "texts" else None,
                count=count,
                dim=info.dim,
                dtype=teacher.dtype,
                published=teacher.family == "published",
                recipe=recipe,
                code=info.code,
            )
            layers[layer.name] = layer
    return layers


def version_notes(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """A warning for each custom class without ``version``, once each; ``models`` are identities."""
    classes = dict.fromkeys(model["class"] for model in models if "class" in model and "version" not in model)
    return [
        f"class {name} has no `version`, so layers that it has made are kept when its code or its weights change. Set "
        "`version = 1` in the class, before its first run because it is part of the fingerprint, and increase it "
        "whenever the outputs change."
        for name in classes
    ]
