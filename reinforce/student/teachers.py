"""The models whose targets a training run's datasets have, and what they give of images and texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from reinforce.dataset.kinds.registry import kind_of, owner_of
from reinforce.dataset.layers import embeddings_layer, model_of
from reinforce.dataset.manifest import select_names
from reinforce.errors import UserError
from reinforce.student.config import Data, StudentConfig
from teachers.open_clip.family import model_identity
from teachers.spec import ModelSpec

T = TypeVar("T", bound=Collection[str])

#: Keys of a batch; SYNTHETIC exists only if captioners are read.
IMAGE, CAPTION, SYNTHETIC = "image", "caption", "synthetic"
#: Sides of a teacher.
IMAGES, TEXTS = "images", "texts"


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher as dataset.json or the loaded model describes it.

    ``sides`` are IMAGES, TEXTS or both. ``scale_source`` describes where the logit scale comes from.
    """

    dim: int
    sides: frozenset[str]
    logit_scale: float | None
    scale_source: str

    def has(self, what: str) -> bool:
        """Whether it has vectors of IMAGE, CAPTION or SYNTHETIC."""
        return (IMAGES if what == IMAGE else TEXTS) in self.sides


def stored_teachers(config: StudentConfig, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, TeacherInfo]:
    """The teachers of a training run's datasets; ``manifests`` are the contents of ``dataset.json`` by URL.

    Raises UserError for an unknown teacher, for one that lacks vectors of some of the texts, and if datasets disagree.
    """
    known: dict[str, TeacherInfo] = {}
    named = config.data.teachers
    wanted = None if named is None else [*dict.fromkeys([*named, *config.loss.anchors])]
    names = {url: select_names(url, "teachers", wanted, manifest) for url, manifest in manifests.items()}
    for name in _agreed("teachers", names):
        infos = {url: _stored_teacher(name, config.data, url, manifest) for url, manifest in manifests.items()}
        (url, first), *others = infos.items()
        for other_url, other in others:
            if (other.dim, other.sides) != (first.dim, first.sides):
                raise UserError(
                    f"teacher {name} differs between the datasets: {url} has {_describe(first)}, {other_url} has "
                    f"{_describe(other)}. Name other data.teachers, or run the missing layers."
                )
            if other.logit_scale != first.logit_scale and name not in config.loss.logit_scales:
                raise UserError(
                    f"teacher {name} has logit scale {first.logit_scale} in {url} and {other.logit_scale} in "
                    f"{other_url}. Set loss.logit_scales.{name}."
                )
        known[name] = first
    return known


