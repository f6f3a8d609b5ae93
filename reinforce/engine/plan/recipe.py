"""The layers of a config: precisions and descriptions of its models, and what each kind of layers makes of them.

``precision: auto`` is resolved before fingerprints. What dataset.json records for a model comes first, so that a
dataset that was made in fp32 stays complete on any machine. A model that it does not list is computed in bf16 where
workers use GPUs, and in fp32 on CPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from reinforce.config import Config
from reinforce.dataset.codecs import codebooks
from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import MODEL_SECTIONS, Layer, mapping_at
from reinforce.dataset.manifest.class_code import entry_keys
from reinforce.engine.messages.tracebacks import user_frames
from reinforce.errors import UserError
from reinforce.labels.taken import labelled
from reinforce.processes.cores import Node, default_gpus
from teachers.registry import describe_model
from teachers.spec import ModelInfo, ModelSpec, Precision

_RECORDED, _GPUS, _CPUS = "as dataset.json records", "workers use GPUs", "workers use CPUs"


def resolve_precisions(
    config: Config, manifest: Callable[[], Mapping[str, Any] | None], nodes: Callable[[], Sequence[Node]]
) -> tuple[Config, list[str]]:
    """The config with the precision of each model that is loaded, and lines about those that were ``auto``.

    ``manifest`` returns dataset.json of the output; it is called if a model was ``auto``.
    ``nodes`` are those on which workers will run; it is called if `workers.gpus` is not set and they matter.
    """
    specs = config.models
    all_ = [(section, name, spec) for section, of in specs.items() for name, spec in of.items()]
    open_ = [(section, name) for section, name, spec in all_ if spec.uses_precision and spec.precision == "auto"]
    if not open_:
        return config, []
    found_manifest = manifest() or {}
    recorded = {model: _recorded_precision(found_manifest, *model) for model in open_}
    default: tuple[Precision, str] = ("fp32", _CPUS)
    if None in recorded.values():
        gpus = default_gpus(nodes()) if config.workers.gpus is None else config.workers.gpus
        default = ("bf16", _GPUS) if gpus else default
    found = {model: (precision, _RECORDED) if precision else default for model, precision in recorded.items()}
    changed: dict[str, dict[str, ModelSpec]] = {section: {**specs[section]} for section, _ in found}
    for (section, name), (precision, _) in found.items():
        changed[section][name] = changed[section][name].model_copy(update={"precision": precision})
    rows = sorted((precision, reason, name) for (_, name), (precision, reason) in found.items())
    lines = [
        f"precision: {precision} for {', '.join(name for _, _, name in group)} (auto: {reason})"
        for (precision, reason), group in itertools.groupby(rows, key=lambda row: row[:2])
    ]
    return config.model_copy(update=changed), lines


def _recorded_precision(manifest: Mapping[str, Any], section: str, name: str) -> Precision | None:
    """The precision of a model's layers in dataset.json, None if it lists none."""
    precision = mapping_at(manifest, *entry_keys(section, name), "model").get("precision")
    return precision if precision in get_args(Precision) else None


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


def resolve_layers(
    config: Config, store: Store, manifest: Mapping[str, Any] | None, nodes: Callable[[], Sequence[Node]]
) -> tuple[Config, dict[str, Layer], list[str]]:
    """The config with its precisions, its layers, those of earlier versions as dataset.json records them, and notes on
    both. ``nodes`` as in ``resolve_precisions``. Raises UserError."""
    config, notes = resolve_precisions(config, lambda: manifest, nodes)
    layers = build_layers(config, _with_codebooks(config, describe_models(config), store, manifest))
    for name, layer in layers.items():
        layers[name], fault = layer.kind.as_recorded(layer, mapping_at(manifest or {}, "layers", name))
        if fault:
            notes.append(
                f"{name}: an earlier version made this layer, and {fault}; it is kept. To compute it again, delete it "
                "with `reinforce drop`, and run again"
            )
    return config, layers, notes


def _with_codebooks(
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
