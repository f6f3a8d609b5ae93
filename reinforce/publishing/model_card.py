"""The model card of a published student: what it was trained from, how good it is, and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import LABELS, SAMPLES, mapping_at, model_of
from reinforce.dataset.manifest.class_code import entry_keys
from reinforce.dataset.manifest.manifest import read_manifest, select_names
from reinforce.errors import UserError
from reinforce.markup import render_markdown
from reinforce.model_names import HUB_URL
from reinforce.publishing.card import MODEL_MARK, UNKNOWN, markdown, model_identity, one_line
from reinforce.publishing.public import is_local_path, without_paths
from reinforce.storage import Storage
from reinforce.student.loss_config import OTHER_MODELS
from reinforce.training.record.curves import name_part
from reinforce.training.record.results import read_results
from reinforce.training.saving import read_config
from teachers.redact import redact

#: Keys of the training's config that the card shows.
_SETTINGS = (
    "student.model", "loss.form", "loss.lambda", "train.steps", "train.epochs", "train.batch",
    "train.optimizer.learning_rate", "train.optimizer.weight_decay", "seed",
)  # fmt: skip
#: Sections of dataset.json, with the keys of the config of which one uses what their models have computed.
_SECTIONS = {
    "teachers": ("loss.lambda", "loss.anchor", "loss.features", "loss.interactive"),
    "captioners": ("data.",),
    **{section: (f"loss.{key}",) for key, section in OTHER_MODELS.items()},
}
_HUB_DATASETS = "hf://datasets/"


@dataclass(frozen=True)
class _Source:
    """A teacher, captioner or dataset: its name, what it is, its licence, and fingerprints of its layers."""

    name: str
    what: str
    licence: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)


def build_model_card(
    run: str, url: str, config: Mapping[str, Any], licence: str, licences: Mapping[str, str]
) -> tuple[str, tuple[str, ...]]:
    """The README.md of a model published at ``url``, and lines on what it lacks.

    ``run`` is the training's output, ``config`` the model's ``model_cfg``. Raises UserError for a licence of something
    that the model was not trained from.
    """
    training = Storage(run)
    results = read_results(training)
    metrics = {name_part(name, results.parts): one for name, one in results.metrics.items()} if results else {}
    settings = read_config(training) or {}
    notes = [] if settings else [f"{run} has no checkpoint, so the card does not state what the model was trained from"]
    datasets: list[_Source] = []
    models: dict[str, dict[str, _Source]] = {section: {} for section in _SECTIONS}
    hub = []
    for address in _datasets(settings):
        shown = one_line(redact(_public_name(address)))
        try:
            manifest = read_manifest(Store(address))
        except (UserError, OSError) as error:
            notes.append(f"the card has no teachers and captioners of {shown}: {redact(str(error))}")
            datasets.append(_Source(shown, "", licences.get(shown, UNKNOWN)))
            continue
        if address.startswith(_HUB_DATASETS):
            hub.append("/".join(address.removeprefix(_HUB_DATASETS).split("/")[:2]))
        stated = str(mapping_at(manifest, LABELS).get("licence", UNKNOWN))
        prints = {SAMPLES: str(manifest["layers"][SAMPLES]["fingerprint"])}
        datasets.append(_Source(shown, "", licences.get(shown, stated), prints))
        for section, found in models.items():
            for source in _models(section, settings, address, manifest, licences):
                before = found.get(source.name)
                prints = {**(before.fingerprints if before else {}), **source.fingerprints}
                found[source.name] = _Source(source.name, source.what, source.licence, prints)
    known = [one.name for one in (*datasets, *(one for found in models.values() for one in found.values()))]
    if wrong := sorted({*licences} - {*known}):
        origin = ", ".join(known) or "nothing that is known"
        raise UserError(f"--license-of {wrong[0]}: the model was not trained from it, but from {origin}.")
    front = {
        "license": one_line(licence),
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "reinforced-dataset", "distillation"],
        **({"datasets": sorted({*hub})} if hub else {}),
    }
    on_hub = url.startswith(HUB_URL)
    page = render_markdown(
        "export/model_card.md",
        mark=MODEL_MARK,
        name=url.rpartition("/")[2],
        address=f"hf-hub:{url.removeprefix(HUB_URL)}" if on_hub else url.rpartition("/")[2],
        place="" if on_hub else "  # or another path of this folder",
        licence=licence,
        config=json.dumps(without_paths(dict(config)), indent=2),
        sources={"datasets": datasets, **{section: list(found.values()) for section, found in models.items()}},
        settings={key: without_paths(settings[key]) for key in _SETTINGS if settings.get(key) is not None},
        metrics={name: value for name, value in metrics.items() if value is not None},
        step=results.exported if results else None,
        text=markdown,
        own_text=config["text_cfg"].get("hf_model_name") == ".",
    )  # fmt: skip
    return redact(f"---\n{yaml.safe_dump(front, sort_keys=False, width=2**16)}---\n\n{page}"), tuple(notes)


def _datasets(settings: Mapping[str, Any]) -> list[str]:
    """The addresses of the datasets that a training read."""
    found = settings.get("data.datasets") or []
    return [one["url"] if isinstance(one, Mapping) else str(one) for one in found]


def _public_name(address: str) -> str:
    """A URL, or the name of a local folder without the folders above it."""
    return address.rstrip("/").rpartition("/")[2] if is_local_path(address) or "://" not in address else address


def _models(
    section: str, settings: Mapping[str, Any], url: str, manifest: Mapping[str, Any], licences: Mapping[str, str]
) -> Iterator[_Source]:
    """The models of a section of the manifest whose outputs a training read."""
    if not any(value for key, value in settings.items() if key.startswith(_SECTIONS[section])):
        return
    if section == "captioners" and settings.get("data.captions") == "none":
        return
    for name in select_names(url, section, _names(section, settings), manifest):
        entry = without_paths(mapping_at(manifest, *entry_keys(section, name)))
        prints = {
            layer: str(stored["fingerprint"])
            for layer, stored in manifest["layers"].items()
            if kind_of(layer).section == section and model_of(layer) == name
        }
        yield _Source(name, model_identity(entry), licences.get(name, UNKNOWN), prints)


def _names(section: str, settings: Mapping[str, Any]) -> list[str] | None:
    """The names under ``data`` of the config, a list or the keys of a mapping; None for all."""
    prefix = f"data.{section}."
    if names := [key.removeprefix(prefix) for key in settings if key.startswith(prefix)]:
        return names
    found = settings.get(prefix.rstrip("."))
    return None if found is None else list(found)
