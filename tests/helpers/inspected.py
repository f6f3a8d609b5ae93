"""A small dataset with hostile captions, refused images and null rows, for reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.models import SeedCaptioner
from tests.helpers.reinforced import reinforce_here

SCRIPT = "<script>window.attacked = true</script>"
#: What a page must show as text: markup, quotes, right-to-left text, control characters, very long words.
CAPTIONS = [
    SCRIPT,
    "\"><img src=x onerror='window.attacked = true'>",
    "</script></bdi><svg onload=window.attacked=true>",
    "' onmouseover='window.attacked = true",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp;",
    "قطة سوداء على الأريكة",
    "חתול שחור על הספה",
    "\u202egnp.eteled a reversed name",
    "unbroken" * 230,
    "🐈" * 280,
]
#: Keys of the samples that are refused, and of those without a caption.
REFUSED, WITHOUT_CAPTION = ("broken1", "broken2"), ("silent1", "silent2")


def hostile_dataset(folder: Path, **changes: Any) -> str:
    """A dataset of two shards: 30 plain samples, the hostile captions, and what is refused or has no caption."""
    members = []
    for number, caption in enumerate(CAPTIONS):
        width, height = (400, 40) if number == 0 else (40, 400) if number == 1 else (48, 36)
        members.append((f"hostile{number:02d}.png", picture(number, width, height)))
        members.append((f"hostile{number:02d}.txt", caption.encode()))
    for key in WITHOUT_CAPTION:
        members.append((f"{key}.png", picture(77)))
    for key in REFUSED:
        members += [(f"{key}.png", b"\x89PNG\r\n\x1a\n<script>"), (f"{key}.txt", b"never stored")]
    write_tar(folder / "source" / "00000.tar", members)
    write_tar(folder / "source" / "00001.tar", members_of(1, 30))
    config = config_of(f"{folder}/source/*.tar", folder / "out", **changes)
    config["captioners"]["evil"] = {"class": "tests.helpers.inspected:HostileCaptioner", "captions": 2}
    for teacher in config["teachers"].values():
        teacher.setdefault("logit_scale", 30.0)
    return reinforce_here(config)


class HostileCaptioner(SeedCaptioner):
    """Returns a script, and text with control characters and a lone line separator."""

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
        return [[SCRIPT, f"a \0 \x1b[31m \u2028 bell\x07 of image {int(row[0]) % 1000}"] for row in seeds]
