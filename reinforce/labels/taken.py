"""The layers, models and augmentations that a config takes from published labels, by their dataset.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from reinforce.config import Augmentations, Config
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import (
    REINFORCEMENTS,
    SAMPLES,
    TRUE_CAPTION,
    Layer,
    captions_layer,
    inputs_of,
    mapping_at,
    model_of,
)
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.images.policy import IMAGE_POLICIES, image_policy, is_image_policy
from reinforce.terminal import escape
from teachers.published import (
    LabelCaptionerSpec,
    Labels,
    LabelTeacherSpec,
    Taken,
)
from teachers.spec import ModelInfo

_MAX_COUNT = 1000  # augmentation records of a sample


def with_labels(config: Config) -> Config:
    """The config with what it takes of its labels: their augmentations, and models that only they have.

    Raises UserError if the labels cannot be read, do not have what the config takes, or do not fit it.
    """
    owners: dict[str, str] = {}
    read: dict[str, Labels] = {}
    for name, labels in config.labels.items():
        manifest = read_manifest(Store(labels.url))
        taken = _take(f"labels.{name}", labels, manifest)
        for layer in taken.layers:
            if owners.setdefault(layer, name) != name:
                raise UserError(f"labels.{name}.layers: {layer} is taken of labels.{owners[layer]} already")
        read[name] = labels.taking(taken)
        if taken.crops:
            # The config with those augmentations of the labels that it does not set.
            where = f"labels.{name}"
            stated = manifest["augmentations"] | {"backend": mapping_at(manifest, "policies").get("augmentation")}
            own = config.augmentations
            values = {key: stated[key] for key in Augmentations.model_fields if key in stated}
            values |= {key: getattr(own, key) for key in own.model_fields_set}
            try:
                augmentations = Augmentations.model_validate(values)
            except ValueError as error:
                raise UserError(
                    f"{where}: its dataset.json states augmentations that cannot be made: {escape(str(error)[:300])}"
                ) from None
            for key, most in (("size", None), ("backend", None), ("count", taken.count)):
                now, there = getattr(augmentations, key), stated.get(key)
                if now > most if most is not None else now != there:
                    raise UserError(
                        f"augmentations.{key}: {now} in this config, {there} of {where}, whose vectors are of its "
                        "crops. Remove it, or take no vectors of augmented images"
                    )
            if config.input.reduce_to is not None and image_policy(config) != taken.image_policy:
                raise UserError(f"input.reduce_to: remove it; the crops of {where} are of images of another size")
            config = config.model_copy(update={"augmentations": augmentations})
        config = _with_models(f"labels.{name}", config, manifest, taken)
    crops = [name for name, labels in read.items() if labels.taken.crops]
    if crops[1:]:
        raise UserError(
            f"labels: vectors of augmented images are taken of {' and '.join(crops)}, whose augmentations differ; "
            "take embeddings/NAME/caption of all but one"
        )
    return config.model_copy(update={"labels": read}) if read else config


def labelled(config: Config, layers: Iterable[Layer]) -> Iterable[Layer]:
    """The layers of a config, with the labels that they are taken of; without those that nothing makes. All values of
    a published layer without other labels are in `reinforcements`, which also decide the rows of the samples.

    Raises UserError if a layer does not have the shape of its labels, or fewer crops. The vectors of true captions are
    those of a sample's captions, which may be more or fewer.
    """
    owners = {layer: name for name, labels in config.labels.items() for layer in labels.taken.layers}
    for layer in layers:
        section, model = layer.owner
        if config.reinforcements is not None:
            yield replace(layer, labels=REINFORCEMENTS) if layer.published or layer.name == SAMPLES else layer
        elif layer.name in owners:
            name = owners[layer.name]
            entry = config.labels[name].taken.layers[layer.name]
            count, dim = entry["count"], entry.get("dim")
            counted = layer.count if layer.texts != TRUE_CAPTION else count
            if (counted > count if layer.kind.crops else counted != count) or layer.dim not in (None, dim):
                own = f"{[layer.count, layer.dim]} in this config"
                raise UserError(f"labels.{name}: {layer.name} is {[count, dim]} there, and {own}")
            yield replace(layer, dim=dim, labels=name)
        elif layer.name == SAMPLES and config.labels_of_crops is not None:
            yield replace(layer, labels=config.labels_of_crops)
        elif not isinstance(getattr(config, str(section), {}).get(model), LabelTeacherSpec):
            yield layer


def _take(where: str, labels: Labels, manifest: Mapping[str, Any]) -> Taken:
    """Entries of the labels' layers that a config names."""
    known = {name: entry for name, entry in manifest["layers"].items() if kind_of(name).taken}
    named: dict[str, Mapping[str, Any]] = {}
    for wanted in labels.layers:
        found = {name: entry for name, entry in known.items() if name == wanted or name.startswith(f"{wanted}/")}
        if not found:
            listed = ", ".join(map(escape, known)) or "none"
            raise UserError(f"{where}.layers: {Store(labels.url).url} has no {wanted}; what can be taken: {listed}")
        named |= found
    for name in [*named]:
        if kind_of(name).picks == "text" and inputs_of(name) != TRUE_CAPTION:
            captions = captions_layer(inputs_of(name))
            if captions not in named and name in labels.layers:
                raise UserError(f"{where}.layers: {name} is of the captions in {captions}; take them too")
            if captions not in named:
                del named[name]
    if not named:
        raise UserError(f"{where}.layers: {', '.join(labels.layers)} are of captions that are not taken; take them too")
    policy, count = mapping_at(manifest, "policies").get("image"), manifest["augmentations"].get("count")
    if not isinstance(policy, str) or not is_image_policy(policy):
        raise UserError(
            f"{where}: made with image policy {escape(str(policy)[:40])!r}; this version has {IMAGE_POLICIES}. Upgrade."
        )
    if type(count) is not int or not 1 <= count <= _MAX_COUNT:
        raise UserError(f"{where}: its dataset.json states no number of augmentations. Restore it.")
    return Taken(named, manifest["layers"][SAMPLES]["fingerprint"], policy, count, manifest["images"] == "embed")


