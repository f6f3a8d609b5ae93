"""Patches in a report: the grid of each crop as colours."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import reinforce
from reinforce.dataset.kinds.registry import kind_of
from reinforce.inspection.report import inspect
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.reinforced import reinforce_here


def test_equal_patches_have_equal_colours_and_a_grid_may_have_few() -> None:
    kind = kind_of("patches/dino")
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 9)).astype(np.float32)
    values[0, 2, 3] = values[1, 0, 0]
    colours = kind.pictures(values, 8)
    assert (colours.shape, colours.dtype) == ((2, 3, 4, 3), np.uint8)
    assert np.array_equal(colours[0, 2, 3], colours[1, 0, 0])
    assert len(kind.pictures(values, 1)) == 1
    assert kind.pictures(values[:, :1, :1, :2], 8).shape == (2, 1, 1, 3)
    assert not len(kind.pictures(None, 8))
    assert kind.pictures(values * np.nan, 8).shape == (2, 3, 4, 3)
    # centred, so that a shift or a scale of all patches changes nothing
    assert np.abs(kind.pictures(3 * values + 1, 8).astype(int) - colours).max() <= 1


def test_a_report_shows_the_grids_of_the_crops(tmp_path: Path) -> None:
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 9))
    patches = {"grid": 4, "codec": "float16", "sample": 100}
    teacher: dict[str, Any] = {"class": "tests.helpers.patch_models:PatchTeacher", "options": {"size": 16}}
    teachers = {"dino": {**teacher, "patches": patches}, "plain": teacher}
    url = reinforce_here(config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", captioners={}, teachers=teachers))
    inspect(url, str(tmp_path / "report"))
    files = sorted((tmp_path / "report" / "images").glob("*-grids-*.webp"))
    assert files
    count = len(next(iter(reinforce.open(url))).augmentations)
    with Image.open(io.BytesIO(files[0].read_bytes())) as picture:
        assert picture.size == (144 * count, 144)
    page = (tmp_path / "report" / "gallery.html").read_text()
    assert page.count('<figure class="grids">') == len(files)
    assert "<code>patches/dino</code>" in page
    assert "patches/plain" not in page
