"""README.md of an exported model; test_export.py runs its example."""

from __future__ import annotations

import pytest

from reinforce.shipping.readme import render_readme
from teachers.protocols import ImageSpec

MEAN = STD = (0.5, 0.5, 0.5)
CONFIG = {"model": "tiny", "dim": 16, "context_length": 77}


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (ImageSpec(64, MEAN, STD, "bicubic", "crop"), "image.crop((left, top, left + size, top + size))"),
        (ImageSpec((96, 64), MEAN, STD, "bicubic", "crop"), "image.crop((left, top, left + width, top + height))"),
        (ImageSpec(64, MEAN, STD, "bilinear", "squash"), 'resize(config["size"][::-1], Image.Resampling.BILINEAR)'),
    ],
)
def test_example_resizes_as_the_model_expects(spec: ImageSpec, line: str) -> None:
    text = render_readme(CONFIG, spec)
    assert line in text
    assert f"uint8 [N, {spec.height}, {spec.width}, 3]" in text
    assert "float32 [N, 16]" in text
    assert "int64 [N, 77]" in text
