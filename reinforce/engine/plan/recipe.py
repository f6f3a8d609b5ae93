"""The layers of a config: descriptions of its models, and what each kind of layers makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from reinforce.config import Config
from reinforce.dataset.codecs import codebooks
from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import MODEL_SECTIONS, Layer, mapping_at
from reinforce.engine.messages.tracebacks import user_frames
from reinforce.errors import UserError
from reinforce.labels.taken import labelled
from teachers.registry import describe_model
from teachers.spec import ModelInfo


def describe_models(config: Config) -> dict[tuple[str, str], ModelInfo]:
    """Name, identity and dimensions of every model of the config, by section and name, without loading it.

    Raises UserError.
    """
    models = config.models
    try:
        infos = {
            (section, name): describe_model(name, spec) for section in models for name, spec in models[section].items()
        }
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{error}{user_frames(error)}") from error
    for labels in config.labels.values():
        for place, info in infos.items():
            if place[0] in MODEL_SECTIONS:
                identity = {**info.identity, **labels.taken.identity(place[1], labels.join)}
                infos[place] = replace(info, identity=identity)
    return infos


def with_codebooks(
    config: Config, infos: Mapping[tuple[str, str], ModelInfo], store: Store, manifest: Mapping[str, Any] | None
) -> dict[tuple[str, str], ModelInfo]:
    """Descriptions with the codebooks that the dataset has, by dataset.json or of a run that has not written it yet,
    and with those of labels."""
    found = dict(infos)
    for name, layer in build_layers(config, infos).items():
        if layer.codebook is None:
            continue
        labels = config.labels.get(layer.labels or "")
        known = [mapping_at(manifest or {}, "layers", name, "codebook")]
        known += [] if labels is None else [mapping_at(labels.taken.layers, name, "codebook")]
        digest = next((one["digest"] for one in known if one), None)
        digest = digest or codebooks.stored(store, name, layer.fingerprint)
        if digest is not None:
            owner = str(layer.kind.section), str(layer.model)
            found[owner] = replace(found[owner], codebooks={**found[owner].codebooks, name: digest})
    return found


def check_class_files(config: Config, layers: Iterable[Layer], host: str) -> None:
    """Raise UserError if the file of a class on this ``host`` is not the one that ``layers`` were planned with."""
    models = config.models
    for layer in {layer.owner: layer for layer in layers if layer.code is not None}.values():
        found = models[str(layer.kind.section)][str(layer.model)].describe().code
        if found is not None and found != layer.code:
            raise UserError(
                f"{layer.model}: the file of class {layer.identity['class']} on {host} is not that of the plan "
                f"(hash {layer.code} there, {found} here). Finished shards are kept. Give all nodes the same file, and "
                "run again."
            )


def build_layers(config: Config, infos: Mapping[tuple[str, str], ModelInfo]) -> dict[str, Layer]:
    """Every layer of the config by name, each after the layers it needs, and those of a model in turn."""
    layers: dict[str, Layer] = {}
    for level in sorted({kind.level for kind in KINDS.values()}):
        kinds = [kind for kind in KINDS.values() if kind.level == level]
        found = labelled(config, (layer for kind in kinds for layer in kind.layers(config, infos, layers)))
        layers |= {layer.name: layer for layer in sorted(found, key=lambda layer: _position(config, layer))}
    return layers


def as_recorded(layers: Mapping[str, Layer], manifest: Mapping[str, Any] | None) -> tuple[dict[str, Layer], list[str]]:
    """The layers, those of earlier versions as dataset.json records them, and a note on each of these."""
    found, notes = dict(layers), []
    for name, layer in layers.items():
        found[name], fault = layer.kind.as_recorded(layer, mapping_at(manifest or {}, "layers", name))
        if fault:
            notes.append(
                f"{name}: an earlier version made this layer, and {fault}; it is kept. To compute it again, delete it "
                "with `reinforce drop`, and run again"
            )
    return found, notes


def _position(config: Config, layer: Layer) -> int:
    """The place of a layer's model in its section of the config."""
    section, model = layer.owner
    return 0 if model is None else [*getattr(config, str(section))].index(model)


def version_notes(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """A warning for each custom class without ``version``, once each; ``models`` are identities."""
    classes = dict.fromkeys(model["class"] for model in models if "class" in model and "version" not in model)
    return [
        f"class {name} has no `version`, so layers that it has made are kept when its code or its weights change. Set "
        "`version = 1` in the class, before its first run because it is part of the fingerprint, and increase it "
        "whenever the outputs change."
        for name in classes
    ]
