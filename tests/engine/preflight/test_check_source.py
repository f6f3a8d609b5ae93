"""Checks of the source before a run and with a plan, and runs whose source is not tars."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs
import yaml

from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.preflight.check_source import FirstSample, check_source
from reinforce.engine.preflight.estimate import expected_bytes
from reinforce.engine.run import run
from reinforce.errors import UserError
from reinforce.source.config import LIMITS, Limits
from tests.helpers.commands import run_command
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.published import ALL, published_members, source_members, write_published
from tests.helpers.published import config_of as published_config
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tables import write_huggingface
from tests.helpers.tars import tar_bytes

ROOT = Path(__file__).parents[3]


def probe(values: dict[str, Any]) -> tuple[FirstSample | None, list[str]]:
    return check_source(make_plan(parse_config(values)))


def plan_command(folder: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``reinforce plan``."""
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return run_command(capsys, "plan", f"{folder}/config.yaml")


# --- sources of which nothing can be read


def test_plan_and_run_fail_with_the_same_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.tar").write_bytes(b"PAR1" + bytes(600))
    (tmp_path / "folder.tar").mkdir()
    write_tar(tmp_path / "texts.tar", [("a.txt", b"no image")])
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "small.tar", members_of(0, 3))
    monkeypatch.setitem(LIMITS, "wide", Limits(pixels=100))
    small = {"input": {"limits": "wide"}}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("x", {}, f"source: no sample can be read. {tmp_path}/x.tar: a Parquet file, not a tar: in `source` of a run,"),
        ("folder", {}, f"{tmp_path}/folder.tar: a folder, not a tar: write {tmp_path}/folder.tar/*.tar for the tars"),
        ("texts", {}, "texts.tar: the only sample cannot be read: a: no_image: no image among: txt."),
        ("empty", {}, "empty.tar: the tar contains no sample."),
        ("small", small, "none of the first 3 samples can be read: 00000000: image_pixels: 40x30 pixels, above limits"),
        ("no", {}, f"source cannot be read: {tmp_path}/no.tar does not exist. Check"),
    ]
    for name, changes, message in cases:
        values = config(tmp_path, f"{tmp_path}/{name}.tar", **changes)
        status, out, err = plan_command(tmp_path, values, capsys)
        assert (status, "with something missing" in out) == (2, False), "no table of a source that cannot be read"
        assert message in err
        with pytest.raises(UserError) as raised:
            run(values)
        assert f"error: {raised.value}\n" == err
    assert not (tmp_path / "out" / "quarantine").exists()


