from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import schemas
from reinforce.captioning.images import read_images
from reinforce.captioning.pairs import FILE, find_pairs
from reinforce.errors import UserError
from tests.helpers.captioning import captioner_config, write_shards
from tests.helpers.data import picture, write_tar


def keys(pairs: object) -> list[str]:
    return pairs.table["key"].to_pylist()  # type: ignore[attr-defined]


def test_every_image_with_captions_is_found_where_it_lies(tmp_path: Path) -> None:
    write_shards(tmp_path, 7, 5, captions=3)
    pairs = find_pairs(captioner_config(tmp_path))
    assert keys(pairs) == [f"{shard:03d}{i:04d}" for shard, size in enumerate((7, 5)) for i in range(size)]
    assert pairs.captions(8) == [f"thing 1 of shard 1, view {n}" for n in range(3)]
    assert read_images([pairs.place(i) for i in (8, 0)]) == [picture(1001), picture(0)]
    assert len(pairs.learnt()) + len(pairs.held_out()) == 12
    assert pairs.table.schema.equals(schemas.PAIRS)


def test_captions_stand_in_lines_in_lists_or_in_one_text(tmp_path: Path) -> None:
    document = json.dumps({"many": [" two ", "", "one", "two"], "single": "s"}).encode()
    members = [("a.png", picture(0)), ("a.json", document), ("a.txt", b"first\n\n  second\nfirst\n")]
    write_tar(tmp_path / "shards" / "0.tar", [*members, ("b.png", picture(1)), ("b.txt", b"of b")])
    config = captioner_config(tmp_path)

    def captions_by(*fields: str) -> list[str]:
        data = config.data.model_copy(update={"captions": list(fields)})
        held_out = config.held_out.model_copy(update={"share": None, "source": f"{tmp_path}/shards/0.tar"})
        train = config.train.model_copy(update={"batch": 1})
        return find_pairs(config.model_copy(update={"data": data, "held_out": held_out, "train": train})).captions(0)

    assert captions_by("json:many", "txt") == ["two", "one"]
    assert captions_by("json:single", "txt") == ["s"]
    assert captions_by("json:none", "lines:txt") == ["first", "second"]
    assert captions_by("txt") == ["first    second first"]


def test_the_share_held_out_is_seeded_by_key_and_written_down(tmp_path: Path) -> None:
    write_shards(tmp_path, 40)
    config = captioner_config(tmp_path)
    first = find_pairs(config)
    again = find_pairs(config.model_copy(update={"output": str(tmp_path / "other")}))
    other = find_pairs(config.model_copy(update={"output": str(tmp_path / "third"), "seed": 1}))
    assert keys(first.held_out()) == keys(again.held_out()) != keys(other.held_out())
    assert 4 < len(first.held_out()) < 20
    stored = pq.read_table(tmp_path / "out" / FILE)
    held_out = stored.filter(stored["held_out"])["key"].to_pylist()
    assert held_out == keys(first.held_out())
    assert not set(held_out) & set(keys(first.learnt()))


def test_some_of_the_held_out_images_are_a_seeded_sample(tmp_path: Path) -> None:
    write_shards(tmp_path, 60)
    held_out = find_pairs(captioner_config(tmp_path)).held_out()
    order = keys(held_out.shuffled(0))
    assert sorted(order) == keys(held_out) != order
    assert keys(held_out.shuffled(0).first(3)) == order[:3]
    assert keys(held_out.shuffled(1)) != order
    assert keys(held_out.first(None)) == keys(held_out)


def test_the_list_is_made_anew_only_where_the_data_has_changed(tmp_path: Path) -> None:
    write_shards(tmp_path, 12)
    config = captioner_config(tmp_path)
    find_pairs(config)
    written = (tmp_path / "out" / FILE).stat().st_mtime_ns
    assert len(find_pairs(config)) == 12
    assert (tmp_path / "out" / FILE).stat().st_mtime_ns == written
    write_shards(tmp_path, 15)
    assert len(find_pairs(config)) == 15


def test_samples_without_captions_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [(f"{i}.png", picture(i)) for i in range(30)]
    members += [("30.png", picture(30)), ("30.json", b'{"captions": []}'), ("31.txt", b"no image")]
    members += [member for i in range(40, 60) for member in ((f"{i}.png", picture(i)), (f"{i}.txt", b"c"))]
    write_tar(tmp_path / "shards" / "0.tar", members)
    with caplog.at_level(logging.WARNING):
        pairs = find_pairs(captioner_config(tmp_path))
    assert keys(pairs) == [str(i) for i in range(40, 60)]
    assert "32 refused (31 no_text, 1 no_image); 20 images with captions are there" in caplog.text
    assert "refused 0: no_text (beside the image: nothing)" in caplog.text


def test_faults_of_the_data_are_told_with_the_mend(tmp_path: Path) -> None:
    config = captioner_config(tmp_path)

    def fault(**data: object) -> str:
        with pytest.raises(UserError) as caught:
            find_pairs(config.model_copy(update={"data": config.data.model_copy(update=data)}))
        return str(caught.value)

    assert "no file matches" in fault()
    assert "0.tar is not there" in fault(source=f"{tmp_path}/0.tar")
    write_shards(tmp_path, 20)
    assert "none of 20 samples has an image and a caption at json:text" in fault(captions=["json:text"])
    shard = tmp_path / "shards" / "00000.tar"
    packed = shard.with_name("packed.tar.gz")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    assert "which a compressed tar does not allow" in fault(source=str(packed))
    shard.write_bytes(shard.read_bytes()[:5000])
    assert "shard_damaged" in fault()
    shard.write_bytes(b"no tar" * 200)
    assert "shard_unreadable" in fault()


def test_too_few_images_to_learn_from_or_to_judge_by_are_told(tmp_path: Path) -> None:
    write_shards(tmp_path, 8)
    config = captioner_config(tmp_path)
    few = config.held_out.model_copy(update={"share": 1e-9})
    with pytest.raises(UserError, match="0 of 8 images are held out"):
        find_pairs(config.model_copy(update={"held_out": few}))
    big = config.train.model_copy(update={"batch": 64})
    with pytest.raises(UserError, match=r"fewer than train\.batch \(64\)"):
        find_pairs(config.model_copy(update={"train": big}))


def test_a_url_with_a_secret_is_read_and_not_written_down(tmp_path: Path) -> None:
    import fsspec

    write_shards(tmp_path, 12)
    fsspec.filesystem("memory").pipe("/secret/0.tar", (tmp_path / "shards" / "00000.tar").read_bytes())
    source = "simplecache::memory://secret/0.tar"
    config = captioner_config(tmp_path, data={"source": source, "threads": 1})
    pairs = find_pairs(config)
    assert pairs.place(3).url == source
    assert set(pairs.table["url"].to_pylist()) == {"memory://secret/0.tar"}
    assert read_images([pairs.place(3)]) == [picture(3)]
