"""What ``reinforce evaluate`` does: models and sets by name in, a report out."""

from __future__ import annotations

import contextlib
import posixpath
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforce import settings
from reinforce.errors import UserError
from reinforce.evaluation import clip_benchmark
from reinforce.evaluation.config import RETRIEVAL, ZERO_SHOT, Evaluation
from reinforce.evaluation.report import Report
from reinforce.urls import filesystem
from teachers import open_clip_catalog as catalog
from teachers.spec import ModelSpec, TeacherSpec

if TYPE_CHECKING:
    from teachers.device import Precision

_CONFIG = "open_clip_config.json"


def evaluation_of(
    config: Path | None,
    zero_shot: Sequence[str],
    retrieval: Sequence[str],
    common: Mapping[str, Any],
    limit: int | None,
    batch: int | None,
) -> Evaluation:
    """The sets of a config's ``evaluate`` section and those of the command line, which go before of equal names.

    ``zero_shot`` and ``retrieval`` are NAME=URL; ``common`` are further keys of each zero-shot set of the command
    line. Raises UserError.
    """
    base = Evaluation() if config is None else settings.load(Evaluation, config, section="evaluate")
    more = {
        ZERO_SHOT: {name: {"images": url, **common, "limit": limit} for name, url in map(_named, zero_shot)},
        RETRIEVAL: {name: {"pairs": url, "limit": limit} for name, url in map(_named, retrieval)},
    }
    added = settings.parse(Evaluation, more, where="command line")
    if common and not zero_shot:
        raise UserError(f"--{', --'.join(common)}: these are of the sets of --zero-shot, and there is none.")
    return base.model_copy(
        update={
            ZERO_SHOT: {**base.zero_shot, **added.zero_shot},
            RETRIEVAL: {**base.retrieval, **added.retrieval},
            "batch": batch or base.batch,
        }
    )


@contextlib.contextmanager
def models_of(names: Sequence[str], pretrained: str | None) -> Iterator[dict[str, ModelSpec]]:
    """Models by what the user calls them; those of a remote folder are kept here as long as this is open.

    A name is open_clip's (``NAME,TAG`` or with ``pretrained``), ``local-dir:PATH``, ``hf-hub:ORG/REPO``, or a folder
    or fsspec URL that a training wrote. Raises UserError.
    """
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{min(twice)} is named twice: name each model once.")
    with contextlib.ExitStack() as stack:
        specs = {name: _spec(name, pretrained, stack) for name in names}
        for name, spec in specs.items():
            with _telling(name):
                catalog.check(str(spec.model), spec.pretrained)
        yield specs


def judge(
    specs: Mapping[str, ModelSpec],
    evaluation: Evaluation,
    device: str,
    precision: Precision,
    benchmark: Path | None = None,
) -> Report:
    """Judge each model, one in memory at a time; with ``benchmark`` also by clip_benchmark. Raises UserError."""
    from reinforce.evaluation.evaluator import Evaluator
    from teachers.device import Accelerator
    from teachers.open_clip import OpenClipTeacher

    commands = {} if benchmark is None else clip_benchmark.commands(specs, benchmark)
    evaluator = Evaluator(evaluation)
    report = Report()
    for name, spec in specs.items():
        with _telling(name):
            accelerator = Accelerator(device, precision)
            model = OpenClipTeacher(TeacherSpec(model=spec.model, pretrained=spec.pretrained), accelerator)
        report.add(name, evaluator.evaluate(model, accelerator))
    for name, arguments in commands.items():
        assert benchmark is not None
        report.metrics[name] |= clip_benchmark.run(arguments, name, benchmark)
    return report


def _named(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not name or not url:
        raise UserError(f"{text!r}: want NAME=URL, for example imagenet=/data/imagenet/val")
    return name, url


def _spec(name: str, pretrained: str | None, stack: contextlib.ExitStack) -> ModelSpec:
    if name.startswith((catalog.HUB, catalog.FOLDER)):
        return ModelSpec(model=name)
    if "://" in name or (Path(name).is_dir() and name not in catalog.builtin_models()):
        return ModelSpec(model=f"{catalog.FOLDER}{_model_folder(name, stack)}")
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


@contextlib.contextmanager
def _telling(name: str) -> Iterator[None]:
    """What a model has wrong, as the user's to mend."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"{name}: {error}") from error
