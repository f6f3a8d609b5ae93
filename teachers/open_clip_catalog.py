"""What open_clip knows about its models by name, read without importing torch."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from teachers.weights import CHECKPOINTS, is_url

HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"

#: Weights in a local-dir folder, the best first; any other checkpoint counts if it is the only one.
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
    """The name under which open_clip keeps a model: ``ViT-L/14`` is ``ViT-L-14``."""
    return model.replace("/", "-")


def model_config(model: str) -> dict[str, Any] | None:
    """open_clip's ``model_cfg``; None for a hub model, which is not looked up. Raises ValueError, FileNotFoundError."""
    if model.startswith(HUB_PREFIX):
        return None
    if model.startswith(FOLDER_PREFIX):
        path = local_folder(model) / "open_clip_config.json"
        config = _read_json(path).get("model_cfg")
        if not isinstance(config, dict):
            raise ValueError(f"{path} has no `model_cfg`: want a folder as open_clip's push_to_hf_hub saves it")
    else:
        path = _package() / "model_configs" / f"{builtin_name(model)}.json"
        if not path.is_file():
            raise ValueError(
                f"model {model!r} is unknown to open_clip{_similar(builtin_name(model), builtin_models())}"
            )
        config = _read_json(path)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it does not describe an image-text model")
    return config


def check_model(model: str, pretrained: str | None) -> None:
    """Refuse a model and weights that cannot go together, without looking at the network.

    Raises ValueError or FileNotFoundError.
    """
    model_config(model)
    if model.startswith((HUB_PREFIX, FOLDER_PREFIX)):
        if pretrained is not None:
            raise ValueError(
                f"`pretrained` is not used with {model.partition(':')[0]}: which brings its weights; remove it"
            )
        if model.startswith(FOLDER_PREFIX):
            folder_weights(model)
    elif pretrained is None:
        tags = _pretrained().list_pretrained_tags_by_model(builtin_name(model))
        raise ValueError(
            f"model {model} has no weights without `pretrained`: give a checkpoint file or a tag ({', '.join(tags)})"
        )
    elif is_checkpoint(pretrained):
        if not is_url(pretrained) and not Path(pretrained).expanduser().is_file():
            raise FileNotFoundError(f"checkpoint {pretrained} is not there")
    else:
        tag_config(model, pretrained)


def is_checkpoint(pretrained: str) -> bool:
    """Whether ``pretrained`` means a file, by path or URL, rather than a tag."""
    return "/" in pretrained or Path(pretrained).suffix in CHECKPOINTS or Path(pretrained).is_file()


def canonical_tag(tag: str) -> str:
    """The spelling under which open_clip keeps a tag."""
    return tag.lower().replace("-", "_")


def builtin_models() -> list[str]:
    return sorted(path.stem for path in (_package() / "model_configs").glob("*.json"))


def tag_config(model: str, tag: str) -> dict[str, Any]:
    """Where a pretrained tag's weights are and how its images are preprocessed.

    Raises ValueError if the model has no such tag, or if the tag was trained with the other activation: open_clip
    only warns of that, and the embeddings are wrong.
    """
    name = builtin_name(model)
    pretrained = _pretrained()
    found: dict[str, Any] = pretrained.get_pretrained_cfg(name, tag)
    tags = list(pretrained.list_pretrained_tags_by_model(name))
    if not found:
        models = pretrained.list_pretrained_models_by_tag(tag)
        where = f"; models with that tag: {', '.join(models)}" if models else _similar(tag, tags)
        known = f"; tags of {name}: {', '.join(tags)}" if tags else f"; {name} has no tags"
        raise ValueError(f"pretrained {tag!r} is neither a tag of {name} nor a checkpoint file{where}{known}")
    config = model_config(name)
    assert config is not None
    quick = bool(found.get("quick_gelu", False))
    other = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
    # A model without a twin (roberta-ViT-B-32) is the one that the weights were trained as, whatever the table says.
    if quick != bool(config.get("quick_gelu", False)) and other != name and other in builtin_models():
        raise ValueError(
            f"pretrained {tag!r} was trained with{'' if quick else 'out'} QuickGELU and {name} is built "
            f"with{'out' if quick else ''} it, which gives wrong embeddings: use model {other}"
        )
    return found


def local_folder(model: str) -> Path:
    """The folder of ``local-dir:PATH``. Raises FileNotFoundError."""
    folder = Path(model.removeprefix(FOLDER_PREFIX)).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} is not there")
    return folder


def folder_weights(model: str) -> Path:
    """The checkpoint in the folder of ``local-dir:PATH``. Raises FileNotFoundError, ValueError if it is not clear."""
    folder = local_folder(model)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in CHECKPOINTS)
    if not others:
        raise FileNotFoundError(f"folder {folder} holds no weights: want {_WEIGHTS[0]} or {_WEIGHTS[2]}")
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise ValueError(f"folder {folder} holds several checkpoints ({names}): name the one to use {_WEIGHTS[0]}")
    return others[0]


@cache
def _package() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("open_clip is not installed: pip install open_clip_torch")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _pretrained() -> ModuleType:
    """``open_clip.pretrained``, a table of tags, without the rest of the package and without torch.

    The table needs 400 MB less that way, and planning a run needs nothing but the table.
    """
    if "open_clip" in sys.modules:
        return importlib.import_module("open_clip.pretrained")
    alias = "_open_clip_tags"
    package = ModuleType(alias)
    package.__path__ = [str(_package())]
    sys.modules[alias] = package
    # open_clip.pretrained does without safetensors if it is missing; with it, torch comes along.
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
        raise FileNotFoundError(f"{path} is not there")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a JSON object")
    return data


def _similar(name: str, known: list[str]) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(folded[match] for match in close)}?" if close else ""
