"""`reinforce validate`: repeated keys, damaged files, and sources that have changed."""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.dataset.files.store import Store
from reinforce.dataset.manifest.manifest import write_manifest
from reinforce.dataset.runs.key_sample import ShardKeys
from reinforce.dataset.runs.shard_records import RecordWriter, ShardRecord, SourceRecord
from reinforce.dataset.validate.validate import validate
from reinforce.source.identity import read_state
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.reinforced import reinforce_here, small_dataset
from tests.helpers.validated import printed


def test_a_sound_dataset_is_valid_and_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = small_dataset(tmp_path)
    before = tree(tmp_path, layers_only=False)
    assert printed(url, 0, capsys) == f"{url}: 3 shards were read, valid\n"
    out = printed(url, 0, capsys, "--sources", f"{tmp_path}/source")
    assert out == f"source files: 3 as when their samples were written\n{url}: 3 shards were read, valid\n"
    assert tree(tmp_path, layers_only=False) == before


def test_keys_that_repeat_across_shards_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, keys in enumerate((range(4), range(2, 9), range(20, 22))):
        members = [member for key in keys for member in members_of(0, key + 1)[3 * key :]]
        write_tar(tmp_path / "source" / f"{number}.tar", members)
    url = reinforce_here(config_of(f"{tmp_path}/source/*.tar", tmp_path / "out"))
    out = printed(url, 1, capsys)
    assert "repeated keys: 2 keys, 18.18% of all, occur in more than one shard, for example in 0-" in out
    assert out.endswith("3 shards were read, not valid\n")


def test_changed_touched_and_missing_sources_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = small_dataset(tmp_path, sizes=(2, 2, 2))
    write_tar(tmp_path / "source" / "00000.tar", members_of(7, 40))
    (tmp_path / "source" / "00001.tar").unlink()
    out = printed(url, 1, capsys, "--sources", str(tmp_path))
    assert "1 source files have changed since their samples were written." in out
    assert "  00000-" in out
    assert " bytes then, " in out
    assert "source files: 1 as when their samples were written; 1 that cannot be read now" in out


def test_a_file_that_was_touched_or_copied_is_valid(tmp_path: Path) -> None:
    url = small_dataset(tmp_path, sizes=(2, 2))
    writer = RecordWriter(Store(url), "2026")
    for shard in Store(url).shards("samples"):
        source = f"{tmp_path}/source/{shard.partition('-')[0]}.tar"
        writer.add(ShardRecord(shard, ShardKeys.of([]), SourceRecord(source, read_state(source))))
    writer.flush()
    os.utime(tmp_path / "source" / "00001.tar", (1, 1))
    found = validate(url, [str(tmp_path)])
    assert found.valid
    assert found.sources == {"same": 1, "touched": 1}


def test_layers_of_several_states_of_a_class_are_named(tmp_path: Path) -> None:
    url = small_dataset(tmp_path, sizes=(2,))
    manifest = Store(url).read_json("dataset.json")
    assert manifest is not None
    manifest["teachers"]["red"]["code"] = ["aa", "bb"]
    manifest["teachers"]["blue"]["code"] = 3  # forged
    write_manifest(Store(url), manifest)
    lines = [*validate(url).lines()]
    assert lines[0].startswith(
        "teacher red: its layers were computed with 2 states of the file of its class (hashes aa, "
    )
    assert len(lines) == 2


def test_damaged_and_stray_files_are_errors_of_their_own(tmp_path: Path) -> None:
    url = small_dataset(tmp_path, sizes=(3, 2, 2))
    first, second, third = sorted((tmp_path / "out" / "embeddings" / "red" / "images").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    shutil.copy(second, third)  # keys of another shard
    shutil.copy(second, second.with_name("stray-0123456789.parquet"))
    found = validate(url)
    assert not found.valid
    assert len(found.errors) == 3
    for part in ("cannot be read", "it is of the source shard", "stray-0123456789.parquet has no samples"):
        assert sum(part in error for error in found.errors) == 1, found.errors


def test_files_that_the_user_has_not_named_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = small_dataset(tmp_path, sizes=(2,))
    monkeypatch.setattr(
        "reinforce.dataset.validate.shard_reader.probe_state", lambda url: pytest.fail(f"{url} was opened")
    )
    found = validate(url, [f"{tmp_path}/sour", "s3://bucket/source"])
    assert found.sources == {"elsewhere": 1}
    assert "source files: 1 outside of the folders of --sources, which were not looked at" in list(found.lines())


def test_a_dataset_whose_source_moved_is_compared_where_it_is_now(tmp_path: Path) -> None:
    url = small_dataset(tmp_path, sizes=(2,))
    os.rename(tmp_path / "source", tmp_path / "new")
    assert validate(url, [str(tmp_path)]).sources == {"unreadable": 1}
    moved = {f"{tmp_path}/new": f"{tmp_path}/source"}
    reinforce_here(config_of(f"{tmp_path}/new/*.tar", tmp_path / "out", moved=moved))
    assert validate(url, [f"{tmp_path}/new"]).sources == {"same": 1}


@pytest.mark.parametrize("column", ["key", "captions"])
def test_a_file_without_a_column_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str) -> None:
    url = small_dataset(tmp_path, sizes=(2,))
    [path] = Path(url, "captions", "namer").iterdir()
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([column]).replace_schema_metadata(pq.read_schema(path).metadata), path)
    out = printed(url, 1, capsys)
    assert f"it has no column {column}" in out
    assert f"reinforce drop {url} captions/namer --shard {path.stem}" in out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(small_dataset(tmp_path_factory.mktemp("dataset"), (5, 3)))


