"""Checks of open_clip names, tags and folders without network access."""

from __future__ import annotations

import shutil
from pathlib import Path

import open_clip
import pytest

from teachers.open_clip import catalog
from tests.helpers import tiny_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_models.open_clip_models(tmp_path_factory.mktemp("models"))


def test_every_tag_is_accepted_or_its_error_names_a_model_that_accepts_it() -> None:
    known = set(catalog.builtin_models())
    for model, tag in open_clip.list_pretrained():
        if model not in known:
            continue
        try:
            catalog.check_model(model, tag)
        except ValueError as error:
            other = str(error).rsplit(" ", 1)[-1]
            catalog.check_model(other, tag)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-L14", "openai", "model 'ViT-L14' is unknown to open_clip; did you mean ViT-L-14"),
        ("ViT-L-14", "dnf2b", "'dnf2b' is neither a tag of ViT-L-14 nor a checkpoint file; did you mean dfn2b"),
        ("ViT-L-14", None, r"no weights without `pretrained`: set a checkpoint file or a tag \(openai"),
        ("ViT-L/14", "./epoch_9.pt", r"checkpoint \./epoch_9\.pt does not exist"),
        ("local-dir:/absent/folder", None, "folder /absent/folder does not exist"),
        ("local-dir:/tmp", "openai", "`pretrained` is not used with local-dir:"),
        ("hf-hub:apple/DFN2B-CLIP-ViT-L-14", "dfn2b", "`pretrained` is not used with hf-hub:"),
    ],
)
def test_wrong_names_are_rejected_with_the_fix(
    models: dict[str, str], model: str, pretrained: str | None, message: str
) -> None:
    model = models["small"] if model == "local-dir:/tmp" else model
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        catalog.check_model(model, pretrained)


def test_incomplete_folders_are_rejected(models: dict[str, str], tmp_path: Path) -> None:
    source = catalog.local_folder(models["small"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json does not exist"):
        catalog.check_model(f"local-dir:{tmp_path / 'empty'}", None)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(source / "open_clip_config.json", bare)
    with pytest.raises(FileNotFoundError, match=r"bare has no weights: expected open_clip_model\.safetensors"):
        catalog.check_model(f"local-dir:{bare}", None)
    for name in ("a.pt", "b.pt"):
        (bare / name).touch()
    with pytest.raises(ValueError, match=r"several checkpoints \(a\.pt, b\.pt\): rename the one"):
        catalog.check_model(f"local-dir:{bare}", None)
    (bare / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no `model_cfg`"):
        catalog.check_model(f"local-dir:{bare}", None)
    (bare / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        catalog.check_model(f"local-dir:{bare}", None)
