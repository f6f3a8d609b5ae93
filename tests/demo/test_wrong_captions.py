"""Shards with exchanged captions."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from reinforce.demo.wrong_captions import write_wrong_captions
from reinforce.errors import UserError
from tests.helpers.data import members_of, write_tar


def test_share_of_captions_is_exchanged_and_the_rest_is_unchanged(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", members_of(shard, 25))
    made = write_wrong_captions(f"{tmp_path}/*.tar", tmp_path / "wrong", share=0.4)
    before, after = ({}, {})  # type: dict[str, bytes], dict[str, bytes]
    for folder, found in ((tmp_path, before), (tmp_path / "wrong", after)):
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(before) == list(after)
    wrong = {name for name in before if before[name] != after[name] and name.endswith(".txt")}
    assert len(wrong) == 20
    assert sorted(after[name] for name in wrong) == sorted(before[name] for name in wrong)
    for name, content in before.items():
        if name.endswith(".json") and f"{name.removesuffix('.json')}.txt" in wrong:
            caption = after[f"{name.removesuffix('.json')}.txt"].decode()
            assert json.loads(after[name]) == {**json.loads(content), "caption": caption}
        elif name not in wrong:
            assert after[name] == content
    again = write_wrong_captions(f"{tmp_path}/*.tar", tmp_path / "again", share=0.4)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in made]


def test_shards_without_captions_are_a_user_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"")])
    with pytest.raises(UserError, match="has no captions to exchange"):
        write_wrong_captions(f"{tmp_path}/*.tar", tmp_path / "wrong", share=0.4)
