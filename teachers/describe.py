"""Describe a teacher or captioner without loading it: its modalities, dimension and identity.

Neither weights nor torch are loaded here (a custom class may import anything), and hub models are not looked up, so
that planning is fast and works offline.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teachers import weights
from teachers.decoding import postprocess
from teachers.open_clip import catalog as open_clip_catalog
from teachers.redact import redact_values
from teachers.server import options as server_options
from teachers.spec import DECODING_FIELDS, CaptionerSpec, ModelSpec, TeacherSpec
from teachers.tokens.files import check_tokenizer_files
from teachers.transformers import catalog as transformers_catalog

#: Options of chat models of transformers; part of the identity only where they are set.
_CHAT_OPTIONS = ("prompt", "image_size")
#: Tokenizer files of a local open_clip folder.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading it.

    ``dim`` is the length of its embeddings, None where it is known only after loading and for captioners. ``images``
    and ``texts`` say which inputs it takes. ``identity`` is a JSON object that the layer fingerprint covers: models
    with equal identities give equal outputs on the same software. ``code`` is the hash of the file that defines a
    custom class, None for other models; no fingerprint covers it.
    """

    dim: int | None
    images: bool
    texts: bool
    identity: dict[str, Any]
    code: str | None = None


def describe_teacher(name: str, spec: TeacherSpec) -> ModelInfo:
    """Describe a teacher. Raises ValueError or FileNotFoundError that names the teacher and the fix."""
    with errors_naming(f"teacher {name}"):
        if spec.class_ is not None:
            return _describe_class(spec)
        if spec.columns is not None:
            identity = {"family": spec.family, "model": spec.model, "columns": [*spec.columns]}
            return ModelInfo(spec.columns[1] - spec.columns[0], images=True, texts=True, identity=identity)
        return _describe_transformers(spec) if spec.family == "transformers" else _describe_open_clip(spec)


def describe_captioner(name: str, spec: CaptionerSpec) -> ModelInfo:
    """Describe a captioner. Raises ValueError or FileNotFoundError that names the captioner and the fix."""
    with errors_naming(f"captioner {name}"):
        if spec.class_ is not None:
            cls = import_class(spec)
            if not callable(getattr(cls, "caption", None)):
                raise ValueError(f"class {spec.class_} has no method `caption(pixels, seeds)`")
            given = [field for field in (*DECODING_FIELDS, *_CHAT_OPTIONS) if field in spec.model_fields_set]
            if given:
                raise ValueError(f"{', '.join(given)}: not used with `class`; pass them to your class in `options`")
            identity = {**_class_identity(spec, cls), "captions": spec.captions, **_cleaning_identity(spec)}
            return ModelInfo(dim=None, images=True, texts=False, identity=identity, code=_hash_of_code(cls))
        if spec.family == "published":
            identity = {"family": spec.family, "texts": spec.model, "captions": spec.captions}
            return ModelInfo(dim=None, images=True, texts=False, identity=identity)
        if spec.family == "openai":
            server_options.check(spec)
            identity = {**server_options.identity(spec), **_cleaning_identity(spec)}
            return ModelInfo(dim=None, images=True, texts=False, identity=identity)
        model = _transformers_captioner_identity(spec) if spec.family == "transformers" else _coca_identity(spec)
        chat = {field: value for field in _CHAT_OPTIONS if (value := getattr(spec, field)) is not None}
        identity = {**model, **spec.decoding(), **chat, **_cleaning_identity(spec)}
        return ModelInfo(dim=None, images=True, texts=False, identity=identity)


def _cleaning_identity(spec: CaptionerSpec) -> dict[str, Any]:
    """Empty without ``clean``, so that the fingerprints of captions made before it existed stay valid."""
    return {"clean": {"policy": postprocess.POLICY, **spec.clean.model_dump()}} if spec.clean else {}


def _coca_identity(spec: CaptionerSpec) -> dict[str, Any]:
    assert spec.model is not None
    if given := [field for field in _CHAT_OPTIONS if getattr(spec, field) is not None]:
        raise ValueError(f"{', '.join(given)}: used only by chat models of `family: transformers`; remove it")
    identity = _describe_open_clip(spec).identity
    config = open_clip_catalog.model_config(spec.model)
    if config is not None and "multimodal_cfg" not in config:
        captioners = [name for name in open_clip_catalog.builtin_models() if name.startswith("coca_")]
        raise ValueError(f"model {spec.model} does not write captions: use one of {', '.join(captioners)}")
    return identity


def _transformers_captioner_identity(spec: CaptionerSpec) -> dict[str, Any]:
    assert spec.model is not None
    if spec.compile is True:
        raise ValueError("`compile` works only with CoCa; remove it")
    config = _transformers_config(spec)
    transformers_catalog.check_captioner(config, spec)
    if transformers_catalog.is_local_folder(spec.model):
        check_tokenizer_files(Path(spec.model).expanduser())
    return _transformers_identity(spec, transformers_catalog.CAPTIONER_FILES)


