"""Models as they are named on the command line."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from reinforce import settings
from reinforce.errors import UserError
from reinforce.source.urls import filesystem
from teachers import backbone_spec as networks
from teachers.open_clip import catalog
from teachers.redact import redact
from teachers.registry import FAMILIES, AnyTeacher, teacher_spec
from teachers.spec import ModelSpec, TeacherSpec

_CONFIG = "open_clip_config.json"
HUB_URL = "hf://"


@contextlib.contextmanager
def resolve_models(
    names: Sequence[str],
    pretrained: str | None = None,
    *,
    weights: bool = True,
    teachers: bool = False,
    images_alone: bool = False,
) -> Iterator[dict[str, ModelSpec]]:
    """Yield the specs of models by name; remote models are copied to a temporary folder until the context ends.

    A name is open_clip's (``NAME,TAG``, or ``NAME`` with the tag ``pretrained``), ``local-dir:PATH``,
    ``hf-hub:ORG/REPO``, or a folder or fsspec URI that a training run wrote. With ``weights=False`` only the
    architecture is needed: open_clip's ``NAME`` is enough, and a model of the hub, whose config would be downloaded, is
    refused. With ``teachers``, a name may also be that of any teacher (``teacher_of``), whose spec is a TeacherSpec.
    So is that of a network without a text tower, which is refused without ``teachers`` or ``images_alone``. Raises
    UserError.
    """
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"{min(repeated)} is named twice. Name each model once.")
    with contextlib.ExitStack() as stack:
        specs: dict[str, ModelSpec] = {}
        for name in names:
            network = (teachers or images_alone) and _exported_class(name, stack)
            specs[name] = network or (teachers and teacher_of(name)) or _spec(name, pretrained, stack)
        for name, spec in specs.items():
            with model_errors(name):
                if isinstance(spec, TeacherSpec):
                    if not teachers and not images_alone:
                        raise ValueError("it is a network of images without a text tower, which is needed here")
                    if not spec.describe().images:
                        raise ValueError("it has no image side; evaluate a model that encodes images")
                elif weights:
                    catalog.check_model(str(spec.model), spec.pretrained)
                elif catalog.model_config(str(spec.model)) is None:
                    raise ValueError(
                        "its architecture is not on this machine: give a name of open_clip, or local-dir:PATH"
                    )
        yield specs


def teacher_of(name: str) -> TeacherSpec | None:
    """The teacher that is named ``FAMILY:MODEL``, ``class:package.module:Class`` or ``CONFIG.yaml:TEACHER``, else None.

    The last is the teacher of a run's config. Raises UserError for one that does not exist, or whose keys are wrong.
    """
    first, _, rest = name.partition(":")
    config, _, teacher = name.rpartition(":")
    if config.endswith((".yaml", ".yml")):
        entries = settings.read(config).get("teachers")
        if not isinstance(entries, dict) or not isinstance(keys := entries.get(teacher), dict):
            known = ", ".join(entries) if isinstance(entries, dict) else ""
            raise UserError(f"config {config} has no teacher {teacher!r}; it has {known or 'none'}.")
    elif first == "class":
        keys = {"class": rest}
    elif first in FAMILIES and FAMILIES[first].teacher is not None:
        model, _, tag = rest.partition(",")
        keys = {"family": first, "model": model, **({"pretrained": tag} if tag else {})}
    else:
        return None
    spec = settings.parse(AnyTeacher, keys, where=name)
    if spec.published:
        raise UserError(f"{name}: its outputs are stored, not computed. Name a model that can be loaded.")
    return spec


def short_name(name: str) -> str:
    """Remove the folders: ``runs/s0`` -> ``s0``, ``MobileCLIP2-S0,dfndr2b`` -> ``MobileCLIP2-S0-dfndr2b``."""
    return name.rstrip("/").rpartition("/")[2].rpartition(":")[2].replace(",", "-")


def loading_call(address: str) -> str:
    """The line of Python that loads a model with a text tower, from any working directory.

    ``address`` is its folder or fsspec URI, that of its training run, or ``hf://ORG/NAME``.
    """
    if address.startswith(HUB_URL):
        address = f"{catalog.HUB_PREFIX}{address.removeprefix(HUB_URL)}"
    elif "://" not in address and not address.startswith(catalog.HUB_PREFIX):
        address = os.path.abspath(os.path.expanduser(address.removeprefix(catalog.FOLDER_PREFIX)))
    return f"reinforce.Student.load({json.dumps(redact(address), ensure_ascii=False)})"


@contextlib.contextmanager
def model_errors(name: str) -> Iterator[None]:
    """Turn errors of loading a model into UserError with its name."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"{name}: {error}") from error


def _spec(name: str, pretrained: str | None, stack: contextlib.ExitStack) -> ModelSpec:
    if name.startswith((catalog.HUB_PREFIX, catalog.FOLDER_PREFIX)):
        return ModelSpec(model=name)
    if "://" in name or (Path(name).is_dir() and name not in catalog.builtin_models()):
        folder = _model_folder(name, stack)
        if (Path(folder) / _CONFIG).is_file():
            return ModelSpec(model=f"{catalog.FOLDER_PREFIX}{folder}")
        if builds := networks.read_config(folder).get(networks.CLASS):
            raise UserError(
                f"{name} has a network of class {builds}, whose code runs when it is loaded. If you trust it, give "
                f"class:{builds},{name}."
            )
        return teacher_spec(family="timm", model=f"{catalog.FOLDER_PREFIX}{folder}")
    model, comma, tag = name.partition(",")
    return ModelSpec(model=model, pretrained=tag if comma else pretrained)


def _exported_class(name: str, stack: contextlib.ExitStack) -> TeacherSpec | None:
    """The network that is named ``class:package.module:Name,FOLDER``, as a training wrote it; else None."""
    builds, comma, folder = name.removeprefix("class:").partition(",")
    if not name.startswith("class:") or not comma:
        return None
    options = {"folder": _model_folder(folder, stack), "name": builds}
    return teacher_spec(**{"class": "teachers.backbones:ExportedClass", "options": options})


def _model_folder(url: str, stack: contextlib.ExitStack) -> str:
    """Return a local folder with a model: the folder itself, or its ``student`` (of a training run) or ``model`` (of an
    adaptation); a remote one is copied."""
    fs, path = filesystem(url)
    for folder in (path.rstrip("/"), posixpath.join(path, "student"), posixpath.join(path, "model")):
        if any(fs.isfile(posixpath.join(folder, config)) for config in (_CONFIG, networks.CONFIG)):
            break
    else:
        raise UserError(
            f"{url} is not the folder of a model: neither it nor its `student` or `model` has {_CONFIG}, or "
            f"the {networks.CONFIG} of a network of images. Finish the training, or give another folder."
        )
    if "://" not in url:
        return folder
    local_folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="reinforce-model-"))
    for remote in fs.find(folder):
        local = Path(local_folder, str(remote)[len(folder) :].lstrip("/"))
        local.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(remote, str(local))
    return local_folder