def _flip(dataset: Path, files: list[Path]) -> None:
    column = pq.ParquetFile(files[0]).metadata.row_group(0).column(1)
    content = bytearray(files[0].read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 0x10
    files[0].write_bytes(content)


def _truncate(dataset: Path, files: list[Path]) -> None:
    files[0].write_bytes(files[0].read_bytes()[:-100])


def _swap_shards(dataset: Path, files: list[Path]) -> None:
    first, second = (file.read_bytes() for file in files)
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def _other_layer(dataset: Path, files: list[Path]) -> None:
    shutil.copy(dataset / "embeddings" / "red" / "caption" / files[0].name, files[0])


def _delete(dataset: Path, files: list[Path]) -> None:
    files[0].unlink()


def _change(path: str, value: object) -> Callable[[Path, list[Path]], None]:
    def change(dataset: Path, _: list[Path]) -> None:
        manifest = json.loads((dataset / "dataset.json").read_text())
        *keys, last = path.split(".")
        functools.reduce(dict.__getitem__, keys, manifest)[last] = value
        (dataset / "dataset.json").write_text(json.dumps(manifest))

    return change


def _remove_layer(dataset: Path, _: list[Path]) -> None:
    manifest = json.loads((dataset / "dataset.json").read_text())
    del manifest["layers"]["embeddings/red/images"]
    (dataset / "dataset.json").write_text(json.dumps(manifest))


def _rewrite(layer: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path, list[Path]], None]:
    """Change the rows of a layer's first file, and keep its footer and checksums valid."""

    def rewrite(dataset: Path, _: list[Path]) -> None:
        path = sorted((dataset / layer).glob("*.parquet"))[0]
        table = pq.read_table(path)
        pq.write_table(change(table).cast(table.schema), path, compression="none", row_group_size=8)

    return rewrite


def _scaled(table: pa.Table) -> pa.Table:
    values = table["embeddings"].combine_chunks().to_numpy_ndarray().copy()
    values[1] *= 2
    return table.set_column(1, "embeddings", pa.FixedShapeTensorArray.from_numpy_ndarray(values))


def _without_second(table: pa.Table) -> pa.Table:
    rows = table["captions"].to_pylist()
    return table.set_column(1, "captions", pa.array([rows[0], None, *rows[2:]], pa.list_(pa.string())))


RED = "embeddings/red/images"


@pytest.mark.parametrize(
    ("damage", "layer", "found"),
    [
        (_flip, RED, [("damaged", "a page does not have its checksum")]),
        (_truncate, RED, [("damaged", "cannot be read")]),
        (_truncate, "samples", [("damaged", "cannot be read")]),
        (_swap_shards, RED, [("misplaced", "00001.tar"), ("misplaced", "00000.tar")]),
        (_swap_shards, "samples", [("misplaced", "00001.tar"), ("misplaced", "00000.tar")]),
        (_other_layer, RED, [("misplaced", "it is a file of layer embeddings/red/caption")]),
        (_delete, RED, [("missing", "a run has committed it")]),
        (_delete, "samples", [("missing", "a run has committed it"), *[("orphan", "has no samples")] * 7]),
        (_change("seed", 7), RED, [("manifest", "the settings of samples have fingerprint")]),
        (_change("teachers.red.model.options.size", 7), RED, [("manifest", "the settings of embeddings/red")] * 3),
        (_change("augmentations.count", 3), RED, [("manifest", "the settings of samples"), *[("rows", "3 aug")] * 2]),
        (_change("teachers.red.logit_scale", 3.0), RED, [("manifest", "A logit scale or another value was changed")]),
        (_change(f"layers.{RED}.dim", 9), RED, [("manifest", "is not as"), *[("rows", "float16 [2, 9]")] * 2]),
        (_remove_layer, RED, [("manifest", "is not as"), ("orphan", "has 2 files, but dataset.json does not")]),
        (_rewrite(RED, _scaled), RED, [("rows", "1 row have a vector whose norm is not 1 (00000001)")]),
        (_rewrite(RED, lambda table: table.slice(1)), RED, [("misplaced", "does not have the keys of samples")]),
        (_rewrite("captions/namer", _without_second), RED, [("rows", "1 row are null without a reason")]),
    ],
)  # fmt: skip
def test_each_kind_of_damage_is_found_once_and_names_its_file(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, list[Path]], None],
    layer: str,
    found: list[tuple[str, str]],
) -> None:
    dataset = shutil.copytree(made, tmp_path / "out")
    damage(dataset, sorted((dataset / layer).glob("*.parquet")))
    report = json.loads(printed(str(dataset), 1, capsys, "--json"))
    assert report["valid"] is False
    assert [finding["kind"] for finding in report["findings"]] == [kind for kind, _ in found]
    for finding, (kind, text) in zip(report["findings"], found, strict=True):
        assert text in finding["message"]
        if kind == "damaged":
            assert (finding["layer"], finding["shard"]) == (layer, sorted((dataset / layer).iterdir())[0].stem)


