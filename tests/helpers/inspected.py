"""A small dataset with hostile captions, refused images and null rows, for reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.hostile_captions import CAPTIONS
from tests.helpers.reinforced import reinforce_here

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
    config["captioners"]["evil"] = {"class": "tests.helpers.hostile_captions:HostileCaptioner", "captions": 2}
    for teacher in config["teachers"].values():
        teacher.setdefault("logit_scale", 30.0)
    return reinforce_here(config)
