"""``reinforce init``: configs for sources of every kind, which ``reinforce plan`` accepts unchanged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from reinforce.config import Config
from reinforce.engine.plan.source_shards import source_shards
from reinforce.engine.starter import CLASS_TEXTS, look_at
from reinforce.errors import UserError
from tests.helpers.commands import run_command
from tests.helpers.data import members_of, picture
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tables import IMG2DATASET
from tests.helpers.tars import tar_bytes

Made = tuple[dict[str, Any], str, str]


def parquet(**columns: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


TARS = {f"{shard:05d}.tar": tar_bytes(members_of(shard, 2)) for shard in range(3)} | {"00000_stats.json": b"{}"}
DEEP = tar_bytes([("a.png", picture(1)), ("a.json", b'{"id": 7, "description": "a red thing"}')])
HUB = parquet(image=[{"bytes": picture(3), "path": None}], caption=["a thing"], label=[1])
ODD = parquet(sample_id=["x"], photo=[picture(4)], alt_text=["a photo"], licence=["cc0"])
IMAGE = {"a.png": picture(5)}
FOLDER = {f"{key}/{key}.png": picture(6) for key in "abc"} | {f"{key}/{key}.txt": b"a caption" for key in "abc"}
#: Files of a source of each kind, what `init` is given in their folder, and of the config that it writes: `source` in
#: the folder, `input`, and the number of shards.
SOURCES: dict[str, tuple[dict[str, bytes], str, str, dict[str, Any], int]] = {
    "tars": (TARS, "", "/*.tar", {"format": "tar"}, 3),
    "tars at any depth": (
        {"deep/one.tar": DEEP, "deeper/still/two.tar": DEEP},
        "", "/**/*.tar", {"format": "tar", "captions": ["json:description"]}, 2,
    ),
    "a folder as on the hub": (
        {f"data/{name}-0.parquet": HUB for name in ("train-1", "train-2", "test")} | {"README.md": b"a card"},
        "", "/data/train*.parquet", {"format": "parquet"}, 2,
    ),
    "img2dataset's Parquet": (
        {path.name: path.read_bytes() for path in IMG2DATASET}, "", "/*.parquet", {"format": "parquet"}, 2
    ),
    "odd columns": (
        {"rows.parquet": ODD}, "/rows.parquet", "/rows.parquet",
        {"format": "parquet", "image": "photo", "captions": ["alt_text"]}, 1,
    ),
    "jsonl": (
        {**IMAGE, "list.jsonl": b'{"file_name": "a.png", "title": "a title", "n": 1}'}, "/list.jsonl", "/list.jsonl",
        {"format": "jsonl", "captions": ["title"]}, 1,
    ),
    "csv": (
        {**IMAGE, "list.csv": b"where,words\na.png,some words here\n"}, "/list.csv", "/list.csv",
        {"format": "csv", "image": "where", "captions": ["words"]}, 1,
    ),
    "a folder of images": (
        {**FOLDER, "metadata.csv": b"file_name,text\na/a.png,other\n"}, "", "", {"format": "folder"}, 1
    ),
    "img2dataset's files": (
        {f"00000/{key}{end}": data for key in "ab" for end, data in ((".png", picture(7)), (".txt", b"a caption"))}
        | {"00000.parquet": parquet(url=["http://x/a.png"], caption=["a caption"]), "00000_stats.json": b"{}"},
        "", "", {"format": "folder"}, 1,
    ),
    "rows of one image": (
        {**IMAGE, "captions.txt": b"image,caption\na.png,one\na.png,two\n"}, "/captions.txt", "/captions.txt",
        {"format": "csv", "captions_per_sample": 2}, 1,
    ),
    "lists in JSON": (
        {"a.tar": tar_bytes([("a.png", picture(1)), ("a.json", b'{"sentences": ["one", "two", "three"]}')])},
        "", "/*.tar", {"format": "tar", "captions": ["json:sentences"], "captions_per_sample": 3}, 1,
    ),
    "lists after a list of one": (
        {"a.png": picture(1), "b.png": picture(2), "c.png": picture(3), "metadata.jsonl":
         b'{"file_name": "a.png", "caption": ["one"]}\n{"file_name": "b.png", "caption": "one"}\n'
         b'{"file_name": "c.png", "caption": ["one", "two", "three"]}\n'},
        "", "", {"format": "folder", "captions_per_sample": 3}, 1,
    ),
    "a list after a text": (
        {"a.tar": tar_bytes([("a.png", picture(1)), ("a.json", b'{"caption": "one"}'),
                             ("b.png", picture(2)), ("b.json", b'{"caption": ["one", "two"]}')])},
        "", "/*.tar", {"format": "tar", "captions_per_sample": 2}, 1,
    ),
    "lines after one line": (
        {"a.png": picture(1), "a.txt": b"one", "b.png": picture(2), "b.txt": b"one\ntwo"}, "", "",
        {"format": "folder"}, 1,
    ),
    "lists in a column": (
        {"rows.parquet": parquet(image=[picture(1)], caption=[["one", "two"]])}, "/rows.parquet", "/rows.parquet",
        {"format": "parquet", "captions": ["caption"]}, 1,
    ),
    "one folder of images": (
        {"cats/a.png": picture(1), "cats/b.png": picture(2)}, "", "", {"format": "folder", "captions": "none"}, 1
    ),
    "images alone": (IMAGE, "", "", {"format": "folder", "captions": "none"}, 1),
    "tars of images alone": (
        {"0.tar": tar_bytes([("a.png", picture(1)), ("b.png", picture(2))])},
        "", "/*.tar", {"format": "tar", "captions": "none"}, 1,
    ),
    "a table of images alone": (
        {"rows.parquet": parquet(image=[picture(1)], label=[3])}, "/rows.parquet", "/rows.parquet",
        {"format": "parquet", "captions": "none"}, 1,
    ),
    "the second image has a caption": (
        {**IMAGE, "b.png": picture(6), "b.txt": b"a caption"}, "", "", {"format": "folder"}, 1
    ),
}  # fmt: skip


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(capfd: pytest.CaptureFixture[str], data: str) -> Made:
    """The config that `reinforce init` writes, and what it and `reinforce plan` print."""
    status, out, err = run_command(capfd, "init", data, "my.yaml")
    assert status == 0, err
    status, planned, err = run_command(capfd, "plan", "my.yaml")
    assert status == 0, err
    return yaml.safe_load(Path("my.yaml").read_text()), out, planned + err


@pytest.mark.parametrize("kind", SOURCES)
def test_the_config_for_each_kind_of_source_passes_plan_unchanged(
    kind: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files, data, source, fields, shards = SOURCES[kind]
    root = write(folder / "source", files)
    config, out, planned = init(capfd, root + data)
    assert config["source"] == f"{folder}/source{source}"
    assert config["input"] == fields
    assert f"source: {shards} shard" in out
    assert f"{shards} shard{'s' * (shards > 1)}, {shards} with something missing" in planned
    alone = fields.get("captions") == "none"
    assert config["teachers"].keys() == {"dinov2-small" if alone else "mobileclip2-s0"}, "there is no GPU here"
    assert "captioners" not in config
    assert ("caption of the first sample" in out) != alone
    assert (", no caption" in planned) == (alone or "second" in kind)
    assert ("embeddings/dinov2-small/images" in planned) == alone
    assert ("/caption" in planned) != alone
    text = Path("my.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=")
    assert Path(text.partition("\n")[0].partition("=")[2]).exists()
    for key in ("source", "output", "seed", "images", "input", "augmentations", "teachers", "workers"):
        before = text.partition(f"\n{key}:")[0].splitlines()[-1]
        assert before.startswith("#"), f"{key} has a comment above it"
    check_several_captions(kind, fields, out, planned, text)
    if not data:  # a run reads the files of a folder as by their pattern
        by_folder, by_pattern = (source_shards(Config(source=url, output="out")) for url in (root + "/", root + source))
        assert by_folder.names.to_pylist() == by_pattern.names.to_pylist()
        assert len(by_folder.urls) == shards
        assert by_folder.format is by_pattern.format
        left_out = kind in ("a folder as on the hub", "img2dataset's files")
        assert bool(by_folder.notes) == left_out, "files that are left out are named"


#: Rows of two columns with captions, of which the first is empty in the first row, and both in the last.
_HALF_EMPTY = (("a title", ""), ("another", "a long text"), ("", ""))


@pytest.mark.parametrize("kind", ["folder", "csv", "tar", "parquet"])
def test_a_caption_is_read_from_the_first_column_with_text_and_samples_without_one_are_counted(
    kind: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"file_name": f"{n}.png", "title": t, "description": d} for n, (t, d) in enumerate(_HALF_EMPTY)]
    images = {row["file_name"]: picture(n) for n, row in enumerate(rows)}
    csv = "\n".join(",".join(row.values()) for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]).encode()
    members = [*images.items()]
    members += [(row["file_name"].replace("png", "json"), json.dumps(row).encode()) for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("title", "description")}
    files = {
        "folder": {**images, "metadata.csv": csv},
        "csv": {**images, "rows.csv": csv},
        "tar": {"a.tar": tar_bytes(sorted(members))},
        "parquet": {"rows.parquet": parquet(image=[*images.values()], **columns)},
    }
    root = write(folder / "s", files[kind])
    config, out, planned = init(capfd, root + {"csv": "/rows.csv"}.get(kind, ""))
    prefix = "" if kind in ("csv", "parquet") else "json:"
    assert config["input"]["captions"] == [f"{prefix}description", f"{prefix}title"]
    assert "captions_per_sample" not in config["input"]
    assert "caption of the first sample that has one: 'a title'" in out
    assert "no caption: 1 of the first 3 samples; input.captions is a list of places" in out
    assert "caption 'a title'" in planned


def test_folders_of_classes_give_captions_of_their_names(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write(
        folder / "s", {f"{name}.png": picture(n) for n, name in enumerate(("cats/a", "cats/b", "wild_dogs/a"))}
    )
    config, out, planned = init(capfd, root)
    assert config["input"] == {
        "format": "folder", "captions": ["class"], "templates": [*CLASS_TEXTS], "captions_per_sample": len(CLASS_TEXTS)
    }  # fmt: skip
    assert "classes: 2 folders (cats, wild dogs); captions are made of them" in out
    assert "caption 'a photo of a cats.' and 3 more" in planned
    assert "are one class" not in out
    write(folder / "two", {f"{name}.png": picture(0) for name in ("red_thing/a", "Red thing/b", "blue/c")})
    status, out, _ = run_command(capfd, "init", str(folder / "two"), "two.yaml")
    assert status == 0
    assert "warning: folders 'Red thing' and 'red_thing' are one class, 'red thing', to every text" in out
    write(folder / "s", {"loose.png": picture(4)})
    assert init_again(capfd, root)["captions"] == "none", "an image without a folder has no class"
    parts = write(folder / "parts", {f"{name}.png": picture(0) for name in ("train/cats/a", "Val/cats/b")})
    assert init_again(capfd, parts)["captions"] == "none", "folders of parts are no classes"


def test_class_folders_may_have_names_that_are_not_utf_8_or_mean_nothing(folder: Path) -> None:
    for name in (b"a\xff", b"b"):
        os.makedirs(os.fsencode(folder) + b"/odd/" + name)
        (folder / "odd" / os.fsdecode(name) / "1.png").write_bytes(picture(1))
    assert look_at(str(folder / "odd"), "out").classes == ("a%FF", "b")
    ids = write(folder / "ids", {f"{name}/1.png": picture(1) for name in ("n01440764", "n01443537")})
    assert "WordNet ids, which no model knows" in look_at(ids, "out").fields.lines()[0]


def init_again(capfd: pytest.CaptureFixture[str], data: str) -> dict[str, Any]:
    Path("my.yaml").unlink()
    found: dict[str, Any] = init(capfd, data)[0]["input"]
    return found


#: True captions of a sample.
SEVERAL = {
    "rows of one image": 2, "lists in JSON": 3, "lists after a list of one": 3, "a list after a text": 2,
    "lines after one line": 2, "lists in a column": 2,
}  # fmt: skip


def check_several_captions(kind: str, fields: dict[str, Any], out: str, planned: str, text: str) -> None:
    """Several true captions are said, and kept where they are not read otherwise."""
    count, kept, first = SEVERAL.get(kind, 1), "captions_per_sample" in fields, "after" not in kind
    ends = "keeps them" if kept else "would keep them; it is not set"
    assert (f"up to {count} true captions a sample; input.captions_per_sample {ends}" in out) == (count > 1)
    assert (("# " * (not kept) + f"captions_per_sample: {count}\n") in text) == (count > 1)
    stored = f"up to {count} a sample, each encoded by 1 teacher, which stores {count} vectors a sample"
    assert (f"caption 'one' and {count - 1} more" in planned) == (kept and first)
    assert (f"true captions: {stored}" in planned) == kept
    used = "which are read as one" if "lines" in kind else "of which the first is used"
    more = f"true captions, {used}; input.captions_per_sample: {count} keeps and embeds them"
    assert (more in planned) == (count > 1 and not kept)


def test_a_folder_with_images_is_one_of_images_and_the_output_is_no_source(folder: Path) -> None:
    root = write(folder / "photos", {**IMAGE, "deep/rows.parquet": HUB})
    assert source_shards(Config(source=root, output="out")).format.name == "folder"
    root = write(folder / "tables", {"rows.parquet": HUB, "out/dataset.json": b"{}", "out/samples/a.parquet": HUB})
    assert source_shards(Config(source=root, output=f"{root}/out")).urls == [f"{root}/rows.parquet"]
    write(folder / "tables", {"more/rows.parquet": HUB})
    with pytest.raises(UserError, match="has a reinforced dataset in it, out"):
        source_shards(Config(source=root, output=f"{root}/out"))


def test_in_a_folder_of_images_the_output_is_beside_it(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "photos", {**IMAGE, "deep/b.png": picture(2)})
    for at, data in (("photos", "."), ("photos/deep", ".."), ("photos/deep", f"{folder}/photos")):
        monkeypatch.chdir(folder / at)
        config, _, _ = init(capfd, data)
        Path("my.yaml").unlink()
        assert Path(config["output"]).resolve().parent == folder
    monkeypatch.chdir(folder)
    assert init(capfd, "photos")[0]["output"] == "photos-reinforced"


def test_the_samples_of_a_dataset_are_a_source_and_a_machine_with_a_gpu_gets_the_ensemble_and_a_captioner(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "source", TARS)
    reinforce_here({"source": f"{folder}/source/*.tar", "output": f"{folder}/first"})
    monkeypatch.setattr("reinforce.engine.starter.nodes_of_run", lambda: [{"GPU": 1}])
    config, out, planned = init(capfd, f"{folder}/first")
    assert (config["source"], config["input"]) == (f"{folder}/first", {"format": "dataset"})
    assert "3 shards (reinforced dataset" in out
    assert "3 shards, 3 with something missing" in planned
    assert config["teachers"].keys() == {"dfn2b", "dfn2b-s39b"}
    assert config["captioners"].keys() == {"coca"}
    assert "captions/coca" in planned
    Path("my.yaml").unlink()
    config, _, planned = init(capfd, write(folder / "photos", IMAGE))
    assert config["teachers"].keys() == {"dinov2", "siglip2"}
    assert "captioners" not in config
    assert "embeddings/siglip2/images" in planned


def test_what_a_new_user_must_know_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "urls.csv").write_text("url,caption\nhttp://127.0.0.1:9/a.png,a caption\n")
    status, out, _ = run_command(capfd, "init", "urls.csv")
    assert status == 0
    assert "no sample can be read. urls.csv-" in out
    assert 'to allow it, set input.images_from: ["http://127.0.0.1:9"]' in out
    assert "no caption was found" not in out
    for name in ("captions.txt", "annotations/captions_val2017.json"):
        root = write(folder / name.partition(".")[0], {"images/a.png": picture(1), "Thumbs.db": b"", name: b"{}"})
        _, out, _ = run_command(capfd, "init", root)
        assert "images alone are read; set input.captions to where captions are, if any are" in out
        assert f"source: 2 other files not read, such as {root}/{name}; captions are read from metadata.csv" in out


def test_names_of_columns_cannot_write_into_the_config(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "a: b\nseed: 666 #\x1b[31m"
    pq.write_table(pa.table({"image": [picture(1)], name: ["some words"]}), folder / "rows.parquet")
    config, out, _ = init(capfd, "rows.parquet")
    assert config["seed"] == 0
    assert config["input"]["captions"] == [name]
    assert "\x1b" not in out + Path("my.yaml").read_text()


def test_an_existing_config_is_replaced_only_by_force(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write(folder / "photos", TARS)
    assert run_command(capfd, "init", data)[0] == 0
    before = (folder / "photos.yaml").read_text()
    (folder / "photos.yaml").write_text("mine")
    status, _, err = run_command(capfd, "init", data)
    assert (status, "photos.yaml exists" in err) == (2, True)
    assert (folder / "photos.yaml").read_text() == "mine"
    assert run_command(capfd, "init", data, "--force")[0] == 0
    assert (folder / "photos.yaml").read_text() == before
    assert "photos-reinforced" in before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere/*.tar", "no file matches"),
        ("empty", "is an empty folder"),
        ("rows.parquet", "input.image"),
        ("nosuch://x/y.tar", "://"),
    ],
)
def test_data_that_cannot_be_read_is_an_error_and_writes_nothing(
    data: str, message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    pq.write_table(pa.table({"a": [1], "b": [2.0]}), folder / "rows.parquet")
    status, _, err = run_command(capfd, "init", data, "my.yaml")
    assert status == 2
    assert message in err
    assert not (folder / "my.yaml").exists()
