"""Tiny models, saved once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teachers.coca.captioner import CocaCaptioner
from teachers.runtime.accelerator import Accelerator
from teachers.transformers.captioner import load
from tests.helpers.models import tiny_captioners, tiny_models
from tests.helpers.models.tiny_captioners import Captioners, spec_of
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.specs import captioner_spec


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models of open_clip as `local-dir:` names, by kind."""
    return tiny_models.open_clip_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teachers of transformers, one folder each."""
    root = tmp_path_factory.mktemp("transformers")
    tiny_models.transformers_clip(root / "clip")
    tiny_models.transformers_siglip(root / "siglip")
    tiny_models.transformers_dinov2(root / "dinov2")
    tiny_models.transformers_bert(root / "bert")
    return root


@pytest.fixture(scope="session")
def captioner_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny captioner by its model type; it is saved at the first call."""
    root = tmp_path_factory.mktemp("captioners")

    def save(kind: str) -> Path:
        if not (root / kind).exists():
            made = {**tiny_captioners.IMAGE_TO_TEXT, **tiny_captioners.CHAT, **tiny_captioners.TRANSLATORS}
            {"coca": coca_model, **made}[kind](root / kind)
        return root / kind

    return save


@pytest.fixture
def build_captioner(captioner_folder: Callable[[str], Path]) -> Captioners:
    """Load a tiny captioner by its model type and options of its spec."""

    def build(kind: str, **options: Any) -> Any:
        accelerator = Accelerator("cpu", options.get("precision", "fp32"))
        if kind == "coca":
            return CocaCaptioner(captioner_spec(model=f"local-dir:{captioner_folder(kind)}", **options), accelerator)
        return load(spec_of(captioner_folder(kind), kind, **options), accelerator)

    return build
