"""Folders of images as sources: the files of a sample, Hugging Face's imagefolder, and shards that stay valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.plan import source_shards
from reinforce.engine.plan.plan import Plan, make_plan
from reinforce.engine.plan.source_shards import write_lists
from reinforce.engine.preflight.check_source import check_source
from reinforce.engine.preflight.estimate import expected_bytes
from reinforce.errors import UserError
from reinforce.source.config import Input
from reinforce.source.formats.base import Shard, read_samples
from tests.helpers.data import config_of, picture, tree
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tables import samples_config as config
from tests.helpers.tables import stored_rows as rows

RED = {"red": config_of("", "")["teachers"]["red"]}


def put(folder: Path, name: str, data: bytes | str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images in two folders, with captions in three ways, and files that belong to none."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("cats/a.png", "cats/b.v1.png", "dogs/c.png", "dogs/d.png")):
        put(folder, name, picture(number))
    put(folder, "cats/a.txt", "a cat")
    put(folder, "cats/b.v1.txt", "another cat")
    put(folder, "dogs/c.json", '{"caption": "a dog", "n": 1}')
    for name in ("Thumbs.db", "notes.md", "alone.txt", ".hidden/x.png", "dogs/.x.png"):
        put(folder, name, "x")
    return folder


def plan(values: dict[str, Any]) -> Plan:
    return make_plan(parse_config(values))


def test_captions_are_made_of_the_names_of_class_folders(tmp_path: Path) -> None:
    for number, name in enumerate(("big_cats/a.png", "big_cats/deep/er/b.png", "dogs {}/c.png", "loose.png")):
        put(tmp_path / "photos", name, picture(number))
    put(tmp_path / "photos", "big_cats/a.json", '{"class": "another", "n": 1}')
    texts = ["a photo of a {}.", "{} and {}"]
    several = {"captions": ["txt", "class"], "templates": texts, "captions_per_sample": 3}
    found = rows(reinforce_here(config(tmp_path / "photos", tmp_path / "several", input=several)))
    cats, dogs = ["a photo of a big cats.", "big cats and big cats"], ["a photo of a dogs {}.", "dogs {} and dogs {}"]
    assert [row["true_captions"] for row in found] == [cats, cats, dogs, []]
    metadata = [row["metadata"] and json.loads(row["metadata"]) for row in found]
    assert metadata == [{"class": "big cats", "n": 1}, {"class": "big cats"}, {"class": "dogs {}"}, None]
    several["captions_per_sample"] = None
    one = rows(reinforce_here(config(tmp_path / "photos", tmp_path / "one", input=several)))
    assert [row["caption"] for row in one] == [cats[0], cats[0], dogs[0], None]
    plain = rows(reinforce_here(config(tmp_path / "photos", tmp_path / "plain")))
    assert [row["caption"] for row in plain] == [None] * 4
    with pytest.raises(UserError, match="put it where the name of the class belongs"):
        plan(config(tmp_path / "photos", tmp_path / "x", input={"templates": ["a photo"]}))


def test_a_plan_warns_of_two_folders_that_are_one_class_to_every_caption(tmp_path: Path) -> None:
    for number, name in enumerate(("red_thing/a.png", "red thing/b.png", "blue/c.png", "blue/d.png")):
        put(tmp_path / "photos", name, picture(number))
    line = (
        "warning: source: folders 'red thing' and 'red_thing' are one class, 'red thing', to every text: rename or "
        "join them"
    )
    named = config(tmp_path / "photos", tmp_path / "out", input={"captions": ["txt", "class"]})
    assert line in plan(named).source_notes
    assert line not in plan(config(tmp_path / "photos", tmp_path / "out")).source_notes, "their names are no captions"


def test_a_class_is_added_to_the_rows_and_files_that_state_more(tmp_path: Path) -> None:
    for number, name in enumerate(("cats/a.png", "cats/b.png", "dogs/c.png")):
        put(tmp_path / "photos", name, picture(number))
    put(tmp_path / "photos", "metadata.csv", "file_name,by\ncats/a.png,Ann\ncats/b.png,Bo\ndogs/c.png,Cy\n")
    put(tmp_path / "photos", "cats/b.class", "tiger")
    put(tmp_path / "photos", "dogs/c.json", "not JSON")
    found = rows(reinforce_here(config(tmp_path / "photos", tmp_path / "out", input={"captions": ["class"]})))
    assert [row["caption"] for row in found] == ["cats", "tiger", "dogs"], "a member of this name takes precedence"
    metadata = [row["metadata"] and json.loads(row["metadata"]) for row in found]
    assert metadata[:2] == [{"by": "Ann", "class": "cats"}, {"by": "Bo"}]


def test_files_that_are_added_form_new_shards_and_finished_ones_stay(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_shards, "BLOCK", 3)
    values = config(photos, photos / "out", teachers=RED)
    reinforce_here(values)
    before = tree(photos / "out")
    assert [name.partition("-")[2][:6] for name in Store(str(photos / "out")).shards("samples")] == ["000000", "000001"]
    assert not plan(values).pending, "the dataset, which is in the folder, is no part of it"
    for number, name in enumerate(("aaa.png", "cats/b.jpg", "zzz.png"), 7):
        put(photos, name, picture(number))
    put(photos, "dogs/d.txt", "came later")
    (photos / "cats/a.png").unlink()
    [shard] = plan(values).pending
    assert "block-000002-" in shard.name
    assert plan(values).lists.keys() == {shard.name}
    reinforce_here(values)
    after = tree(photos / "out")
    assert {name: after[name] for name in before if name != "dataset.json"} == {
        name: data for name, data in before.items() if name != "dataset.json"
    }
    assert [row["key"] for row in rows(photos / "out")] == [
        *("cats/a", "cats/b.v1", "dogs/c", "dogs/d"),
        *("aaa", "cats/b", "zzz"),
    ]
    moved = {**values, "source": str(photos.rename(tmp_path / "moved")), "output": f"{tmp_path}/moved/out"}
    assert not plan({**moved, "moved": {str(tmp_path / "moved"): str(photos)}}).pending


NAMED = {
    "Mr. Smith 1.jpg": "Mr. Smith 1",
    "Mr. Smith 2.jpg": "Mr. Smith 2",
    "WhatsApp Image 2024-01-01 at 10.31.01.jpeg": "WhatsApp Image 2024-01-01 at 10.31.01",
    "WhatsApp Image 2024-01-01 at 10.31.05.jpeg": "WhatsApp Image 2024-01-01 at 10.31.05",
    "a1.jpg": "a1.jpg",
    "a1.jpg.webp": "a1.jpg.webp",
    "a1.png": "a1.png",
    "b.v1.JPG": "b.v1",
    "c.JPG": "c.JPG",
    "c.jpg": "c.jpg",
    "d.jpg": "d",
    "d.jpg.v2.png": "d.jpg.v2",
    "e/d.jpg": "e/d",
}
CAPTIONS = {
    "Mr. Smith 2.txt": "of Smith 2",
    "a1.txt": "of both a1",
    "a1.png.txt": "of a1.png",
    "b.v1.txt": "of b.v1",
    "b.txt": "of none",
    "d.TXT": "of d",
    "d.jpg.txt": "with the extension jpg.txt, of d",
    "d.txt": "d has one, and this is counted",
}


def test_every_image_of_a_folder_is_a_sample_with_its_caption(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for number, name in enumerate(NAMED):
        put(folder, name, picture(number))
    for name, text in CAPTIONS.items():
        put(folder, name, text)
    values = config(folder, tmp_path / "out", teachers=RED)
    assert plan(values).source_notes == [f"source: 2 other files not read, such as {folder}/b.txt"]
    assert (expected_bytes(plan(values))["samples"] or 0) > sum(len(picture(number)) for number in range(len(NAMED)))
    made = rows(reinforce_here(values))
    assert [row["key"] for row in made] == [*NAMED.values()]
    assert [row["image"] for row in made] == [*map(picture, range(len(NAMED)))]
    assert {row["key"]: row["caption"] for row in made if row["caption"]} == {
        "Mr. Smith 2": "of Smith 2", "a1.jpg": "of both a1", "a1.png": "of a1.png", "b.v1": "of b.v1", "d": "of d",
    }  # fmt: skip
    assert not plan(values).pending


def test_a_folder_of_hugging_face_is_read_with_its_metadata(photos: Path, tmp_path: Path) -> None:
    for name, content in {
        "metadata.csv": 'file_name,text,n\ncats/a.png,from csv,1\n"none.png",x,2\n',
        "dogs/metadata.jsonl": json.dumps({"file_name": "d.png", "text": "a row", "tags": ["x", None]}),
    }.items():
        put(photos, name, content)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(photos / "dogs"), cache_dir=str(tmp_path / "cache"))
    assert "a row" in loaded["train"]["text"]
    notes = check_source(plan(config(photos, tmp_path / "out")))[1]
    assert notes[1:] == ["source: 1 row of metadata.csv without an image that is there"]
    made = {row["key"]: row for row in rows(reinforce_here(config(photos, tmp_path / "out")))}
    assert [made[key]["caption"] for key in ("cats/a", "dogs/c", "dogs/d")] == ["a cat", "a dog", "a row"]
    assert json.loads(made["dogs/d"]["metadata"]) == {"text": "a row", "tags": ["x", None]}
    assert json.loads(made["cats/a"]["metadata"]) == {"text": "from csv", "n": "1"}


def test_images_of_a_folder_are_read_again_by_reference(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = config(photos, tmp_path / "out", images="reference")
    reinforce_here(values)
    assert rows(tmp_path / "out")[0]["image_ref"] == {
        "url": f"{photos}/cats/a.png",
        "offset": 0,
        "length": len(picture(0)),
    }
    reinforce_here({**values, "teachers": RED})
    embed = reinforce_here(config(photos, tmp_path / "embed", teachers=RED))
    read = [
        [sample.images["red"].tolist() for sample in reinforce.open(str(url), images_from=str(photos))]
        for url in (tmp_path / "out", embed)
    ]
    assert read[0] == read[1]
    monkeypatch.chdir(tmp_path)
    again = rows(reinforce_here({**values, "source": "photos", "output": "again"}))
    assert again == rows(tmp_path / "out"), "references are absolute"
    put(photos, "cats/a.png", picture(9))
    with pytest.raises(UserError, match=r"images that were read are not those that were in .*cats/a\.png"):
        list(reinforce.open(str(tmp_path / "out"), images_from=str(photos)))


def test_files_that_disappear_cost_their_samples_and_a_list_is_written_once(photos: Path, tmp_path: Path) -> None:
    line = json.dumps({"key": "x", "files": {"png": ["../secret.png", 1]}}).encode()
    [refusal] = read_samples(Shard(f"{photos}/x", format="folder", listing=line), Input())
    assert refusal.reason.value == "image_place"  # type: ignore[union-attr]
    values = config(photos, tmp_path / "out")
    lists = plan(values).lists
    write_lists(Store(values["output"]), lists)
    with pytest.raises(UserError, match=r"was written by another run\. Run the same command again"):
        write_lists(Store(values["output"]), lists)
    (photos / "cats/a.png").unlink()
    (photos / "cats/b.v1.txt").unlink()
    reinforce_here(values)
    assert next((row["key"], row["caption"]) for row in rows(tmp_path / "out")) == ("cats/b.v1", None)
    [shard] = Store(values["output"]).shards("quarantine/samples")
    found = Store(values["output"]).quarantined("samples", shard)
    assert ("cats/a", "image_missing", "No such file or directory") in [tuple(row.values()) for row in found]
    (tmp_path / "out" / "lists" / f"{shard}.jsonl").write_text("junk")
    with pytest.raises(UserError, match=r"\.jsonl is damaged\. Restore it"):
        plan(values)


#: Where a link leads whose file cannot be read: to itself, and to a file of which every read fails.
UNREADABLE = {"self": "Too many levels of symbolic links", "/proc/self/mem": "Invalid argument"}


@pytest.mark.parametrize("target", UNREADABLE)
@pytest.mark.parametrize("name", ["cats/0.png", "cats/c.png", "dogs/z.png"])
def test_an_unreadable_file_of_a_folder_costs_its_sample_wherever_it_is_in_the_order(
    photos: Path, tmp_path: Path, name: str, target: str
) -> None:
    (photos / name).symlink_to(target if target.startswith("/") else (photos / name).name)
    values = config(photos, tmp_path / "out")
    first, _ = check_source(plan(values))
    assert first is not None
    reinforce_here(values)
    assert [row["key"] for row in rows(tmp_path / "out")] == ["cats/a", "cats/b.v1", "dogs/c", "dogs/d"]
    [shard] = Store(values["output"]).shards("quarantine/samples")
    [refusal] = Store(values["output"]).quarantined("samples", shard)
    key, _, _ = name.partition(".")
    assert refusal == {"key": key, "reason": "image_missing", "detail": UNREADABLE[target]}


@pytest.mark.parametrize("target", UNREADABLE)
def test_an_unreadable_caption_of_a_folder_is_quarantined_and_its_image_is_kept(
    photos: Path, tmp_path: Path, target: str
) -> None:
    (photos / "cats/a.txt").unlink()
    (photos / "cats/a.txt").symlink_to(target if target.startswith("/") else "a.txt")
    reinforce_here(config(photos, tmp_path / "out"))
    assert (rows(tmp_path / "out")[0]["key"], rows(tmp_path / "out")[0]["caption"]) == ("cats/a", None)
    [shard] = Store(str(tmp_path / "out")).shards("quarantine/samples")
    found = Store(str(tmp_path / "out")).quarantined("samples", shard)
    assert {"key": "cats/a", "reason": "sidecar_broken", "detail": f".txt: {UNREADABLE[target]}"} in [*found]


def test_a_folder_of_which_most_files_or_all_cannot_be_read_is_a_storage_that_fails(tmp_path: Path) -> None:
    folder = tmp_path / "unreadable"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}.png").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Invalid argument"):
        reinforce_here(config(folder, tmp_path / "all"))
    put(folder, "z.png", picture(0))
    with pytest.raises(OSError, match="Invalid argument"):
        reinforce_here(config(folder, tmp_path / "most"))
    for number in range(4):
        (folder / f"{number:02d}.png").unlink()
    assert [row["key"] for row in rows(reinforce_here(config(folder, tmp_path / "few")))] == ["z"]


UNUSABLE: list[tuple[dict[str, str], str]] = [
    ({}, "is an empty folder. Name one with images, or files by a pattern such as"),
    ({"x.bin": "x"}, "1 other file, such as x.bin: name what is read: tars, Parquet, jsonl or csv files"),
    ({"data-0.arrow": "x", "state.json": "{}"}, "2 other files, such as data-0.arrow: an Arrow file, not a tar: write"),
    ({"a.png": "x", "metadata.csv": "name,text\na.png,x\n"}, "/metadata.csv: no row has the path of an image,"),
    ({"a.png": "x", "metadata.jsonl": "{broken"}, "/metadata.jsonl cannot be read: invalid JSON"),
]


@pytest.mark.parametrize(("files", "message"), UNUSABLE)
def test_a_folder_that_cannot_be_used_is_one_error(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "x").mkdir()
    for name, content in files.items():
        put(tmp_path / "x", name, content)
    with pytest.raises(UserError) as raised:
        plan(config(tmp_path / "x", tmp_path / "out"))
    assert message in str(raised.value)
