"""Models by what the user calls them on the command line."""

from __future__ import annotations

import contextlib
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from reinforce.errors import UserError
from reinforce.source.urls import filesystem
from teachers import open_clip_catalog as catalog
from teachers.spec import ModelSpec

_CONFIG = "open_clip_config.json"


@contextlib.contextmanager
def resolve_models(
    names: Sequence[str], pretrained: str | None = None, *, weights: bool = True
) -> Iterator[dict[str, ModelSpec]]:
    """Models by what the user calls them; those of a remote folder are kept here as long as this is open.

    A name is open_clip's (``NAME,TAG`` or with ``pretrained``), ``local-dir:PATH``, ``hf-hub:ORG/REPO``, or a folder
    or fsspec URL that a training wrote. Without ``weights`` only the architecture is asked for: a name is enough, and
    one of the hub, whose config would have to be downloaded, is refused. Raises UserError.
    """
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{min(twice)} is named twice: name each model once.")
    with contextlib.ExitStack() as stack:
        specs = {name: _spec(name, pretrained, stack) for name in names}
        for name, spec in specs.items():
            with model_errors(name):
                if weights:
                    catalog.check_model(str(spec.model), spec.pretrained)
                elif catalog.model_config(str(spec.model)) is None:
                    raise ValueError(
                        "its architecture is not on this machine: give open_clip's name, or local-dir:PATH"
                    )
        yield specs


def short_name(name: str) -> str:
    """``runs/s0`` -> ``s0``; ``MobileCLIP2-S0,dfndr2b`` -> ``MobileCLIP2-S0-dfndr2b``: without the folders."""
    return name.rstrip("/").rpartition("/")[2].rpartition(":")[2].replace(",", "-")


@contextlib.contextmanager
def model_errors(name: str) -> Iterator[None]:
    """What a model has wrong, as the user's to mend."""
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
    """The folder of an exported model, or the one named ``student`` in what a training wrote; on this machine."""
    fs, path = filesystem(url)
    for folder in (path.rstrip("/"), posixpath.join(path, "student")):
        if fs.isfile(posixpath.join(folder, _CONFIG)):
            break
    else:
        raise UserError(
            f"{url} is no folder of an open_clip model: neither it nor its `student` has {_CONFIG}. Finish the "
            "training, or give another folder."
        )
    if "://" not in url:
        return folder
    here = stack.enter_context(tempfile.TemporaryDirectory(prefix="reinforce-model-"))
    for remote in fs.find(folder):
        local = Path(here, str(remote)[len(folder) :].lstrip("/"))
        local.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(remote, str(local))
    return here
