"""dataset.json: its validation, since it may be untrusted, the layers and recipes, the teachers' logit scales, and how
the recipes that it records differ from those of a config.

It also has the hashes of the files of custom classes, which no fingerprint covers. A class whose file has changed while
its ``version`` has not may give other outputs, so a run that would compute some rows of a model with one state of the
file and some with another is refused, unless that is accepted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

import schemas
from reinforce.dataset.codecs.codebooks import find_codec
from reinforce.dataset.kinds.registry import KINDS, drop_command, kind_of, stored_layer, with_dependants
from reinforce.dataset.layers import MODEL_SECTIONS, SAMPLES, Layer, mapping_at, model_of, parts_of, require_images
from reinforce.dataset.store import MANIFEST, Store
from reinforce.errors import DamagedJson, StorageError, UserError
from reinforce.settings import LAYER_NAME, flatten
from reinforce.source.urls import canonical
from reinforce.terminal import escape, plural

if TYPE_CHECKING:
    from reinforce.config import Config

_Text = Annotated[str, Field(max_length=4096)]
_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_MAX_LAYERS = 4096
_SHOWN_ERRORS = 3
_SECTIONS = ("layers", *MODEL_SECTIONS)


def _known_kind(name: str) -> str:
    if name not in KINDS:
        *names, last = (repr(kind) for kind in KINDS)
        raise PydanticCustomError("literal_error", f"Input should be {', '.join(names)} or {last}")
    return name


def _known_codec(name: str) -> str:
    try:
        find_codec(name)
    except ValueError as error:
        raise PydanticCustomError("literal_error", f"{str(error)[:200]}") from None
    return name


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class _Codebook(_Part):
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    sample: int = Field(ge=1)


class _LayerEntry(_Part):
    kind: Annotated[str, AfterValidator(_known_kind)]
    fingerprint: _Text
    count: Annotated[int, Field(ge=0, le=2**16)] | None = None
    dim: Annotated[int, Field(ge=1, le=2**20)] | None = None
    dtype: Annotated[str, AfterValidator(_known_codec)] | None = None
    codebook: _Codebook | None = None
    grid: list[int] | None = None
    picked: Annotated[int, Field(ge=1)] | None = None
    texts: _Text | None = None
    teacher: _Text | None = None
    captioner: _Text | None = None
    names: list[_Text] | None = None
    needs: list[_Text] | None = None
    score: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> _LayerEntry:
        KINDS[self.kind].stored("", self.model_dump(exclude_unset=True))  # raises what is wrong
        return self


class _Tuned(_Part):
    config: _Scale | None
    before: _Scale | None
    before_from: _Text


class _TeacherEntry(_Part):
    logit_scale: _Scale | None
    logit_scale_from: _Text
    dim: Annotated[int, Field(ge=1, le=2**20)] | None = None
    logit_scale_tuned: _Tuned | None = None


class _Augmentations(_Part):
    size: int = Field(ge=1, le=4096)


class _Labels(_Part):
    version: int
    images: Literal["embed", "reference"]
    identities: list[_Text] = Field(max_length=16)
    licence: _Text = "unknown"
    hidden: list[_Text] = Field(default_factory=list, max_length=_MAX_LAYERS)


class _Manifest(_Part):
    images: Literal["embed", "reference", "none"]
    schema_version: int
    seed: int = 0
    augmentations: _Augmentations
    moved: dict[_Text, _Text] = Field(default_factory=dict)
    layers: dict[str, _LayerEntry] = Field(max_length=_MAX_LAYERS)
    teachers: dict[str, _TeacherEntry]
    captioners: dict[str, dict[str, Any]]
    labels: _Labels | None = None


class _Stage(_Part):
    inputs: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    mfu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class _Device(_Part):
    name: _Text = ""
    memory_peak: int = Field(0, ge=0)
    memory_total: int = Field(0, ge=0)


class _FastPath(_Part):
    model: _Text
    path: _Text
    asked: bool = False
    used: int = Field(0, ge=0)
    plain: int = Field(0, ge=0)
    reason: _Text | None = None


class RunRecord(_Part):
    """What ``reinforce status`` and ``inspect`` show of a run's summary.json."""

    run: _Text | None = None
    shards: int = 0
    samples: int = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    message: _Text | None = None
    cleaned: dict[str, dict[str, int]] = Field(default_factory=dict)
    source_counts: dict[str, int] = Field(default_factory=dict)
    not_in_source: dict[str, int | _Text | None] = Field(default_factory=dict)
    busy_share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    stages: dict[_Text, _Stage] = Field(default_factory=dict)
    device: _Device = _Device()
    fast_paths: list[_FastPath] = Field(default_factory=list)

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds if self.seconds else 0.0


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Raise UserError if the content of a dataset.json is not what readers rely on."""
    sections = [section for key in _SECTIONS if isinstance(section := manifest.get(key), dict)]
    if len(sections) < len(_SECTIONS):
        raise UserError(f"{where}: dataset.json is not that of a reinforced dataset. Restore it.")
    layers, *models = sections
    parts = [part for layer in layers for part in parts_of(layer)]
    for name in (*parts, *(name for section in models for name in section)):  # they become parts of paths
        if not LAYER_NAME.fullmatch(name):
            raise UserError(
                f"{where}: dataset.json has {escape(name[:100])!r}, which is not a valid layer name. Restore it."
            )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise UserError(f"{where}: dataset.json is not valid: {_describe(error)}. Restore it.") from None


def check_run(summary: Mapping[str, Any], where: str) -> RunRecord:
    """Check a run's summary.json. Raises UserError."""
    try:
        return RunRecord.model_validate(summary)
    except ValidationError as error:
        raise UserError(f"{where} is not valid: {_describe(error)}. Delete it.") from None


