"""Model names, configs and pretrained tags of open_clip, read without importing torch."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from teachers.open_clip import released
from teachers.weights import CHECKPOINTS, is_url

HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"
CONFIG_FILE = "open_clip_config.json"
#: ``hf_model_name`` of a text tower whose config, TEXT_CONFIG, is in the folder of the model itself.
OWN_FOLDER = "."
TEXT_CONFIG = "config.json"
#: Keys of the ``text_cfg`` of such a text tower, whose weights are those of the model.
OWN_TEXT: dict[str, Any] = {"hf_model_name": OWN_FOLDER, "hf_model_pretrained": False}

#: Preprocessing that open_clip assumes where weights state none, by key of ``preprocess_cfg``.
DEFAULT_PREPROCESS: dict[str, Any] = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

#: Weights in a local-dir folder, in order of preference; another checkpoint is used if it is the only one.
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


def builtin_name(model: str) -> str:
    """Normalize a model name to open_clip's spelling: ``ViT-L/14`` is ``ViT-L-14``, ``mobileclip_blt`` MobileCLIP-B."""
    found = released.published(model)
    return found[0] if found else model.replace("/", "-")


def weights_name(model: str, pretrained: str | None) -> str | None:
    """``pretrained``, or the tag of a published MobileCLIP that is named without weights."""
    found = released.published(model)
    return found[1] if found and pretrained is None else pretrained


def model_config(model: str) -> dict[str, Any] | None:
    """Read open_clip's ``model_cfg``; None for a hub model, which is not looked up.

    ``OWN_FOLDER`` is replaced by the path of the folder. Raises ValueError or FileNotFoundError.
    """
    if model.startswith(HUB_PREFIX):
        return None
    if model.startswith(FOLDER_PREFIX):
        path = local_folder(model) / CONFIG_FILE
        config = _read_json(path).get("model_cfg")
        if not isinstance(config, dict):
            raise ValueError(f"{path} has no `model_cfg`: use a folder written by open_clip's push_to_hf_hub")
        if (config.get("text_cfg") or {}).get("hf_model_name") == OWN_FOLDER:
            config = {**config, "text_cfg": {**config["text_cfg"], "hf_model_name": str(path.parent.absolute())}}
    else:
        path = _config_files().get(builtin_name(model), Path())
        if not path.is_file():
            known = _suggestion(builtin_name(model), builtin_models())
            raise ValueError(f"model {model!r} is unknown to open_clip{_as_place(model) or known}")
        config = _read_json(path)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it does not describe an image-text model")
    return config


def folder_config(model: str) -> dict[str, Any] | None:
    """The whole open_clip_config.json of ``local-dir:PATH``; None for other models, whose config does not change.

    Raises ValueError or FileNotFoundError.
    """
    if not model.startswith(FOLDER_PREFIX):
        return None
    return _read_json(local_folder(model) / CONFIG_FILE)


def text_folder(config: Mapping[str, Any]) -> Path | None:
    """The local folder of a ``model_cfg`` with the config of its text tower of transformers; None if there is none."""
    name = config["text_cfg"].get("hf_model_name")
    return Path(name) if name and Path(name).is_dir() else None


def is_place(name: str) -> bool:
    """Whether a name of transformers is a local path and no repository of the Hub."""
    return name.startswith((".", "~")) or Path(name).is_absolute() or Path(name).is_dir()


def check_model(model: str, pretrained: str | None) -> None:
    """Check that a model exists and that its weights fit it, without network access.

    Raises ValueError or FileNotFoundError.
    """
    model_config(model)
    pretrained = weights_name(model, pretrained)
    if model.startswith((HUB_PREFIX, FOLDER_PREFIX)):
        if pretrained is not None:
            raise ValueError(
                f"`pretrained` is not used with {model.partition(':')[0]}: it includes its weights; remove it"
            )
        if model.startswith(FOLDER_PREFIX):
            folder_weights(model)
    elif pretrained is None:
        tags = _tags(builtin_name(model))
        raise ValueError(
            f"model {model} has no weights without `pretrained`: set a checkpoint file or a tag ({', '.join(tags)})"
        )
    elif is_checkpoint_file(pretrained):
        if not is_url(pretrained) and not Path(pretrained).expanduser().is_file():
            raise FileNotFoundError(f"checkpoint {pretrained} does not exist")
    else:
        tag_config(model, pretrained)


