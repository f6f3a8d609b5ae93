"""Models of open_clip before they are loaded: names, tags, folders and identities, without network access."""

from __future__ import annotations

import shutil
from pathlib import Path

import open_clip
import pytest

from teachers.open_clip import catalog
from teachers.registry import describe_teacher, teacher_spec
from teachers.spec import ModelInfo
from tests.helpers import tiny_models


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


def test_the_identity_of_a_folder_is_its_content_not_its_path(tmp_path: Path) -> None:
    model = tiny_models.open_clip_model(tmp_path / "a", embed_dim=24)
    info = describe_teacher("a", teacher_spec(model=model))
    assert (info.dim, info.images, info.texts) == (24, True, True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert describe_teacher("b", teacher_spec(model=f"local-dir:{tmp_path / 'b'}")) == info
    others = [
        teacher_spec(model=model, precision="bf16"),
        teacher_spec(model=tiny_models.open_clip_model(tmp_path / "b", embed_dim=24, seed=1)),
        teacher_spec(model=tiny_models.open_clip_model(tmp_path / "c", embed_dim=24, preprocess={"std": 0.5})),
    ]
    assert info.identity not in [describe_teacher("a", other).identity for other in others]


def test_the_identity_of_a_checkpoint_is_its_content_and_of_a_tag_its_name(tmp_path: Path) -> None:
    def described(file: str) -> ModelInfo:
        return describe_teacher("a", teacher_spec(model="ViT-B-32", pretrained=str(tmp_path / file)))

    (tmp_path / "a.pt").write_bytes(b"weights")
    first = described("a.pt")
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    assert described("b.pt") == first
    (tmp_path / "b.pt").write_bytes(b"others")
    assert described("b.pt") != first
    tagged = describe_teacher("a", teacher_spec(model="ViT-L/14", pretrained="dfn2b-s39b"))
    assert tagged.dim == 768
    assert tagged.identity == {
        "family": "open_clip", "model": "ViT-L-14", "pretrained": "dfn2b_s39b", "precision": "fp32",
    }  # fmt: skip