def _describe(error: ValidationError) -> str:
    found = error.errors(include_input=False, include_url=False)
    lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found[:_SHOWN_ERRORS]]
    return escape("; ".join(line[:200] for line in lines))


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
        recorded: its hashes in dataset.json; none before the first run.
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
    lines = []
    for code in codes:
        if code.changed and code.computed:
            version = f"is still {code.identity['version']!r}" if "version" in code.identity else "is not set"
            lines.append(
                f"{code.section[:-1]} {code.model}: the file of class {code.identity['class']} has changed since its "
                f"layers were computed (hash {code.recorded[-1]} then, {code.now} now), and its `version` {version}"
            )
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
    version = manifest.get("schema_version")
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
    found: Mapping[str, Any] | None = manifest
    for again in () if store.local else (True, False):
        try:
            found = store.read_json(MANIFEST)
            break
        except (DamagedJson, StorageError) as error:
            if not again and isinstance(error, DamagedJson):
                raise StorageError(f"{error} The storage did not store what was written.") from error
            if not again:
                raise
            store.write_json(written, MANIFEST)
    if not same_content(manifest, found):
        raise StorageError(
            f"{store.path(MANIFEST)} is not what was written: the storage lost it, or another command wrote it."
        )


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
    # Former folders of the source by where they are now; those of this config replace earlier places.
    now = {canonical(new): canonical(former) for new, former in config.moved.items()}
    moved = {new: former for new, former in (old or {}).get("moved", {}).items() if former not in now.values()}
    if moved | now:
        manifest["moved"] = moved | now
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


_VALUE_CHARS = 200  # of a value in a message
_NAMES = 3  # of layers in a message


def check_recipes(
    store: Store, manifest: Mapping[str, Any] | None, layers: Mapping[str, Layer], found: Mapping[str, str | None]
) -> None:
    """Raise UserError if layers were made by other recipes than those of the config's ``layers``.

    ``found`` maps layers to their fingerprints in the dataset. The message has the settings that differ, with a layer
    and its fingerprints and the number of the others, and the command that deletes the layers.
    """
    require_images(manifest or {"images": None}, f"output: {store.url}")
    others = {name: fingerprint for name, fingerprint in found.items() if fingerprint != layers[name].fingerprint}
    if not others:
        return
    lines = [f"{store.url} was made by another config, and the results would be mixed:"]
    lines += difference_lines(dict.fromkeys(others, manifest or {}), layers, others, "the dataset")
    known = {**{name: {} for name in others}, **mapping_at(manifest or {}, "layers")}
    command = drop_command(store.url, with_dependants(others, known), known)
    choices = "write to another `output`" + (", give the changed model another name" if SAMPLES not in others else "")
    lines.append(f"Undo the change, {choices}, or delete these layers and compute them again: {command}")
    raise UserError("\n".join(lines))


def difference_lines(
    manifests: Mapping[str, Mapping[str, Any]],
    layers: Mapping[str, Layer],
    found: Mapping[str, str | None],
    where: str,
) -> Iterator[str]:
    """The settings that differ from those in manifests, each with the first layer of ``found`` that has them and its
    fingerprints; and the other layers.

    ``where`` names what the manifests belong to.
    """
    by_reason: dict[tuple[str, ...], list[str]] = {}
    for name in found:
        layer = layers[name]
        recorded = layer.kind.recorded(layer, manifests[name])
        lines = tuple(_differences(recorded.before, recorded.now, where))
        if not lines and not any(need in found for need in layer.needs):
            entry = mapping_at(manifests[name], "layers", name)
            now = {"count": layer.count, "dim": layer.dim, "dtype": layer.dtype, "texts": layer.texts}
            known = [key for key, value in now.items() if value and entry.get(key)]
            lines = tuple(_differences({key: entry[key] for key in known}, {key: now[key] for key in known}, where))
            lines = lines or ("nothing in dataset.json explains the difference",)
        by_reason.setdefault(lines, []).append(name)
    following = by_reason.pop((), [])
    for reason, (name, *others) in by_reason.items():
        yield f"  {name}: fingerprint {found[name]} in {where}, {layers[name].fingerprint} in this config"
        yield from (f"    {line}" for line in reason)
        if others:
            yield f"  {_some(others)} for the same reason"
    if following:
        yield f"  {_some(following)} computed from what differs"


def _some(names: list[str]) -> str:
    """A number of layers, with the names of the first."""
    more = ", ..." if len(names) > _NAMES else ""
    return f"{plural(len(names), 'more layer')} ({', '.join(names[:_NAMES])}{more})"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> Iterator[str]:
    """One line for each setting that has another value."""
    old, new = (dict(flatten(values)) for values in (before, now))
    for key in dict.fromkeys([*new, *old]):
        first, second = (
            json.dumps(values[key], ensure_ascii=False) if key in values else None for values in (old, new)
        )
        if first != second:  # as text, as in the fingerprint: 1 and 1.0 are different
            texts = ["not set" if text is None else text for text in (first, second)]
            shown = [text if len(text) <= _VALUE_CHARS else f"{text[:_VALUE_CHARS]}..." for text in texts]
            yield f"{key}: {shown[0]} in {where}, {shown[1]} in this config"
