"""What a teacher or captioner is before it is loaded: sides, dimension, and all that decides its outputs.

Neither weights nor torch are loaded here (a class of the user's may load what it likes), and hub models are not
looked up, so that planning stays light and works offline.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teachers import open_clip_catalog, postprocess, transformers_catalog, weights
from teachers.redact import redact_values
from teachers.spec import DECODING_FIELDS, CaptionerSpec, ModelSpec, TeacherSpec

#: What chat models of transformers alone are told; part of an identity only where it is set.
_CHAT = ("prompt", "image_size")


@dataclass(frozen=True)
class ModelInfo:
    """``dim`` is None where only loading tells. ``identity`` is JSON: two models whose identities are equal give
    equal outputs on the same software."""

    dim: int | None
    images: bool
    texts: bool
    identity: dict[str, Any]


def describe_teacher(name: str, spec: TeacherSpec) -> ModelInfo:
    """Raises ValueError or FileNotFoundError that names the teacher and the mend."""
    with naming(f"teacher {name}"):
        if spec.class_ is not None:
            return _describe_class(spec)
        if spec.columns is not None:
            identity = {"family": spec.family, "model": spec.model, "columns": [*spec.columns]}
            return ModelInfo(spec.columns[1] - spec.columns[0], images=True, texts=True, identity=identity)
        return _describe_transformers(spec) if spec.family == "transformers" else _describe_open_clip(spec)


def describe_captioner(name: str, spec: CaptionerSpec) -> ModelInfo:
    """Raises ValueError or FileNotFoundError that names the captioner and the mend."""
    with naming(f"captioner {name}"):
        if spec.class_ is not None:
            cls = import_class(spec)
            if not callable(getattr(cls, "caption", None)):
                raise ValueError(f"class {spec.class_} has no method `caption(pixels, seeds)`")
            given = [field for field in (*DECODING_FIELDS, *_CHAT) if field in spec.model_fields_set]
            if given:
                raise ValueError(f"{', '.join(given)}: not used with `class`; pass them to your class in `options`")
            identity = {**_class_identity(spec, cls), "captions": spec.captions, **_cleaning(spec)}
            return ModelInfo(dim=None, images=True, texts=False, identity=identity)
        if spec.family == "published":
            identity = {"family": spec.family, "texts": spec.model, "captions": spec.captions}
            return ModelInfo(dim=None, images=True, texts=False, identity=identity)
        model = _transformers_captioner(spec) if spec.family == "transformers" else _coca(spec)
        chat = {field: value for field in _CHAT if (value := getattr(spec, field)) is not None}
        identity = {**model, **spec.decoding(), **chat, **_cleaning(spec)}
        return ModelInfo(dim=None, images=True, texts=False, identity=identity)


def _cleaning(spec: CaptionerSpec) -> dict[str, Any]:
    """Nothing where no cleaning is asked for, so that captions of before stay what they are."""
    return {"clean": {"policy": postprocess.POLICY, **spec.clean.model_dump()}} if spec.clean else {}


def _coca(spec: CaptionerSpec) -> dict[str, Any]:
    assert spec.model is not None
    if given := [field for field in _CHAT if getattr(spec, field) is not None]:
        raise ValueError(f"{', '.join(given)}: used by chat models of `family: transformers` alone; remove it")
    identity = _describe_open_clip(spec).identity
    config = open_clip_catalog.model_config(spec.model)
    if config is not None and "multimodal_cfg" not in config:
        captioners = [known for known in open_clip_catalog.builtin_models() if known.startswith("coca_")]
        raise ValueError(f"model {spec.model} does not write captions: use one of {', '.join(captioners)}")
    return identity


def _transformers_captioner(spec: CaptionerSpec) -> dict[str, Any]:
    assert spec.model is not None
    if spec.compile:
        raise ValueError("`compile` is for CoCa alone; remove it")
    config = _transformers_config(spec)
    transformers_catalog.check_captioner(config, spec)
    return _transformers_identity(spec, transformers_catalog.CAPTIONER_SETTINGS)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put the model's name before the message of every error."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what}: {error}") from error
    except OSError as error:
        raise OSError(f"{what}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{what}: {type(error).__name__}: {error}") from error


def import_class(spec: ModelSpec) -> type:
    """The user's class, its options checked against its ``__init__``. Raises ValueError."""
    assert spec.class_ is not None
    module_name, _, class_name = spec.class_.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(
            f"class {spec.class_} cannot be imported: {type(error).__name__}: {error}. "
            "Install its package, or put its folder on PYTHONPATH."
        ) from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        found = "no such name" if cls is None else f"a {type(cls).__name__} of that name, not a class"
        raise ValueError(f"class {spec.class_}: {module.__file__} has {found}")
    if spec.precision != "fp32":
        raise ValueError("`precision` is not used with `class`; pass it to your class in `options`")
    try:
        json.dumps(spec.options)
    except TypeError as error:
        raise ValueError(f"options of {spec.class_}: {error}; want numbers, texts, lists and mappings") from error
    signature = inspect.signature(cls)
    try:
        signature.bind("device", **spec.options)
    except TypeError as error:
        raise ValueError(f"options of {spec.class_}: {error}; its signature is {class_name}{signature}") from error
    return cls


