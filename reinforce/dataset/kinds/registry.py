"""The kinds of layers, and what follows from the names of layers: their kind, their dependencies, how to drop them."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from reinforce.dataset.kinds.captions import Captions
from reinforce.dataset.kinds.embeddings import ImageEmbeddings, TextEmbeddings
from reinforce.dataset.kinds.patches import PatchFeatures
from reinforce.dataset.kinds.probabilities import ClassProbabilities
from reinforce.dataset.kinds.samples import SamplesKind
from reinforce.dataset.kinds.scores import Scores
from reinforce.dataset.layers import SAMPLES, Layer, LayerKind, matches

#: Every kind by its name in dataset.json. Kinds of lower levels come first.
KINDS: dict[str, LayerKind] = {
    kind.name: kind
    for kind in (
        SamplesKind(),
        Captions(),
        ClassProbabilities(),
        ImageEmbeddings(),
        TextEmbeddings(),
        PatchFeatures(),
        Scores(),
    )
}


#: The sections of a config with models that layers name in dataset.json.
SECTIONS = [*dict.fromkeys(str(kind.section) for kind in KINDS.values() if kind.model_key is not None)]


def find_kind(name: str) -> LayerKind | None:
    """The kind of a layer by its name, None if it is not the name of a layer."""
    return next((kind for kind in KINDS.values() if matches(name, kind.pattern)), None)


def kind_of(name: str) -> LayerKind:
    """The kind of a layer by its name. Raises ValueError if it is not the name of a layer."""
    kind = find_kind(name)
    if kind is None:
        raise ValueError(f"{name} is not the name of a layer")
    return kind


def owner_of(target_section: str) -> str:
    """The section of the config with the models whose values loss terms ask for under a name."""
    found = (kind.section for kind in KINDS.values() if kind.target_section == target_section)
    return str(next(found, target_section))


def target_sections(owner: str) -> list[str]:
    """The names under which loss terms ask for values of the models of a section."""
    return [*dict.fromkeys(str(kind.target_section) for kind in KINDS.values() if kind.section == owner)]


def stored_layer(name: str, entry: Mapping[str, Any]) -> Layer:
    """A layer by its entry in dataset.json."""
    return KINDS[entry["kind"]].stored(name, entry)


def depends(layer: str, on: str, entries: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a layer is computed from another one, also through others. ``entries`` are those of dataset.json."""
    known, pending = {layer}, [layer]
    while pending:
        name = pending.pop()
        kind = find_kind(name)
        needs = {*kind.inputs(name, entries.get(name, {}))} - known if kind else set()
        known |= needs
        pending += needs
    return on in known - {layer}


def deletion_order(layer: str) -> tuple[int, str]:
    """Sort key: layers are deleted after those that depend on them."""
    return -kind_of(layer).level, layer


def with_dependants(names: Iterable[str], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Layers by name, and those of ``known`` that are computed from them, in the order of deletion.

    ``known`` are the entries of layers in dataset.json, empty ones for layers that it does not list.
    """
    names = {*names}
    dependants = {name for name in known if any(depends(name, on, known) for on in names)}
    return sorted(names | dependants, key=deletion_order)


def drop_command(url: str, names: Collection[str], known: Collection[str]) -> str:
    """The command that drops layers, with a pattern where all of a model's ``known`` layers are among them."""
    if SAMPLES in names:
        return shlex.join(["reinforce", "drop", url, "*"])
    arguments: dict[str, None] = {}
    for name in names:
        folder = name.rpartition("/")[0]
        of_model = {layer for layer in {*known, *names} if layer.rpartition("/")[0] == folder}
        whole = "/" in folder and len(of_model) > 1 and of_model <= {*names}
        arguments[f"{folder}/*" if whole else name] = None
    return shlex.join(["reinforce", "drop", url, *arguments])
