"""Training data of the demo's teachers."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from reinforce.demo import icon_sets
from reinforce.demo.data import shared_concepts
from reinforce.demo.teacher_data import write_teacher_data
from tests.helpers.demo import read_shards


def test_teacher_data_excludes_openmoji_pictures_of_unseen_concepts(npm: Path, tmp_path: Path) -> None:
    write_teacher_data(tmp_path, npm)
    unseen = {concept.emoji.key for concept in shared_concepts() if concept.unseen}
    folders = {path.name: read_shards(sorted(path.glob("*.tar"))) for path in tmp_path.iterdir()}
    assert folders.keys() == {"twemoji", "openmoji", *icon_sets.ICON_SETS}
    assert not {key.removesuffix("-openmoji") for key in folders["openmoji"]} & unseen
    assert {key.removesuffix("-twemoji") for key in folders["twemoji"]} > unseen
    assert "1f34e-openmoji" in folders["openmoji"]
    for style in icon_sets.ICON_SETS:
        assert len(folders[style]) == 2
        members = folders[style][f"1f34e-{style}"]
        with Image.open(io.BytesIO(members["png"])) as image:
            assert image.convert("RGB").getpixel((36, 36)) == (255, 0, 0)
        assert "red apple" in members["txt"].decode()
        assert json.loads(members["json"])["phrase"] == "a red apple"
        assert icon_sets.ICON_SETS[style].licence in (tmp_path / style / "CREDITS.txt").read_text()