def _with_models(where: str, config: Config, manifest: Mapping[str, Any], taken: Taken) -> Config:
    """The config with the models of the layers that are taken."""
    for layer, entry in taken.layers.items():
        section, name = str(kind_of(layer).section), model_of(layer)
        models = getattr(config, section)
        known = mapping_at(manifest, section, name)
        identity = dict(mapping_at(known, "model"))
        identity.pop("labels", None)
        spec = models.get(name)
        if isinstance(spec, LabelTeacherSpec | LabelCaptionerSpec):
            continue
        if spec is not None:
            own = spec.describe().identity
            unequal = [key for key in {*own, *identity} - {"precision", "labels"} if own.get(key) != identity.get(key)]
            if unequal:
                shown = "; ".join(
                    f"{key}: {escape(str(identity.get(key))[:80])} there, {str(own.get(key))[:80]} here"
                    for key in sorted(unequal)[:4]
                )
                raise UserError(
                    f"{section}.{name} is not the model of {where} ({shown}), and their outputs would be mixed. Give "
                    "it another name, or remove it: samples without labels are null then"
                )
            if section == "teachers" and spec.codec != entry["dtype"]:
                raise UserError(f"{section}.{name}.codec: set {entry['dtype']}, as {where} has it")
            continue
        if section == "captioners":  # a model that only labels have
            info = ModelInfo(None, images=True, texts=False, identity=identity)
            spec = LabelCaptionerSpec(family="published", model=name, captions=entry["count"], info=info)
        else:
            made = [one for one in taken.layers if kind_of(one).section == section and model_of(one) == name]
            sides = {inputs_of(one) for one in made}
            texts = bool(sides - {"images"})
            spec = LabelTeacherSpec(
                family="published",
                model=name,
                logit_scale=known.get("logit_scale"),
                codec=entry["dtype"],
                **({"codec_sample": entry["codebook"]["sample"]} if "codebook" in entry else {}),
                info=ModelInfo(entry["dim"], images="images" in sides, texts=texts, identity=identity),
                image=known.get("image"),
            )
        config = config.model_copy(update={section: {**models, name: spec}})
    return config