def _describe_class(spec: TeacherSpec) -> ModelInfo:
    cls = import_class(spec)
    images = callable(getattr(cls, "encode_images", None)) and getattr(cls, "image", "unset") is not None
    texts = callable(getattr(cls, "encode_texts", None))
    if not images and not texts:
        raise ValueError(f"class {spec.class_} has neither `encode_images` nor `encode_texts`")
    dim = getattr(cls, "dim", None)
    return ModelInfo(dim if isinstance(dim, int) else None, images, texts, _class_identity(spec, cls))


def _class_identity(spec: ModelSpec, cls: type) -> dict[str, Any]:
    identity: dict[str, Any] = {"class": spec.class_, "options": redact_values(spec.options)}
    version = getattr(cls, "version", None)
    if isinstance(version, (str, int, float)):
        identity["version"] = version
    return identity


def _describe_open_clip(spec: ModelSpec) -> ModelInfo:
    model = spec.model
    assert model is not None
    open_clip_catalog.check_model(model, spec.pretrained)
    config = open_clip_catalog.model_config(model)
    identity: dict[str, Any] = {"family": "open_clip", "precision": spec.precision}
    if model.startswith(open_clip_catalog.FOLDER_PREFIX):
        # Known by its files: a folder that moves stays the same model.
        folder = open_clip_catalog.local_folder(model)
        checkpoint = open_clip_catalog.folder_weights(model)
        others = [path for path in folder.glob("*.json") if path.name in _TOKENIZER or "open_clip" in path.name]
        identity["files"] = {path.name: weights.identity(path) for path in (checkpoint, *sorted(others))}
    elif model.startswith(open_clip_catalog.HUB_PREFIX):
        identity["model"] = model
    else:
        identity["model"] = open_clip_catalog.builtin_name(model)
        assert spec.pretrained is not None
        if open_clip_catalog.is_checkpoint(spec.pretrained):
            identity["weights"] = weights.identity(spec.pretrained)
        else:
            identity["pretrained"] = open_clip_catalog.canonical_tag(spec.pretrained)
    return ModelInfo(dim=config["embed_dim"] if config else None, images=True, texts=True, identity=identity)


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def _describe_transformers(spec: ModelSpec) -> ModelInfo:
    config = _transformers_config(spec)
    images, texts = transformers_catalog.sides(config)
    dim = transformers_catalog.dimension(config)
    return ModelInfo(dim=dim, images=images, texts=texts, identity=_transformers_identity(spec))


def _transformers_config(spec: ModelSpec) -> dict[str, Any] | None:
    assert spec.model is not None
    if spec.pretrained is not None:
        raise ValueError("`pretrained` is not used with family transformers: the model brings its weights; remove it")
    return transformers_catalog.config_of(spec.model)


def _transformers_identity(spec: ModelSpec, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """``also`` are files of a local model, beside those of any, that decide its outputs."""
    assert spec.model is not None
    identity: dict[str, Any] = {"family": "transformers", "precision": spec.precision}
    if transformers_catalog.is_folder(spec.model):
        files = transformers_catalog.content_files(Path(spec.model).expanduser(), also)
        identity["files"] = {path.name: weights.identity(path) for path in files}
    else:
        identity["model"] = spec.model
    return identity
