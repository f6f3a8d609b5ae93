"""dataset.json: the layers of a dataset, their recipes, and the teachers' logit scales."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import schemas
from reinforce.config import Config
from reinforce.dataset.files.store import MANIFEST, Store
from reinforce.dataset.kinds.registry import drop_command, stored_layer, with_dependants
from reinforce.dataset.layers import SAMPLES, Layer, mapping_at
from reinforce.dataset.manifest.class_code import CODE_KEY, ClassCode, entry_keys, recorded_code
from reinforce.dataset.manifest.schema import check_manifest
from reinforce.errors import DamagedJson, StorageError, UserError
from reinforce.source.urls import canonical

#: Key of a teacher's entry with the logit scales from before a tuned one was recorded.
TUNED_KEY = "logit_scale_tuned"
#: Key of the hash of all else in dataset.json. Who removes it accepts what was changed by hand.
DIGEST_KEY = "digest"


def read_manifest(store: Store, *, check_digest: bool = True) -> dict[str, Any]:
    """Read dataset.json. Raises UserError if there is none, and as ``find_manifest``."""
    manifest = find_manifest(store, check_digest=check_digest)
    if manifest is None:
        raise UserError(f"{store.url} is not a reinforced dataset: it has no {MANIFEST}.")
    if SAMPLES not in manifest["layers"]:
        raise UserError(f"{store.url}: {MANIFEST} lists no samples. Restore it.")
    return manifest


def find_manifest(store: Store, *, check_digest: bool = True) -> dict[str, Any] | None:
    """Read dataset.json, None if there is none.

    Raises UserError if it is damaged, a newer version wrote it, or it was changed since it was written.
    """
    try:
        manifest = store.read_json(MANIFEST)
    except DamagedJson as error:
        raise UserError(
            f"{error} Without a copy, delete it: `reinforce run` with the dataset's config writes it again, without "
            "layers of other configs and tuned logit scales."
        ) from error
    if manifest is None:
        return None
    version = manifest.get("schema_version", 0)
    if isinstance(version, int) and version > schemas.SCHEMA_VERSION:
        raise UserError(f"{store.url} was written by a newer version of this program. Upgrade to read it.")
    check_manifest(manifest, store.url)
    if check_digest and (problem := changed_by_hand(manifest)):
        raise UserError(f"{store.url}: {problem}")
    return manifest


def changed_by_hand(manifest: Mapping[str, Any]) -> str | None:
    """How the content of a manifest differs from its digest, None if it does not, or it has no digest."""
    digest, now = manifest.get(DIGEST_KEY), manifest_digest(manifest)
    if digest in (None, now):
        return None
    return (
        f"{MANIFEST} is not as it was written: its content has the digest {now}, it states {str(digest)[:40]}. A logit "
        f"scale or another value was changed. Restore {MANIFEST}, or remove `digest` from it if the change is wanted."
    )


def write_manifest(store: Store, manifest: Mapping[str, Any]) -> None:
    """Write dataset.json with its digest, once more where an object store has stored something that cannot be read.

    Raises StorageError if it has something else afterwards.
    """
    written = {**manifest, DIGEST_KEY: manifest_digest(manifest)}
    store.write_json(written, MANIFEST)
    if store.local:
        return
    try:
        found = _read_back(store)
    except StorageError:
        store.write_json(written, MANIFEST)
        found = _read_back(store)
    if not same_content(manifest, found):
        raise StorageError(
            f"{store.path(MANIFEST)} is not what was written: the storage lost it, or another command wrote it."
        )


def _read_back(store: Store) -> dict[str, Any] | None:
    """Read dataset.json. Raises StorageError also where it is damaged."""
    try:
        return store.read_json(MANIFEST)
    except DamagedJson as error:
        raise StorageError(f"{error} The storage did not store what was written.") from error


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Hash of all of a manifest but its digest -> 16 hex digits.

    Fingerprints do not cover what changes no stored number, such as logit scales, which a training run uses.
    """
    content = {key: value for key, value in manifest.items() if key != DIGEST_KEY}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def same_content(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    """Whether two manifests are equal apart from their digests."""
    return other is not None and manifest_digest(one) == manifest_digest(other)


def select_names(url: str, kind: str, names: Sequence[str] | None, manifest: Mapping[str, Any]) -> list[str]:
    """Select the models of a section, such as ``teachers``, by name or pattern, such as ``syn_*``; None selects all.

    Raises UserError if there is none of a name.
    """
    owners = (stored_layer(name, entry).owner for name, entry in manifest["layers"].items())
    known = list(manifest.get(kind) or dict.fromkeys(name for section, name in owners if section == kind and name))
    if names is None:
        return known
    chosen: dict[str, None] = {}
    for name in names:
        found = [one for one in known if fnmatchcase(one, name)]
        if not found:
            raise UserError(f"{url} has no {kind[:-1]} {name!r}; it has: {', '.join(known) or 'none'}.")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def update_manifest(
    old: Mapping[str, Any] | None,
    config: Config,
    layers: Mapping[str, Layer],
    loaded: Mapping[tuple[str, str], Mapping[str, Any]],
    computed: Collection[str] = (),
) -> dict[str, Any]:
    """Add a config's layers to the manifest; layers of other configs stay.

    ``loaded`` has by section and name what each loaded model states, such as its dim. ``computed`` names the layers
    that the run computes: the code of their classes is recorded.
    """
    first = {layer.owner: layer for layer in reversed([*layers.values()])}  # of each model
    made = {layer.owner: layer for name, layer in layers.items() if name in computed}
    manifest: dict[str, Any] = {
        "format": "reinforced-dataset",
        "schema_version": schemas.SCHEMA_VERSION,
        **layers[SAMPLES].recipe,
        "teachers": dict((old or {}).get("teachers", {})),
        "captioners": dict((old or {}).get("captioners", {})),
        "layers": dict((old or {}).get("layers", {})),
    }
    for name, layer in layers.items():
        before = manifest["layers"].get(name, {})
        known = {**before, **({} if layer.dim is None else {"dim": layer.dim})}
        entry = layer.kind.entry(layer, {**known, **loaded.get((str(layer.kind.section), str(layer.model)), {})})
        if layer.kind.section not in manifest:  # where models have entries, these have the code
            entry |= _code(before, layer if name in computed else None)
        manifest["layers"][name] = {"kind": layer.kind.name, "fingerprint": layer.fingerprint, **entry}
    for name, teacher in config.teachers.items():
        before, owner = manifest["teachers"].get(name, {}), ("teachers", name)
        of_model = loaded.get(owner) or teacher.stated
        manifest["teachers"][name] = {
            "model": first[owner].recipe["model"] if owner in first else before.get("model"),
            **_code(before, made.get(owner)),
            **_logit_scale(before, teacher.logit_scale, of_model.get("logit_scale")),
            "dim": of_model.get("dim") or before.get("dim"),
            "image": of_model.get("image") or before.get("image"),
        }
    if moved := _moved((old or {}).get("moved", {}), config):
        manifest["moved"] = moved
    for name in config.captioners:
        before, owner = manifest["captioners"].get(name, {}), ("captioners", name)
        manifest["captioners"][name] = {
            "model": first[owner].recipe["model"] if owner in first else None,
            **_code(before, made.get(owner)),
        }
    return manifest


def check_loaded(
    store: Store,
    manifest: Mapping[str, Any] | None,
    layers: Mapping[str, Layer],
    loaded: Mapping[tuple[str, str], Mapping[str, Any]],
) -> None:
    """Raise UserError if a layer has files and dataset.json describes their numbers otherwise than the model that is
    ``loaded`` now, such as with other names of classes."""
    known = mapping_at(manifest or {}, "layers")
    for name, layer in layers.items():
        reason = describe_difference(layer, known.get(name, {}), loaded)
        if reason is not None and store.shards(name):
            command = drop_command(store.url, with_dependants([name], known), known)
            raise UserError(
                f"{reason}, by {MANIFEST}. Files of {name} are stored, and their numbers would get another meaning. "
                f"Restore what the model reads its classes from; or to compute the layer again: {command} --yes, and "
                "run again."
            )


def describe_difference(
    layer: Layer, before: Mapping[str, Any], loaded: Mapping[tuple[str, str], Mapping[str, Any]]
) -> str | None:
    """``LayerKind.differs`` of the loaded model of a layer, with its name; None also if it is not loaded."""
    section, model = str(layer.kind.section), str(layer.model)
    now = loaded.get((section, model))
    found = None if now is None else layer.kind.differs(before, now)
    return None if found is None else f"{section[:-1]} {model}: {found}"


def _moved(before: Mapping[str, str], config: Config) -> dict[str, str]:
    """Former folders of the source by where they are now; those of this config replace earlier places."""
    now = {canonical(new): canonical(old) for new, old in config.moved.items()}
    return {**{new: old for new, old in before.items() if old not in now.values()}, **now}


def _logit_scale(before: Mapping[str, Any], of_config: float | None, of_model: float | None) -> dict[str, Any]:
    """The entries for the logit scale in use and its origin.

    A tuned scale stays in use until the config's scale differs from the one at the time of tuning.
    """
    tuned = before.get(TUNED_KEY)
    if tuned is not None and of_config in (None, tuned["config"]):
        return {key: before[key] for key in ("logit_scale", "logit_scale_from", TUNED_KEY)}
    if of_config:
        return {"logit_scale": of_config, "logit_scale_from": "config"}
    scale = of_model if of_model is not None else before.get("logit_scale")
    return {"logit_scale": scale, "logit_scale_from": "model"}


def record_scales(manifest: Mapping[str, Any], scales: Mapping[str, float], origin: str) -> dict[str, Any]:
    """Put tuned logit scales into the manifest, with the scales that they replace."""
    teachers = dict(manifest["teachers"])
    for name, scale in scales.items():
        entry = teachers[name]
        if TUNED_KEY in entry:
            replaced = entry[TUNED_KEY]
        else:
            of_config = entry["logit_scale"] if entry["logit_scale_from"] == "config" else None
            replaced = {"config": of_config, "before": entry["logit_scale"], "before_from": entry["logit_scale_from"]}
        teachers[name] = {**entry, "logit_scale": scale, "logit_scale_from": origin, TUNED_KEY: replaced}
    return {**manifest, "teachers": teachers}


def _code(before: Mapping[str, Any], layer: Layer | None) -> dict[str, Any]:
    """The entry for the code of a custom class: the hashes of the runs so far, in order; empty if none is known.

    ``layer`` is one that is computed now, None if there is none. Another model or version begins a new list.
    """
    known = [*recorded_code(before, layer)]
    if layer is not None and layer.code is not None and known[-1:] != [layer.code]:
        known.append(layer.code)
    return {CODE_KEY: known} if known else {}


def forget_code(store: Store, codes: Iterable[ClassCode]) -> None:
    """Remove hashes of classes from dataset.json that belong to no file, such as those of a run that committed none."""
    forgotten = [code for code in codes if code.recorded and code.computed and not code.stored]
    manifest = find_manifest(store) if forgotten else None
    if manifest is not None:
        for code in forgotten:
            section, name = entry_keys(code.section, code.model)
            manifest[section].get(name, {}).pop(CODE_KEY, None)
        write_manifest(store, manifest)


def scale_notes(old: Mapping[str, Any] | None, config: Config) -> list[str]:
    """Lines that a run logs: one for each teacher whose tuned scale is replaced, or kept against the config's."""
    notes = []
    for name, teacher in config.teachers.items():
        before = (old or {}).get("teachers", {}).get(name, {})
        if TUNED_KEY not in before:
            continue
        tuned = f"{before['logit_scale']:g} ({before['logit_scale_from']})"
        if TUNED_KEY not in _logit_scale(before, teacher.logit_scale, None):
            notes.append(f"teacher {name}: logit scale {teacher.logit_scale:g} of this config replaces {tuned}")
        elif teacher.logit_scale not in (None, before["logit_scale"]):
            notes.append(
                f"teacher {name}: logit scale {tuned} stays in use, not the {teacher.logit_scale:g} of this config, "
                "which was in use before the tuning; any other value would replace it"
            )
    return notes
