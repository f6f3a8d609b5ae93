"""Image sizes of an ImageSpec, and the example of a custom teacher."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

from teachers import protocols
from teachers.protocols import ImageSpec
from teachers.registry import describe_teacher, teacher_spec

HALF = (0.5, 0.5, 0.5)


def test_a_size_is_the_side_of_a_square_or_height_and_width() -> None:
    square, oblong = ImageSpec(32, HALF, HALF), ImageSpec((32, 48), HALF, HALF)
    assert (square.height, square.width) == (32, 32)
    assert (oblong.height, oblong.width) == (32, 48)


def test_the_documented_example_is_a_valid_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in str(protocols.__doc__).splitlines() if line.startswith("    ") or not line]
    module = ModuleType("documented_teacher")
    vars(module).update(ImageSpec=ImageSpec, Sequence=Sequence, torch=torch)
    exec(textwrap.dedent("\n".join(lines)), vars(module))
    monkeypatch.setitem(sys.modules, "documented_teacher", module)
    options = {"weights": "s3://bucket/rad.pt"}
    spec = teacher_spec(**{"class": "documented_teacher:Radiology", "options": options})
    info = describe_teacher("ours", spec)
    assert (info.dim, info.images, info.texts) == (512, True, True)
    assert info.identity == {"class": "documented_teacher:Radiology", "options": options, "version": 1}