def check_coca(model: str) -> None:
    """Raise ValueError if a model is known not to be a CoCa, before its weights are downloaded."""
    config = model_config(model)
    if config is not None and "multimodal_cfg" not in config:
        captioners = ", ".join(name for name in builtin_models() if name.startswith("coca_"))
        raise ValueError(f"model {model!r} is not a CoCa and cannot caption: use one of {captioners}")


def is_checkpoint_file(pretrained: str) -> bool:
    """Whether ``pretrained`` is a file, by path or URL, rather than a tag."""
    return "/" in pretrained or Path(pretrained).suffix in CHECKPOINTS or Path(pretrained).is_file()


def builtin_models() -> list[str]:
    return sorted(_config_files())


def tag_config(model: str, tag: str) -> dict[str, Any]:
    """open_clip's entry of a pretrained tag: location of the weights and image preprocessing.

    Raises ValueError if the model has no such tag, or if the weights were trained with the other activation (QuickGELU
    or GELU): open_clip only warns, and the embeddings would be wrong.
    """
    name = builtin_name(model)
    tags = _tags(name)
    found = tags.get(tag.lower().replace("-", "_"), {})
    if not found:
        models = _pretrained().list_pretrained_models_by_tag(tag)
        where = f"; models with that tag: {', '.join(models)}" if models else _suggestion(tag, list(tags))
        options = f"; tags of {name}: {', '.join(tags)}" if tags else f"; {name} has no tags"
        raise ValueError(f"pretrained {tag!r} is neither a tag of {name} nor a checkpoint file{where}{options}")
    config = model_config(name)
    assert config is not None
    quick = bool(found.get("quick_gelu", False))
    other = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
    # Some models exist in one variant only (roberta-ViT-B-32): the weights fit it although the table says otherwise.
    if quick != bool(config.get("quick_gelu", False)) and other != name and other in builtin_models():
        raise ValueError(
            f"pretrained {tag!r} was trained with{'' if quick else 'out'} QuickGELU and {name} is built "
            f"with{'out' if quick else ''} it, which gives wrong embeddings: use model {other}"
        )
    return found