def compare_towers(config: StudentConfig, manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each teacher whose space is learnt beside a tower that is not known to be the teacher's.

    Raises UserError for a teacher that has no text tower: others have vectors of the texts, and it has none.
    """
    student, loss = config.student, config.loss
    key, spec = ("student.model", student) if config.data.images == "none" else ("student.text", student.text)
    if spec is None or loss.features.head != "none" or loss.online or loss.lambda_ == 0:
        return []
    try:
        own = _known_identity(model_identity(ModelSpec(model=spec.model, pretrained=spec.pretrained)))
    except (ValueError, OSError):
        return []  # without weights, or reported where the model is built
    notes = []
    for url, manifest in manifests.items():
        texts = {model_of(layer) for layer in manifest["layers"] if kind_of(layer).picks == "text"}
        for name in select_names(url, "teachers", config.data.teachers, manifest):
            if _known_identity(manifest["teachers"][name].get("model") or {}) == own:
                continue
            if texts and name not in texts:
                raise UserError(
                    f"{key}: teacher {name} of {url} has vectors of images alone, so {spec.model} has no text tower of "
                    "its space. Remove `text`, or name the teacher that it is of under data.teachers."
                )
            notes.append(f"{key}: {url} does not show that {spec.model} is teacher {name}, whose space is learnt")
    return notes


def same_model(entry: Mapping[str, Any], spec: ModelSpec) -> bool:
    """Whether a spec is that of the model of an entry of dataset.json, in any precision."""
    try:
        identities = [entry.get("model") or {}, spec.describe().identity]
    except (ValueError, OSError):
        return False
    own, other = ({key: value for key, value in one.items() if key != "precision"} for one in identities)
    return own == other


def _known_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in ("precision", "preprocess")}


def stored_models(
    data: Data, manifests: Mapping[str, Mapping[str, Any]], section: str, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """The models that have targets under the name ``section``: by name, the entry of their layer in dataset.json.

    Raises UserError for one that ``data`` names and a dataset lacks, for one that differs between the datasets, and for
    one that is unfinished, with ``only`` one of these.
    """
    owner, found = owner_of(section), {}
    for url, manifest in manifests.items():
        layers = {model_of(layer): layer for layer in manifest["layers"] if kind_of(layer).target_section == section}
        models = select_names(url, owner, getattr(data, owner), manifest)
        found[url] = {name: manifest["layers"][layers[name]] for name in models if name in layers}
        for name in found[url] if only is None else only:
            if name in found[url] and found[url][name]["dim"] is None:
                raise UserError(f"{url}: dataset.json has no dimension of {layers[name]}. Finish the run.")
    first = _agreed(section, found)
    url, what = next(iter(found)), "" if section == owner else f"{section} with "
    for other_url, other in found.items():
        for name, entry in first.items():
            # all but the models' identities and inputs must be equal
            free = ("fingerprint", "model", "code", "count", "sees")
            one, two = ({k: v for k, v in of.items() if k not in free} for of in (entry, other[name]))
            if keys := [key for key in one | two if one.get(key) != two.get(key)]:
                fix = f"Name those to use under data.{owner}."
                if "codebook" in keys:
                    fix = "Copy the codebooks of one dataset before the other is made, or name one under data.datasets."
                raise UserError(
                    f"{owner[:-1]} {name} has {what}another {' and another '.join(keys)} in {other_url} than in {url}. "
                    f"{fix}"
                )
    return first


def _agreed(section: str, found: Mapping[str, T]) -> T:
    """The models of a section that all datasets have; ``found`` are theirs by URL. Raises UserError if they differ."""
    (url, first), *others = found.items()
    for other_url, other in others:
        if set(other) != set(first):
            raise UserError(
                f"the datasets have different {section}: {url} has {', '.join(first) or 'none'}, {other_url} has "
                f"{', '.join(other) or 'none'}. Name the {owner_of(section)} to use under data.{owner_of(section)}."
            )
    return first


def text_kinds(data: Data, manifests: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The kinds of text of the examples of datasets, as they are named in a batch. Raises UserError."""
    if data.captions == "none":
        return ()
    synthetic = data.parallel or any(captioner_names(data, url, manifest) for url, manifest in manifests.items())
    return (CAPTION, SYNTHETIC) if data.captions == "both" and synthetic else (CAPTION,)


def captioner_names(data: Data, url: str, manifest: Mapping[str, Any]) -> list[str]:
    """The captioners whose captions are read with their own vectors. Raises UserError if there is none of a name."""
    if data.captions == "none":
        return []
    found = select_names(url, "captioners", None if data.captioners is None else list(data.captioners), manifest)
    return [name for name in found if name not in (data.parallel or ())]


def _stored_teacher(name: str, data: Data, url: str, manifest: Mapping[str, Any]) -> TeacherInfo:
    entry, layers = manifest["teachers"][name], manifest["layers"]
    texts = () if data.captions == "none" else ("caption", *captioner_names(data, url, manifest))
    found = [what for what in texts if embeddings_layer(name, what) in layers]
    missing = [what for what in texts if what not in found]
    if found and missing:
        raise UserError(
            f"{url}: teacher {name} has vectors of {', '.join(found)}, not of {', '.join(missing)}. "
            "Run `reinforce run` for the missing layers, or name other data.captioners or data.teachers."
        )
    sides = {IMAGES} if embeddings_layer(name, IMAGES) in layers and data.images != "none" else set()
    sides |= {TEXTS} if found else set()
    # Of published teachers, the layers alone state it; others may be stored with fewer numbers than the model has.
    dims = [*(layers.get(embeddings_layer(name, what), {}).get("dim") for what in (IMAGES, *found)), entry["dim"]]
    dim = next((dim for dim in dims if dim), 0)
    if sides and not dim:
        raise UserError(f"{url}: dataset.json has no dimension of teacher {name}. Finish the run.")
    source = f"dataset: {entry['logit_scale_from']}"
    return TeacherInfo(dim, frozenset(sides), entry["logit_scale"], source)


def _describe(teacher: TeacherInfo) -> str:
    return f"{teacher.dim} dimensions of {' and '.join(sorted(teacher.sides)) or 'nothing'}"