def test_json_of_a_valid_dataset(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(printed(str(made), 0, capsys, "--json", "--quick"))
    assert (report["valid"], report["shards"], report["rows"], report["findings"]) == (True, 2, 8, [])


def _other_keys(table: pa.Table) -> pa.Table:
    keys = table["key"].to_pylist()
    return table.set_column(0, "key", pa.array([keys[0], "another", *keys[2:]]))


def _flip_keys(_: Path, files: list[Path]) -> None:
    column = pq.ParquetFile(files[0]).metadata.row_group(0).column(0)
    content = bytearray(files[0].read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 0x10
    files[0].write_bytes(content)


def _flip_end(_: Path, files: list[Path]) -> None:
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-1] + b"2")


@pytest.mark.parametrize(
    ("damage", "layer", "found"),
    [
        (_flip_keys, RED, ["damaged"]),
        (_flip_keys, "samples", ["damaged"]),
        (_flip_end, RED, ["damaged"]),
        (_truncate, RED, ["damaged"]),
        (_truncate, "samples", ["damaged"]),
        (_swap_shards, RED, ["misplaced"] * 2),
        (_swap_shards, "samples", ["misplaced"] * 2),
        (_other_layer, RED, ["misplaced"]),
        (_rewrite(RED, _other_keys), RED, ["misplaced"]),
        (_rewrite("samples", _other_keys), "samples", ["misplaced"] * 7),
        (_rewrite(RED, lambda table: table.slice(1)), RED, ["misplaced"]),
        (_rewrite(RED, lambda table: table.take([1, 0, *range(2, len(table))])), RED, ["misplaced"]),
        (_rewrite(RED, lambda table: table), RED, []),
        (_flip, RED, []),
    ],
)  # fmt: skip
def test_quick_finds_what_is_wrong_with_footers_and_keys(
    made: Path, tmp_path: Path, damage: Callable[[Path, list[Path]], None], layer: str, found: list[str]
) -> None:
    dataset = shutil.copytree(made, tmp_path / "out")
    damage(dataset, sorted((dataset / layer).glob("*.parquet")))
    findings = validate(str(dataset), quick=True).findings
    assert [finding.kind for finding in findings] == found
    if found and found[0] == "damaged":
        assert [(finding.layer, finding.shard) for finding in findings] == [
            (layer, sorted((dataset / layer).glob("*.parquet"))[0].stem)
        ]


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_samples_are_counted_in_the_source(tmp_path: Path, kind: str) -> None:
    images = [picture(number, 9, 9) for number in range(5)]
    keys = ["a", "b", "c", "d", "d"] if kind != "tar" else ["a", "b", "c", "d", "e"]
    values: list[bytes | None] = [*images[:4], None] if kind == "tar" else [images[0], None, *images[2:]]
    path = tmp_path / f"x.{kind}"
    if kind == "tar":
        members = [(f"{key}.png", image) for key, image in zip(keys, values, strict=True) if image]
        write_tar(path, [*members, ("e.txt", b"no image"), ("d.json", b"broken")])
    elif kind == "parquet":
        pq.write_table(pa.table({"image": pa.array(values, pa.binary()), "key": keys}), path)
    else:
        encoded = [None if image is None else base64.b64encode(image).decode() for image in values]
        rows = [{"image": image, "key": key} for image, key in zip(encoded, keys, strict=True)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    augmentations = {"count": 1, "size": 8}
    url = reinforce_here({"source": str(path), "output": f"{tmp_path}/out", "augmentations": augmentations})
    found = validate(url, [str(tmp_path)], count=True)
    assert (found.counted, found.errors, found.rows) == (1, [], 4 if kind == "tar" else 3)
    [quarantine] = Path(url, "quarantine", "samples").iterdir()
    quarantine.unlink()
    [error] = validate(url, [str(tmp_path)], count=True).errors
    assert f"has 5 samples, the dataset has {found.rows} rows and 0 samples in the quarantine" in error
