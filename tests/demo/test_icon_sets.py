"""Icon sets and keywords from npm packages."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from reinforce.demo import icon_sets
from reinforce.errors import UserError


def test_missing_npm_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm, which is not installed"):
        icon_sets.fetch_packages(tmp_path / "npm")


def test_fetched_packages_are_not_downloaded_again(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    icon_sets.fetch_packages(npm)


def test_drawings_and_keywords_are_read_by_code_points(npm: Path) -> None:
    drawings = icon_sets.read_drawings(npm, "noto")
    assert "1f34e" in drawings
    assert len(drawings) == 2
    assert Image.open(io.BytesIO(drawings["1f34e"]())).convert("RGB").getpixel((36, 36)) == (255, 0, 0)
    assert icon_sets.read_drawings(npm, "fxemoji").keys() == drawings.keys()  # whose names have no hyphens
    assert icon_sets.read_keywords(npm) == {"1f34e": ["fruit", "ripe"]}
    assert "Apache-2.0" in icon_sets.credits_text("noto")