def test_files_that_are_not_tars_by_their_names_are_reported(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    with pytest.raises(UserError, match=rf"^source: {tmp_path}/0\.png and 2 more files: an image, not a tar: name "):
        probe(config(tmp_path, f"{tmp_path}/*.png"))
    with pytest.raises(UserError, match=r"^source: s3://nobody/x\.arrow: an Arrow file, .* Parquet"):
        probe(config(tmp_path, "s3://nobody/x.arrow"))


def test_a_source_without_access_fails_a_plan_before_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    changes = ["--set", "source=s3://nobody/x.tar", "--set", f"output={tmp_path}/out"]
    status, out, err = run_command(capsys, "plan", str(ROOT / "configs/dfn5b.yaml"), *changes)
    assert (status, "with something missing" in out) == (2, False)
    assert "error: source cannot be read: s3://nobody/x.tar: NoCredentialsError" in err
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_source_of_which_no_probed_file_can_be_read_is_a_user_error(tmp_path: Path) -> None:
    values = config(tmp_path, f"{tmp_path}/source/{{0..9}}.tar")
    with pytest.raises(UserError, match=r"^source cannot be read: .*/0\.tar does not exist; .*/5\.tar .*/9\.tar "):
        probe(values)
    write_tar(tmp_path / "source" / "5.tar", members_of(0, 1))
    sample, notes = probe(values)
    assert sample is not None
    assert notes == []


def test_images_that_are_all_equal_are_reported(tmp_path: Path) -> None:
    def notes(*images: bytes) -> list[str]:
        members = [(f"{number}.png", image) for number, image in enumerate(images)]
        path = write_tar(tmp_path / "x.tar", members)
        return probe(config(tmp_path, str(path), input={"captions": "none"}))[1]

    [note] = notes(*[picture(1)] * 6)
    assert note == f"{tmp_path}/x.tar: the first 4 samples have the same image; check the source"
    assert notes(picture(1), picture(1), picture(2)) == notes(picture(1)) == []


def test_unreadable_reinforcements_are_reported_under_their_config_key(tmp_path: Path) -> None:
    write_published(tmp_path, [source_members(ALL[0])], [published_members(ALL[0])])
    values = published_config(tmp_path, reinforcements=f"{tmp_path}/nowhere/00000.tar")
    with pytest.raises(UserError, match=r"^reinforcements cannot be read: .*/nowhere/00000\.tar does not exist"):
        probe(values)
    probe(published_config(tmp_path))


# --- sources of which a part can be read


def test_a_plan_shows_the_first_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", members_of(0, 2))
    status, out, err = plan_command(tmp_path, config(tmp_path, f"{tmp_path}/x.tar"), capsys)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "first sample: 00000000 (.png, 40 x 30), caption 'thing 0 of shard 0'"

    webp = ("b\x1b.webp", picture(1, format_="WEBP"))
    write_tar(tmp_path / "x.tar", [("a.png", b"broken"), webp, ("b\x1b.txt", b"x" * 99)])
    status, out, err = plan_command(tmp_path, config(tmp_path, f"{tmp_path}/x.tar"), capsys)
    assert out.splitlines()[-1] == f"first sample: b\\x1b (.webp), caption '{'x' * 60} ...'", "its header is not parsed"


def test_a_plan_names_shards_of_the_dataset_that_are_not_in_the_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", members_of(number, 2))
    reinforce_here(config(tmp_path, f"{tmp_path}/?.tar"))
    status, out, err = plan_command(tmp_path, config(tmp_path, f"{tmp_path}/1.tar"), capsys)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("not in `source`: 1 finished shard, such as 0-")


def test_a_first_sample_without_a_caption_is_noted_if_captions_are_encoded(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", picture(1)), ("a.text", b"a cat")])
    values = config(tmp_path, f"{tmp_path}/x.tar")
    [note] = probe(values)[1]
    assert note.startswith(f"the first sample of {tmp_path}/x.tar, a: no caption: looked for .txt, json:caption; ")
    assert note.endswith("the sample has .png, .text; set input.captions to where captions are, or to none")
    sample, notes = probe({**values, "input": {"captions": ["text"]}})
    assert (sample.caption, notes) == ("a cat", [])
    assert probe({**values, "teachers": {"eye": {"class": "tests.helpers.models:ImageOnly"}}})[1] == []


def test_several_images_of_the_first_sample_are_noted(tmp_path: Path) -> None:
    members = [("a.v1.png", picture(1)), ("a.v1.txt", b"a cat"), ("a.v2.png", picture(2)), ("a.v2.txt", b"a dog")]
    write_tar(tmp_path / "x.tar", members)
    sample, [note] = probe(config(tmp_path, f"{tmp_path}/x.tar"))
    assert sample.caption == "a cat"
    assert "2 images (.v1.png, .v2.png), of which one is read; a key ends at the first dot" in note


def test_a_bounded_number_of_bytes_is_read_before_the_first_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reinforce.engine.preflight.check_source._READ_BYTES", 10**6)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar_bytes([("big.npy", bytes(3 * 10**6)), *members_of(0, 1)])))
    values = config(tmp_path, f"{tmp_path}/x.tar.gz", input={"limits": Limits(image_bytes=1000, sidecar_bytes=1000)})
    sample, notes = probe(values)
    assert sample is None
    assert notes == [
        f"source: {tmp_path}/x.tar.gz: no sample in its first 1,001,000 bytes; the rest is read by the run"
    ]
    monkeypatch.undo()
    sample, notes = probe({**values, "input": {}})
    assert sample is not None
    assert notes == []


def test_shards_that_cannot_be_read_are_noted_where_others_can(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_text("not a tar")
    (tmp_path / "1.json").write_text("{}")
    write_tar(tmp_path / "2.tar", members_of(0, 1))
    sample, notes = probe(config(tmp_path, f"{tmp_path}/?.*"))
    assert sample.raw.key == "00000000"
    assert notes == [
        f"source: 1 of 3 files are not tars by their names and will be quarantined, such as {tmp_path}/1.json, a JSON "
        "file; write a pattern that ends in .tar",
        f"source: {tmp_path}/0.tar: a text file, not a tar: if it lists URLs, name it .txt",
    ]


def test_a_dataset_with_samples_is_continued_with_a_broken_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members_of(0, 2))
    values = config(tmp_path, f"{tmp_path}/0.tar")
    reinforce_here(values)
    (tmp_path / "1.tar").write_text(json.dumps({"not": "a tar"}))
    sample, [note] = probe(config(tmp_path, f"{tmp_path}/*.tar"))
    assert sample is None
    assert note.startswith(f"source: {tmp_path}/1.tar: a JSON file, not a tar: ")
    (tmp_path / "1.parquet").write_bytes(b"PAR1")
    [note, _] = probe(config(tmp_path, [f"{tmp_path}/0.tar", f"{tmp_path}/1.parquet"]))[1]
    assert note.startswith(f"source: {tmp_path}/1.parquet: a Parquet file, not a tar: ")
    assert len(Store(str(tmp_path / "out")).shards("samples")) == 1
    assert probe(values) == (None, []), "a complete dataset needs no source"


def test_several_true_captions_are_noted_with_what_becomes_of_them(tmp_path: Path) -> None:
    lines, listed = b"one\ntwo\nthree", b'{"caption": ["one", "two", "three"]}'
    write_tar(tmp_path / "lines.tar", [("a.png", picture(1)), ("a.txt", lines)])
    write_tar(tmp_path / "list.tar", [("a.png", picture(1)), ("a.json", listed)])
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "rows.csv").write_text("image,caption\n" + "".join(f"a.png,{n}\n" for n in ("one", "two", "three")))
    keeps = "input.captions_per_sample: 3 keeps and embeds them"
    for name, used in {
        "lines.tar": "which are read as one",
        "list.tar": "of which none is used",
        "rows.csv": "in rows that are a sample each",
    }.items():
        where = f"{tmp_path}/{name}: the first samples have up to 3 true captions, "
        assert f"{where}{used}; {keeps}" in probe(config(tmp_path, f"{tmp_path}/{name}"))[1]
        sample, notes = probe(config(tmp_path, f"{tmp_path}/{name}", input={"captions_per_sample": 2}))
        assert sample.line().endswith("caption 'one' and 1 more")
        assert f"{where}of which 2 are kept; {keeps}" in notes
        assert "true captions: up to 2 a sample, each encoded by 2 teachers, which store 2 vectors a sample" in notes
        _, notes = probe(config(tmp_path, f"{tmp_path}/{name}", input={"captions_per_sample": 3}))
        assert not [note for note in notes if "the first samples have" in note]


COUNT = 5
IMAGES = [picture(number) for number in range(COUNT)]
KEYS = [f"{number:03d}" for number in range(COUNT)]
CAPTIONS = [f"thing {number}" for number in range(COUNT)]


def config(folder: Path, source: str, output: str = "out", **changes: Any) -> dict[str, Any]:
    return config_of(source, folder / output, **{"captioners": {}, **changes})


def rows(dataset: str) -> list[Any]:
    """The rows of all layers of a dataset of one shard."""
    return [
        pq.read_table(path).to_pylist() for path in sorted(Path(dataset).rglob("*.parquet")) if "index" not in str(path)
    ]


@pytest.fixture
def from_tar(tmp_path: Path) -> list[Any]:
    members = [
        (f"{key}.{end}", data)
        for key, image, caption in zip(KEYS, IMAGES, CAPTIONS, strict=True)
        for end, data in (("png", image), ("json", f'{{"caption": "{caption}", "n": 1}}'.encode()))
    ]
    return rows(reinforce_here(config(tmp_path, str(write_tar(tmp_path / "x.tar", members)), "of-tar")))


def test_a_table_gives_the_rows_of_a_tar_with_the_same_samples(tmp_path: Path, from_tar: list[Any]) -> None:
    columns = {"key": KEYS, "caption": CAPTIONS, "n": [1] * COUNT}
    path = write_huggingface(tmp_path / "x.parquet", [*IMAGES, None], {name: [*v, v[0]] for name, v in columns.items()})
    values = config(tmp_path, path, input={"metadata": ["caption", "n"]})
    made = rows(reinforce_here(values))
    assert [row["reason"] for row in made.pop(-2)] == ["no_image"]
    assert made == from_tar
    before = tree(tmp_path / "out")
    assert not make_plan(parse_config(values)).pending, "a second run finds it complete"
    reinforce_here({**values, "output": f"{tmp_path}/again", "input": {**values["input"], "format": "parquet"}})
    assert tree(tmp_path / "again") == before


def test_the_first_sample_of_a_table_is_shown_and_what_is_not_there_is_one_error(tmp_path: Path) -> None:
    path = write_huggingface(tmp_path / "x.parquet", IMAGES, {"title": CAPTIONS})
    sample, [note, of_key] = probe(config(tmp_path, path))
    name = make_plan(parse_config(config(tmp_path, path))).pending[0].name
    assert sample.line() == f"first sample: {name}-00000000 (.png, 40 x 30), no caption"
    assert note.endswith("the row has image, title; set input.captions to where captions are, or to none")
    assert f"{name}-00000000: rows without a key get one made of the file's URL" in of_key
    sample, notes = probe(config(tmp_path, path, input={"captions": ["title"], "key": "title"}))
    assert (sample and sample.caption, notes) == ("thing 0", [])
    with pytest.raises(UserError, match=r"^source: no sample can be read\. .*x\.parquet: a Parq.* column 'jpg'"):
        probe(config(tmp_path, path, input={"image": "jpg"}))
    (tmp_path / "y.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UserError, match=r"y\.parquet: a Parquet file that cannot be used: it is not a Parquet f"):
        probe(config(tmp_path, f"{tmp_path}/y.parquet"))
    sizes = expected_bytes(make_plan(parse_config(config(tmp_path, path))))
    assert sum(map(len, IMAGES)) < sizes["samples"] < 3 * sum(map(len, IMAGES))  # type: ignore[operator]


def test_a_table_of_paths_stores_references_that_are_read_again_and_one_of_images_cannot(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    listed = ["a.png", f"{tmp_path}/a.png", "none.png"]
    (tmp_path / "x.csv").write_text("file_name\n" + "\n".join(listed))
    values = config(tmp_path, f"{tmp_path}/x.csv", images="reference", teachers={})
    [samples, quarantine] = rows(reinforce_here(values))[::-1]
    assert [row["image_ref"]["url"] for row in samples] == [f"{tmp_path}/a.png"]
    assert [row["reason"] for row in quarantine] == ["image_place", "image_missing"]
    reinforce_here(config(tmp_path, f"{tmp_path}/x.csv", images="reference"))
    encoded = base64.b64encode(IMAGES[0]).decode()
    (tmp_path / "y.csv").write_text(f"image\n{encoded}\n")
    found = rows(reinforce_here({**values, "source": f"{tmp_path}/y.csv", "output": f"{tmp_path}/y"}))
    assert found[0][0]["detail"] == "images: reference needs a file for each image"
    path = write_huggingface(tmp_path / "x.parquet", IMAGES, {})
    with pytest.raises(UserError, match=r"^source: images: reference needs .*x\.parquet is a parquet file; set"):
        make_plan(parse_config(config(tmp_path, path, images="reference")))
