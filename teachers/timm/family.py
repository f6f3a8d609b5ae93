"""Models of timm by name, ``hf-hub:ORG/REPO`` or ``local-dir:FOLDER``, as teachers: their names, files and identity.

Neither timm nor torch is imported before a model is loaded.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator

from teachers import weights
from teachers.spec import ModelInfo, ModelSpec, TeacherSpec

_HUB_PREFIX, _FOLDER_PREFIX = "hf-hub:", "local-dir:"
_DEFINITION = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)
_TEXT = re.compile(r"[\"']([\w.]+)[\"']")
#: Files with the weights in a folder, of which the first that exists is loaded.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_source(name: str) -> None:
    """Raise ValueError for a name with another prefix than those of a hub model and a folder."""
    if ":" in name and not name.startswith((_HUB_PREFIX, _FOLDER_PREFIX)):
        raise ValueError(
            f"model: use a name of timm, {_HUB_PREFIX}ORG/REPO or {_FOLDER_PREFIX}FOLDER, and `pretrained` for a file"
        )


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """What determines the outputs of a model.

    Raises ValueError for a name that timm does not know, and FileNotFoundError for missing files.
    """
    identity: dict[str, Any] = {"family": "timm", "precision": spec.resolved_precision}
    if spec.name.startswith(_FOLDER_PREFIX):  # identified by its files: a folder that was moved is the same model
        config = _folder(spec.name) / "config.json"
        files = [config] if spec.pretrained else [config, Path(str(weights_file(spec)))]
        identity["files"] = {path.name: weights.identity(path) for path in files}
    else:
        identity["model"] = spec.model
        check_model(spec.name)
    if spec.pretrained is not None:
        identity["weights"] = weights.identity(spec.pretrained)
    if spec.options:
        identity["options"] = spec.options
    return identity


def check_model(name: str) -> None:
    """Raise ValueError with near names for a model, or a tag of its weights, that timm does not know."""
    if name.startswith((_HUB_PREFIX, _FOLDER_PREFIX)):
        return
    models, texts = _names()
    model, _, tag = name.partition(".")
    timm: Any = sys.modules.get("timm")
    known = model in models or model in texts or (timm is not None and timm.is_model(model))
    if known and (not tag or tag in texts):
        return
    near = get_close_matches(name, models | {text for text in texts if text.partition(".")[0] in models}, 3)
    what = f"model {model}" if not known else f"weights {tag} of model {model}"
    hint = f"; near names: {', '.join(near)}" if near else ""
    raise ValueError(f"timm {version('timm')} has no {what}{hint}. `timm.list_models()` lists all")


def hosts_of(spec: ModelSpec) -> Iterator[str]:
    """Where the weights come from, unless they are a file."""
    if spec.pretrained is None and not spec.name.startswith(_FOLDER_PREFIX):
        yield f"{weights.HUB} or the host that timm names ({spec.name.removeprefix(_HUB_PREFIX)})"


def timm_name(name: str) -> str:
    """A name as timm takes it."""
    return f"{_FOLDER_PREFIX}{_folder(name)}" if name.startswith(_FOLDER_PREFIX) else name


def weights_file(spec: ModelSpec) -> str | Path | None:
    """The file with the weights of a model, by path or URL; None for those that timm or the hub has.

    Raises FileNotFoundError for a folder without weights.
    """
    if spec.pretrained is not None or not spec.name.startswith(_FOLDER_PREFIX):
        return spec.pretrained
    folder = _folder(spec.name)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"folder {folder} has no weights: expected {' or '.join(_WEIGHTS)}")


def _folder(name: str) -> Path:
    """The folder of a model. Raises FileNotFoundError if it has no config."""
    folder = Path(name.removeprefix(_FOLDER_PREFIX)).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} does not exist: use a folder that timm's save_for_hf writes")
    return folder


@cache
def _names() -> tuple[frozenset[str], frozenset[str]]:
    """The models that the source of timm defines, and other texts in it: names with tags, tags, and former names."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    source = "\n".join(path.read_text("utf-8") for path in (Path(spec.origin).parent / "models").glob("*.py"))
    texts = {*_TEXT.findall(source)}
    return frozenset(_DEFINITION.findall(source)), frozenset(texts | {text.partition(".")[2] for text in texts})


class TimmTeacherSpec(TeacherSpec):
    loader: ClassVar[str] = "teachers.timm.teacher:TimmTeacher"
    takes_options: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_model(self) -> TimmTeacherSpec:
        check_source(self.name)
        return self

    def describe(self) -> ModelInfo:
        return ModelInfo(dim=None, images=True, texts=False, identity=model_identity(self))

    def hosts(self) -> Iterator[str]:
        return hosts_of(self)
