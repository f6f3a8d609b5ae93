"""Properties of transformers models read from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CLIPModel,
)

from teachers.device.accelerator import Accelerator
from teachers.registry import teacher_spec
from teachers.transformers import catalog
from teachers.transformers.teacher import load

CPU = Accelerator("cpu")


def _load(folder: Path, device: Accelerator = CPU, **spec: Any) -> Any:
    return load(teacher_spec(family="transformers", model=str(folder), **spec), device)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "bert"])
def test_the_config_matches_the_loaded_model(root: Path, kind: str) -> None:
    config, teacher = catalog.read_config(str(root / kind)), _load(root / kind)
    assert catalog.embedding_dim(config) == teacher.dim
    assert catalog.modalities(config) == (hasattr(teacher, "encode_images"), hasattr(teacher, "encode_texts"))


def test_content_files_are_weights_and_settings(root: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(root / "clip").save_pretrained(tmp_path / "clip", max_shard_size="100KB")
    (tmp_path / "clip" / "README.md").write_text("about")
    names = [path.name for path in catalog.content_files(tmp_path / "clip")]
    assert names[0] == "model.safetensors.index.json"
    assert sum(name.endswith(".safetensors") for name in names) > 1
    assert "config.json" in names
    assert "README.md" not in names


def test_a_relative_folder_that_does_not_exist_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert catalog.read_config("models/absent") is None, "may be a model of the hub"
    (tmp_path / "models").mkdir()
    with pytest.raises(FileNotFoundError, match="folder models/absent does not exist"):
        catalog.read_config("models/absent")
    assert catalog.read_config("absent") is None
    with pytest.raises(ValueError, match="local-dir:absent"):
        catalog.read_config("local-dir:absent")


def test_incomplete_folders_are_rejected(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder /absent/model does not exist"):
        catalog.read_config("/absent/model")
    with pytest.raises(
        FileNotFoundError, match=r"config\.json does not exist: use a folder written by save_pretrained"
    ):
        catalog.read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no `model_type`"):
        catalog.read_config(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected model\.safetensors"):
        catalog.content_files(tmp_path)