def changed_preprocess(model: str, pretrained: str | None, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of ``preprocess_cfg`` whose values differ from those that open_clip gives the model with these weights.

    They come from ``stated``, the config's keys, or from the config in the folder of a checkpoint file. Raises
    ValueError for a checkpoint file without keys for which a tag of the model differs from open_clip's default.
    """
    if model.startswith(HUB_PREFIX):
        return dict(stated)  # its own are not known without the network
    if model.startswith(FOLDER_PREFIX):
        own = _preprocess_of(_read_json(local_folder(model) / CONFIG_FILE))
    elif pretrained is None or is_checkpoint_file(pretrained):
        own = {}
        if pretrained is not None:
            stated = {**_preprocess_beside(pretrained), **stated}
            _check_stated(builtin_name(model), pretrained, stated)
    else:
        own = _preprocess_of({"preprocess_cfg": tag_config(model, pretrained)})
    own = {**DEFAULT_PREPROCESS, **own}
    return {key: value for key, value in stated.items() if value != own[key]}


def _preprocess_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``DEFAULT_PREPROCESS`` in ``preprocess_cfg``, as the config of a run writes them."""
    found = config.get("preprocess_cfg") or {}
    found = {key: found[key] for key in DEFAULT_PREPROCESS if found.get(key) is not None}
    channels = {key: found[key] for key in ("mean", "std") if key in found}
    return found | {
        key: [float(item) for item in (value if isinstance(value, (list, tuple)) else [value] * 3)]
        for key, value in channels.items()
    }


def _preprocess_beside(checkpoint: str) -> dict[str, Any]:
    """The preprocessing in the open_clip_config.json beside a local file of weights."""
    path = Path(checkpoint.removeprefix("file://")).expanduser()
    if is_url(checkpoint) or not (path.parent / CONFIG_FILE).is_file():
        return {}
    try:
        theirs = folder_weights(f"{FOLDER_PREFIX}{path.parent}") == path
    except (ValueError, FileNotFoundError):
        theirs = False
    return _preprocess_of(_read_json(path.parent / CONFIG_FILE)) if theirs else {}


def _check_stated(name: str, checkpoint: str, stated: Mapping[str, Any]) -> None:
    """Raise ValueError if a tag of a built-in model has another value than open_clip for a key that is not stated."""
    options: dict[str, list[str]] = {}
    missing: set[str] = set()
    for tag, entry in _tags(name).items():
        values = _preprocess_of({"preprocess_cfg": entry})
        options.setdefault(json.dumps(values), []).append(tag)
        missing |= {key for key, value in values.items() if value != DEFAULT_PREPROCESS[key]} - stated.keys()
    if missing:
        choices = []
        for text, tags in options.items():
            shown = ", ".join(f"{key}: {value}" for key, value in json.loads(text).items() if key in missing)
            choices.append(f"`preprocess: {{{shown}}}` as its tag {', '.join(tags[:3])}{', ...' * (len(tags) > 3)}")
        raise ValueError(
            f"checkpoint {checkpoint} does not state its preprocessing, which depends on the weights of {name}: add "
            f"{', or '.join(choices)}; or put the weights' {CONFIG_FILE} into its folder"
        )


def local_folder(model: str) -> Path:
    """The folder of ``local-dir:PATH``. Raises FileNotFoundError."""
    folder = Path(model.removeprefix(FOLDER_PREFIX)).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    return folder


def folder_weights(model: str) -> Path:
    """The checkpoint in a ``local-dir:PATH`` folder. Raises FileNotFoundError, or ValueError if there are several."""
    folder = local_folder(model)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in CHECKPOINTS)
    if not others:
        raise FileNotFoundError(f"folder {folder} has no weights: expected {_WEIGHTS[0]} or {_WEIGHTS[2]}")
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise ValueError(f"folder {folder} has several checkpoints ({names}): rename the one to use to {_WEIGHTS[0]}")
    return others[0]


@cache
def _config_files() -> dict[str, Path]:
    """Config by name of the model: open_clip's, and of released models that it does not have."""
    folders = (released.CONFIGS, _package() / "model_configs")
    return {path.stem: path for folder in folders for path in folder.glob("*.json")}


def _tags(name: str) -> dict[str, dict[str, Any]]:
    """Entries of the pretrained tags of a model in open_clip's spelling."""
    tags = _pretrained().list_pretrained_tags_by_model(name)
    entries = {tag: _pretrained().get_pretrained_cfg(name, tag) for tag in tags}
    return {**released.WEIGHTS.get(name, {}), **entries}


@cache
def _package() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("open_clip is not installed: pip install open_clip_torch")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _pretrained() -> ModuleType:
    """Import ``open_clip.pretrained``, the table of tags, without the rest of the package and without torch.

    This saves 400 MB of memory while planning a run, which needs only the table.
    """
    if "open_clip" in sys.modules:
        return importlib.import_module("open_clip.pretrained")
    alias = "_open_clip_tags"
    package = ModuleType(alias)
    package.__path__ = [str(_package())]
    sys.modules[alias] = package
    # open_clip.pretrained works without safetensors.torch, which would import torch.
    hide = "safetensors.torch" not in sys.modules
    if hide:
        sys.modules["safetensors.torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(f"{alias}.pretrained")
    finally:
        if hide:
            del sys.modules["safetensors.torch"]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a JSON object")
    return data


def _as_place(model: str) -> str:
    """How to write a model that is named by its path, or as a repository of the Hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        return f", and there is a folder of that name: write {FOLDER_PREFIX}{model}"
    if path.is_file():
        return ", and there is a file of that name: write the architecture in `model`, and the file in `pretrained`"
    if "/" not in model or _suggestion(builtin_name(model), builtin_models()):
        return ""
    return f": write {FOLDER_PREFIX}PATH for the folder of a model, {HUB_PREFIX}ORG/NAME for a model of the Hub"


def _suggestion(name: str, candidates: list[str]) -> str:
    folded = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(folded[match] for match in close)}?" if close else ""
