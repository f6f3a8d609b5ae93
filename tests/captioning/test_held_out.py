"""The held-out images of a captioner's training: which they are, their file, and what it costs to lose it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import schemas
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.data import HELD_OUT_FILE, HeldOutImages, load_streams
from reinforce.errors import UserError
from schemas.seeds import seed_for
from tests.helpers.captioning import captioned, captioner_config, take_keys, write_shards
from tests.helpers.data import picture, write_tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    write_shards(folder, 30, 40, 30, captions=2)
    return folder


def load(config: CaptionerConfig) -> HeldOutImages:
    return load_streams(config, 16)[1]


def config_of(folder: Path, output: Path, **changes: Any) -> CaptionerConfig:
    return captioner_config(folder, output=str(output), **changes)


def image_of(key: str) -> bytes:
    return picture(1000 * int(key[:3]) + int(key[3:]))


def test_a_share_is_seeded_by_key_in_a_seeded_order_and_never_trained_on(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "one")
    streamed, held_out = load_streams(config, 16)
    assert 15 < len(held_out) < 50
    assert [*held_out.keys] == sorted(held_out.keys, key=lambda key: seed_for(0, key, "sample"))
    assert [*held_out.images()] == [image_of(key) for key in held_out.keys]
    assert all(len(texts) == 2 for texts in held_out.captions)
    assert int(streamed.counts.sum()) + len(held_out) == 100
    assert not {*held_out.keys} & take_keys(streamed)
    assert load(config_of(folder, tmp_path / "two")) == HeldOutImages(**{**vars(held_out), "output": f"{tmp_path}/two"})
    other = load(config_of(folder, tmp_path / "three", seed=1))
    assert {*other.keys} != {*held_out.keys}
    [table] = [pq.read_table(tmp_path / "one" / HELD_OUT_FILE)]
    assert table.schema.equals(schemas.HELD_OUT)


def test_fewer_images_of_a_share_are_the_first_found_and_of_a_source_a_sample_of_all(
    folder: Path, tmp_path: Path
) -> None:
    few = load(config_of(folder, tmp_path / "share", evaluate={"images": 4}))
    assert len({key[:3] for key in few.keys}) == 1, "no further shard is read"
    source = {"held_out": {"source": f"{folder}/shards/*.tar"}}
    every = load(config_of(folder, tmp_path / "all", **source))
    assert len(every) == 100
    sample = load(config_of(folder, tmp_path / "few", **source, evaluate={"images": 7}))
    assert [*sample.keys] == [*every.keys[:7]], "those of the first ranks, from all shards"
    assert [*sample.images()] == [image_of(key) for key in sample.keys]


def test_it_is_collected_once_and_again_if_the_source_changes(tmp_path: Path) -> None:
    write_shards(tmp_path, 20)
    held = tmp_path / "held/0.tar"
    write_tar(held, captioned({str(n): picture(n) for n in range(5)}))
    config = config_of(tmp_path, tmp_path / "out", held_out={"source": str(held)}, data={
        "source": f"{tmp_path}/shards/*.tar", "captions": ["txt"], "workers": 0
    })  # fmt: skip
    before = load(config)
    file = tmp_path / "out" / HELD_OUT_FILE
    written = file.stat().st_mtime_ns
    assert load(config) == before
    assert file.stat().st_mtime_ns == written
    write_tar(held, captioned({str(n): picture(n) for n in range(6)}))
    assert len(load(config)) == 6
    with pytest.raises(UserError, match=r"held-out\.parquet was replaced during the training"):
        next(before.images())


def test_a_damaged_or_lost_file_and_too_few_images_are_reported(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path)
    held_out = load(config)
    file = tmp_path / HELD_OUT_FILE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"held-out\.parquet cannot be read: .*Delete it"):
        [*held_out.images()]
    file.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"held-out\.parquet cannot be read: .*Delete it"):
        load(config)
    file.unlink()
    assert load(config) == held_out
    with pytest.raises(UserError, match="held_out: 0 images are held out"):
        load(config_of(folder, tmp_path, held_out={"share": 1e-9}))
