"""The code of custom classes: dataset.json has the hashes of their files, which no fingerprint covers.

A class whose file has changed while its ``version`` has not may give other outputs, so a run that would compute some
rows of a model with one state of the file and some with another is refused, unless that is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reinforce.dataset.kinds.registry import KINDS, kind_of
from reinforce.dataset.layers import MODEL_SECTIONS, Layer, mapping_at, model_of
from reinforce.errors import UserError

#: Key of the entry of a custom class with the hashes of the file that defines it, one for each change.
CODE_KEY = "code"


def entry_keys(section: str, model: str) -> tuple[str, str]:
    """Where dataset.json describes a model: in an entry of its own, or in that of its one layer."""
    if section in MODEL_SECTIONS:
        return section, model
    return "layers", next(kind.pattern for kind in KINDS.values() if kind.section == section).replace("*", model)


@dataclass(frozen=True)
class ClassCode:
    """The file of a model's class, now and when the layers of the model were computed.

    Attributes:
        section, model: of the model in the config.
        identity: ``class``, ``version`` and options.
        now: hash of the file.
        recorded: its hashes in dataset.json; none in datasets of earlier versions.
        stored: whether a layer of the model has files.
        computed: whether the run computes a layer of the model.
    """

    section: str
    model: str
    identity: Mapping[str, Any]
    now: str
    recorded: Sequence[str]
    stored: bool
    computed: bool

    @property
    def changed(self) -> bool:
        """Whether stored layers were computed with another state of the file, if known."""
        return self.stored and bool(self.recorded) and self.recorded[-1] != self.now

    def line(self) -> str:
        """The line of ``reinforce plan``."""
        name, version = self.identity["class"], self.identity.get("version", "none")
        state = ", changed since its layers were computed" if self.changed else ""
        return f"{self.section[:-1]} {self.model}: class {name}, version {version}, file {self.now}{state}"

    def as_json(self) -> dict[str, Any]:
        return {
            "model": f"{self.section}.{self.model}",
            "class": self.identity["class"],
            "version": self.identity.get("version"),
            "code": self.now,
            "recorded": [*self.recorded],
            "changed": self.changed,
        }

    def describe_change(self) -> str:
        """Why the run would mix two states of the file."""
        version = f"is still {self.identity['version']!r}" if "version" in self.identity else "is not set"
        return (
            f"{self.section[:-1]} {self.model}: the file of class {self.identity['class']} has changed since its "
            f"layers were computed (hash {self.recorded[-1]} then, {self.now} now), and its `version` {version}"
        )


def class_codes(
    manifest: Mapping[str, Any] | None, layers: Mapping[str, Layer], stored: Iterable[str], computed: Iterable[str]
) -> list[ClassCode]:
    """The code of each custom class that makes some of the ``layers``.

    ``stored`` names those that have files, ``computed`` those that the run computes. Layers of other configs count as
    stored.
    """
    stored, computed = {*stored}, {*computed}
    owned: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers.values():
        if layer.code is not None:
            owned.setdefault((str(layer.kind.section), str(layer.model)), []).append(layer)
    codes, listed = [], mapping_at(manifest or {}, "layers")
    for (section, model), found in owned.items():
        entry = mapping_at(manifest or {}, *entry_keys(section, model))
        names = {layer.name for layer in found}
        others = [name for name, one in listed.items() if one.get(section[:-1]) == model and name not in layers]
        codes.append(
            ClassCode(
                section=section,
                model=model,
                identity=found[0].identity,
                now=str(found[0].code),
                recorded=recorded_code(entry, found[0]),
                stored=bool(others) or not names.isdisjoint(stored),
                computed=not names.isdisjoint(computed),
            )
        )
    return codes


def recorded_code(entry: Mapping[str, Any], layer: Layer | None = None) -> Sequence[str]:
    """The hashes in an entry, which may be untrusted; none if it has another model than ``layer``."""
    known, found = entry.get("model", entry.get("score")), entry.get(CODE_KEY)
    return [*map(str, found)] if isinstance(found, list) and (layer is None or known == layer.identity) else []


def check_classes(codes: Iterable[ClassCode], accepted: bool = False) -> list[str]:
    """Log lines of a run that mixes states of a class, if that is ``accepted``. Raises UserError otherwise."""
    lines = [code.describe_change() for code in codes if code.changed and code.computed]
    if not lines or accepted:
        return [f"{line}; the new hash is recorded, as --accept-changed-classes says" for line in lines]
    raise UserError(
        "\n".join([*lines, "One layer could have outputs of two models, so nothing was started."])
        + " If the outputs have changed, set another `version` in the class; the next run then names the layers to "
        "drop. If they are the same, run with --accept-changed-classes, which records the new hash."
    )


def code_lines(manifest: Mapping[str, Any]) -> list[str]:
    """One line for each custom class whose file has changed while its layers were computed."""
    entries = {(section, name): entry for section in MODEL_SECTIONS for name, entry in manifest[section].items()}
    for name, entry in manifest["layers"].items():
        section = kind_of(name).section
        if section is not None and section not in MODEL_SECTIONS:
            entries[section, model_of(name)] = entry
    return [
        f"{section[:-1]} {name}: its layers were computed with {len(hashes)} states of the file of its class "
        f"(hashes {', '.join(hashes)}) under one `version`"
        for (section, name), entry in entries.items()
        if len(hashes := recorded_code(entry)) > 1
    ]
