"""Listing and reading of class folders, shards and datasets."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from reinforce.config import Input, Limits
from reinforce.errors import UserError
from reinforce.evaluation.command import build_evaluation
from reinforce.evaluation.reading import (
    File,
    check_file_size,
    detect_kind,
    list_class_folders,
    make_loader,
    read_samples,
)
from reinforce.source.samples import RawSample, Refusal
from tests.helpers.data import write_tar
from tests.helpers.evaluation import COLOURS, solid_image, write_colour_folder, write_colour_shard
from tests.helpers.reinforced import small_dataset


def test_kind_follows_from_the_url_and_the_files(tmp_path: Path) -> None:
    folder = write_colour_folder(tmp_path / "folder")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "dataset.json").write_text("{}")
    kinds = {folder: "classes", f"{tmp_path}/dataset": "layers", f"{tmp_path}/{{0..3}}.tar": "shards"}
    assert {url: detect_kind(url) for url in kinds} == kinds
    assert detect_kind([folder]) == "shards"


def test_local_and_remote_class_folders_are_listed_alike(tmp_path: Path) -> None:
    folder = write_colour_folder(tmp_path / "listing")
    fsspec.filesystem("memory").put(folder, "/listing", recursive=True)
    local, remote = list_class_folders(folder, "set"), list_class_folders("memory://listing", "set")
    assert list(local) == list(remote) == list(COLOURS)
    assert [[(f.key, f.size) for f in files] for files in local.values()] == [
        [(f.key, f.size) for f in files] for files in remote.values()
    ]
    [first, *_] = remote["blue"]
    assert make_loader("memory://listing")(first.path) == solid_image("blue")


def test_a_file_that_cannot_be_loaded_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png cannot be read: FileNotFoundError"):
        make_loader(str(tmp_path))(f"{tmp_path}/none.png")


def test_a_file_above_the_limit_is_refused_without_reading() -> None:
    limits = Limits(image_bytes=10)
    assert check_file_size(File("a/b.png", "/nowhere", 10), limits) is None
    refusal = check_file_size(File("a/b.png", "/nowhere", 11), limits)
    assert refusal is not None
    assert (refusal.key, refusal.reason.value) == ("a/b.png", "image_bytes")


def test_samples_of_all_shards_come_in_order_with_refusals(tmp_path: Path) -> None:
    first = write_colour_shard(tmp_path / "0.tar", each=1)
    write_tar(tmp_path / "1.tar", [("z.txt", b"no image")])
    items = list(read_samples([first, f"{tmp_path}/1.tar"], Input(), "set"))
    assert [item.key for item in items] == [*(f"{i}0" for i in range(len(COLOURS))), "z"]
    assert all(isinstance(item, RawSample) for item in items[:-1])
    assert isinstance(items[-1], Refusal)
    assert items[-1].reason.value == "no_image"


def test_a_damaged_shard_is_a_user_error(tmp_path: Path) -> None:
    path = Path(write_colour_shard(tmp_path / "0.tar"))
    path.write_bytes(path.read_bytes()[:7000])
    with pytest.raises(UserError, match=r"set: .*0\.tar: shard_damaged: .*Check the path, or download it again"):
        list(read_samples(str(path), Input(), "set"))


def test_images_by_reference_are_read_from_named_folders(tmp_path: Path) -> None:
    url = small_dataset(tmp_path, (2,), images="reference")
    message = rf'add evaluate\.images_from: \["{tmp_path}/source"\], or --images-from "{tmp_path}/source"'
    with pytest.raises(UserError, match=message):
        list(read_samples(url, Input(), "set"))
    assert len(list(read_samples(url, Input(images_from=[f"{tmp_path}/source"]), "set"))) == 2
    evaluation = build_evaluation(None, [], [f"pairs={url}"], {}, None, None, [f"{tmp_path}/source"])
    assert evaluation.images_from == [f"{tmp_path}/source"]