@contextmanager
def errors_naming(what: str) -> Iterator[None]:
    """Prefix the message of every error with ``what``; errors of other types become RuntimeError."""
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
    """Import the class of a spec and check its options against its ``__init__``. Raises ValueError.

    The working folder is searched, too, after the installed packages: a file in it replaces none of them.
    """
    assert spec.class_ is not None
    module_name, _, class_name = spec.class_.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing the module may raise anything
        raise ValueError(
            f"class {spec.class_} cannot be imported: {type(error).__name__}: {error}. "
            "Install its package, or put its folder on PYTHONPATH."
        ) from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        found = "no such name" if cls is None else f"a {type(cls).__name__} of that name, not a class"
        raise ValueError(f"class {spec.class_}: {module.__file__} has {found}")
    if spec.precision not in ("auto", "fp32"):
        raise ValueError("`precision` is not used with `class`; pass it to your class in `options`")
    try:
        json.dumps(spec.options)
    except TypeError as error:
        raise ValueError(f"options of {spec.class_}: {error}; use numbers, strings, lists and mappings") from error
    signature = inspect.signature(cls)
    try:
        signature.bind("device", **spec.options)
    except TypeError as error:
        raise ValueError(f"options of {spec.class_}: {error}; its signature is {class_name}{signature}") from error
    return cls


def _describe_class(spec: TeacherSpec) -> ModelInfo:
    cls = import_class(spec)
    if spec.compile is not None:
        raise ValueError("`compile` is not used with `class`; compile your class itself")
    images = callable(getattr(cls, "encode_images", None)) and getattr(cls, "image", "unset") is not None
    texts = callable(getattr(cls, "encode_texts", None))
    if not images and not texts:
        raise ValueError(f"class {spec.class_} has neither `encode_images` nor `encode_texts`")
    dim = getattr(cls, "dim", None)
    identity = _class_identity(spec, cls)
    return ModelInfo(dim if isinstance(dim, int) else None, images, texts, identity, _hash_of_code(cls))


def _hash_of_code(cls: type) -> str | None:
    """Hash of the file that defines a class -> 16 hex digits; None if there is none."""
    try:
        path = inspect.getsourcefile(cls)
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest() if path else None
    except (OSError, TypeError):
        return None


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
    identity: dict[str, Any] = {"family": "open_clip", "precision": spec.resolved_precision}
    if model.startswith(open_clip_catalog.FOLDER_PREFIX):
        # Identified by its files: a folder that was moved is the same model.
        folder = open_clip_catalog.local_folder(model)
        if config is not None and config["text_cfg"].get("hf_tokenizer_name"):
            check_tokenizer_files(folder)
        checkpoint = open_clip_catalog.folder_weights(model)
        others = [path for path in folder.glob("*.json") if path.name in _TOKENIZER_FILES or "open_clip" in path.name]
        identity["files"] = {path.name: weights.identity(path) for path in (checkpoint, *sorted(others))}
    elif model.startswith(open_clip_catalog.HUB_PREFIX):
        identity["model"] = model
    else:
        identity["model"] = open_clip_catalog.builtin_name(model)
        assert spec.pretrained is not None
        if open_clip_catalog.is_checkpoint_file(spec.pretrained):
            identity["weights"] = weights.identity(spec.pretrained)
        else:
            identity["pretrained"] = open_clip_catalog.canonical_tag(spec.pretrained)
    return ModelInfo(dim=config["embed_dim"] if config else None, images=True, texts=True, identity=identity)


def _describe_transformers(spec: TeacherSpec) -> ModelInfo:
    config = _transformers_config(spec)
    images, texts = transformers_catalog.modalities(config)
    dim = transformers_catalog.embedding_dim(config, spec.pooling)
    assert spec.model is not None
    if texts and transformers_catalog.is_local_folder(spec.model):
        check_tokenizer_files(Path(spec.model).expanduser())
    identity = {**_transformers_identity(spec), **spec.transformers_options}
    return ModelInfo(dim=dim, images=images, texts=texts, identity=identity)


def _transformers_config(spec: ModelSpec) -> dict[str, Any] | None:
    assert spec.model is not None
    if spec.pretrained is not None:
        raise ValueError(
            "`pretrained` is not used with family transformers, whose models include their weights; remove it"
        )
    return transformers_catalog.read_config(spec.model)


def _transformers_identity(spec: ModelSpec, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """``extra`` are names of further files that determine the outputs of a local model."""
    assert spec.model is not None
    identity: dict[str, Any] = {"family": "transformers", "precision": spec.resolved_precision}
    if transformers_catalog.is_local_folder(spec.model):
        files = transformers_catalog.content_files(Path(spec.model).expanduser(), extra)
        identity["files"] = {path.name: weights.identity(path) for path in files}
    else:
        identity["model"] = spec.model
    return identity
