"""Models as they are named on the command line."""

from __future__ import annotations

import contextlib
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from reinforce import settings
from reinforce.errors import UserError
from reinforce.source.urls import filesystem
from teachers.open_clip import catalog
from teachers.registry import FAMILIES, AnyTeacher
from teachers.spec import ModelSpec, TeacherSpec

_CONFIG = "open_clip_config.json"


@contextlib.contextmanager
def resolve_models(
    names: Sequence[str], pretrained: str | None = None, *, weights: bool = True, teachers: bool = False
) -> Iterator[dict[str, ModelSpec]]:
    """Yield the specs of models by name; remote models are copied to a temporary folder until the context ends.

    A name is open_clip's (``NAME,TAG``, or ``NAME`` with the tag ``pretrained``), ``local-dir:PATH``,
    ``hf-hub:ORG/REPO``, or a folder or fsspec URI that a training run wrote. With ``weights=False`` only the
    architecture is needed: open_clip's ``NAME`` is enough, and a model of the hub, whose config would be downloaded, is
    refused. With ``teachers``, a name may also be that of any teacher (``teacher_of``), whose spec is a TeacherSpec.
    Raises UserError.
    """
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"{min(repeated)} is named twice. Name each model once.")
    with contextlib.ExitStack() as stack:
        specs = {name: (teachers and teacher_of(name)) or _spec(name, pretrained, stack) for name in names}
        for name, spec in specs.items():
            with model_errors(name):
                if isinstance(spec, TeacherSpec):
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
        return ModelSpec(model=f"{catalog.FOLDER_PREFIX}{_model_folder(name, stack)}")
    model, comma, tag = name.partition(",")
    return ModelSpec(model=model, pretrained=tag if comma else pretrained)


def _model_folder(url: str, stack: contextlib.ExitStack) -> str:
    """Return a local folder with an open_clip model: the folder itself, or its ``student``; a remote one is copied."""
    fs, path = filesystem(url)
    for folder in (path.rstrip("/"), posixpath.join(path, "student")):
        if fs.isfile(posixpath.join(folder, _CONFIG)):
            break
    else:
        raise UserError(
            f"{url} is not the folder of an open_clip model: neither it nor its `student` has {_CONFIG}. Finish the "
            "training, or give another folder."
        )
    if "://" not in url:
        return folder
    local_folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="reinforce-model-"))
    for remote in fs.find(folder):
        local = Path(local_folder, str(remote)[len(folder) :].lstrip("/"))
        local.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(remote, str(local))
    return local_folder
