"""`reinforce validate`: repeated keys, damaged files, and sources that have changed."""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.dataset.manifest import write_manifest
from reinforce.dataset.runs import RecordWriter, ShardKeys, ShardRecord, SourceRecord
from reinforce.dataset.status import read_status
from reinforce.dataset.store import Listing, Store
from reinforce.dataset.validate import validate
from reinforce.source.references import read_state
from tests.helpers.commands import printed_by
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.reinforced import flip, reinforce_here, rewrite, small_dataset


def test_a_sound_dataset_is_valid_and_not_written_to(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, before = str(made), tree(made, layers_only=False)
    assert printed_by(capsys, "validate", url) == f"{url}: read 2 shards, valid\n"
    out = printed_by(capsys, "validate", url, "--sources", f"{made.parent}/source")
    assert out == f"source files: 2 as when their samples were written\n{url}: read 2 shards, valid\n"
    report = json.loads(printed_by(capsys, "validate", url, "--json", "--quick"))
    assert (report["valid"], report["shards"], report["rows"], report["findings"]) == (True, 2, 12, [])
    assert tree(made, layers_only=False) == before


def test_shards_that_a_run_commits_between_two_listings_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(small_dataset(tmp_path, (5, 4, 3)))
    whole = tree(out, layers_only=False)
    later = [{name: data for name, data in whole.items() if f"/0000{number}-" in name} for number in (1, 2)]
    indexes = [name for name in whole if name.startswith("index/")]
    for name in (*later[0], *later[1], *indexes):
        (out / name).unlink()
    listings, calls = Store.listings, []

    def list_beside_a_run(store: Store, layers: Iterable[str], known: Listing | None = None) -> dict[str, Listing]:
        """The last layers are listed first; then the run commits a shard, and then its index."""
        names = [*layers]
        calls.append(names)
        found = listings(store, names[2:], known)
        if len(calls) <= len(later):
            for name in (*later[len(calls) - 1], *indexes):
                (out / name).write_bytes(whole[name])
        return found | listings(store, names[:2], known)

    monkeypatch.setattr(Store, "listings", list_beside_a_run)
    found = validate(str(out))
    assert (found.valid, found.errors, found.shards) == (True, [], 3)
    for layer in ("samples", "captions"):
        (out / next(name for name in later[0] if name.startswith(layer))).unlink()
    found = validate(str(out))
    assert {one.kind for one in found.findings} == {"missing", "orphan"}, "what stays so is reported"


def test_keys_that_repeat_across_shards_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, keys in enumerate((range(4), range(2, 9), range(20, 22))):
        members = [member for key in keys for member in members_of(0, key + 1)[3 * key :]]
        write_tar(tmp_path / "source" / f"{number}.tar", members)
    url = reinforce_here(config_of(f"{tmp_path}/source/*.tar", tmp_path / "out"))
    out = printed_by(capsys, "validate", url, status=1)
    assert "repeated keys: 2 keys, 18.18% of all, in more than one shard, for example in 0-" in out
    assert "  Each sample is kept and can be read, and equal keys draw the same random numbers. If a shard was" in out
    assert out.endswith("read 3 shards, not valid\n")


def test_changed_touched_moved_and_missing_sources_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = small_dataset(tmp_path, sizes=(2, 2, 2, 2))
    writer = RecordWriter(Store(url), "2026")
    for shard in Store(url).shards("samples"):
        source = f"{tmp_path}/source/{shard.partition('-')[0]}.tar"
        writer.add(ShardRecord(shard, ShardKeys.of([]), SourceRecord(source, read_state(source))))
    writer.flush()
    os.utime(tmp_path / "source" / "00003.tar", (1, 1))
    found = validate(url, [str(tmp_path)])
    assert (found.valid, found.sources) == (True, {"same": 3, "touched": 1})
    os.rename(tmp_path / "source", tmp_path / "new")
    assert validate(url, [str(tmp_path)]).sources == {"unreadable": 4}
    moved = {f"{tmp_path}/new": f"{tmp_path}/source"}
    reinforce_here(config_of(f"{tmp_path}/new/*.tar", tmp_path / "out", moved=moved))
    assert validate(url, [f"{tmp_path}/new"]).sources == {"same": 4}
    write_tar(tmp_path / "new" / "00000.tar", members_of(7, 40))
    (tmp_path / "new" / "00001.tar").unlink()
    out = printed_by(capsys, "validate", url, "--sources", str(tmp_path), status=1)
    assert "1 source files have changed since their samples were written." in out
    assert "  00000-" in out
    assert " bytes then, " in out
    assert "source files: 2 as when their samples were written; 1 that cannot be read now" in out


def test_layers_of_several_states_of_a_class_are_named(dataset: Path) -> None:
    url = str(dataset)
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
    assert read_status(url)["notes"] == lines[:1]


def test_files_that_the_user_has_not_named_are_not_opened(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reinforce.dataset.shard_checks.probe_state", lambda url: pytest.fail(f"{url} was opened"))
    found = validate(str(made), [f"{made.parent}/sour", "s3://bucket/source"])
    assert found.sources == {"elsewhere": 2}
    assert "source files: 2 outside of the folders of --sources, which were not looked at" in list(found.lines())


#: Damages a dataset, in particular the files of one of its layers.
Damage = Callable[[Path, list[Path]], object]


def _cut(by: int, end: bytes = b"") -> Damage:
    """Replace the last bytes."""
    return lambda _, files: files[0].write_bytes(files[0].read_bytes()[:-by] + end)


def _other_layer(dataset: Path, files: list[Path]) -> None:
    shutil.copy(dataset / "embeddings" / "red" / "caption" / files[0].name, files[0])


def _swap_shards(dataset: Path, files: list[Path]) -> None:
    first, second = (file.read_bytes() for file in files)
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def _delete(dataset: Path, files: list[Path]) -> None:
    files[0].unlink()


def _change(path: str, *values: object) -> Damage:
    """Set a value in dataset.json, or remove it."""

    def change(dataset: Path, _: list[Path]) -> None:
        manifest = json.loads((dataset / "dataset.json").read_text())
        *keys, last = path.split(".")
        part = functools.reduce(dict.__getitem__, keys, manifest)
        del part[last]
        part.update((last, value) for value in values)
        (dataset / "dataset.json").write_text(json.dumps(manifest))

    return change


def _rewrite(change: Callable[[pa.Table], pa.Table]) -> Damage:
    """Change the rows of the first file, and keep its footer and checksums valid."""
    return lambda _, files: rewrite(files[0], change)


def _scaled(table: pa.Table) -> pa.Table:
    values = table["embeddings"].combine_chunks().to_numpy_ndarray().copy()
    values[1] *= 2
    return table.set_column(1, "embeddings", pa.FixedShapeTensorArray.from_numpy_ndarray(values))


def _without_second(table: pa.Table) -> pa.Table:
    rows = table["captions"].to_pylist()
    return table.set_column(1, "captions", pa.array([rows[0], None, *rows[2:]], pa.list_(pa.string())))


def _flip(column: str, from_end: int = 0) -> Damage:
    return lambda _, files: flip(files[0], column, from_end)


def _without(column: str) -> Damage:
    def drop(_: Path, files: list[Path]) -> None:
        table = pq.read_table(files[0])
        footer = pq.read_schema(files[0]).metadata
        pq.write_table(table.drop_columns([column]).replace_schema_metadata(footer), files[0], row_group_size=8)

    return drop


def _other_keys(table: pa.Table) -> pa.Table:
    keys = table["key"].to_pylist()
    return table.set_column(0, "key", pa.array([keys[0], "another", *keys[2:]]))


RED = "embeddings/red/images"
NAMER = "captions/namer"
CHECKSUM = ("damaged", "a page does not have its checksum")
CUT = ("damaged", "cannot be read")
SWAPPED = [("misplaced", "00001.tar"), ("misplaced", "00000.tar")]
ORPHANS = [("orphan", "has no samples")] * 7
OTHER_KEYS = ("misplaced", "does not have the keys of samples")
UNLISTED = [("manifest", "is not as"), ("orphan", "has 2 files, but dataset.json does not")]
SCALE = "A logit scale or another value was changed"


@pytest.mark.parametrize(
    ("damage", "layer", "found", "quick"),
    [
        (_flip("embeddings"), RED, [CHECKSUM], 0),
        (_flip("key", 3), RED, [CHECKSUM], None),
        (_flip("key", 3), "samples", [CHECKSUM], None),
        (_cut(1, b"2"), RED, [CUT], None),
        (_cut(100), RED, [CUT], None),
        (_cut(100), "samples", [CUT], None),
        (_swap_shards, RED, SWAPPED, None),
        (_swap_shards, "samples", SWAPPED, None),
        (_other_layer, RED, [("misplaced", "it is a file of layer embeddings/red/caption")], None),
        (_delete, RED, [("missing", "a run has committed it")], None),
        (_delete, "samples", [("missing", "a run has committed it"), *ORPHANS], None),
        (_without("key"), NAMER, [("damaged", "it has no column key")], None),
        (_without("captions"), NAMER, [("damaged", "it has no column captions")], 0),
        (_change("seed", 7), RED, [("manifest", "the settings of samples have fingerprint")], None),
        (_change("teachers.red.model.options.size", 7), RED, [("manifest", "settings of embeddings/red")] * 3, None),
        (_change("augmentations.count", 3), RED, [("manifest", "settings of samples"), *[("rows", "3 aug")] * 2], 1),
        (_change("teachers.red.logit_scale", 3.0), RED, [("manifest", SCALE)], None),
        (_change(f"layers.{RED}.dim", 9), RED, [("manifest", "is not as"), *[("rows", "float16 [2, 9]")] * 2], 1),
        (_change(f"layers.{RED}"), RED, UNLISTED, None),
        (_rewrite(_scaled), RED, [("rows", "1 row have a vector whose norm is not 1 (00000001)")], 0),
        (_rewrite(lambda table: table.slice(1)), RED, [OTHER_KEYS], None),
        (_rewrite(lambda table: table.take([1, 0, *range(2, len(table))])), RED, [OTHER_KEYS], None),
        (_rewrite(_other_keys), RED, [OTHER_KEYS], None),
        (_rewrite(_other_keys), "samples", [OTHER_KEYS] * 7, None),
        (_rewrite(_without_second), NAMER, [("rows", "1 row are null without a reason")], 0),
        (_rewrite(lambda table: table), RED, [], None),
    ],
)  # fmt: skip
def test_each_kind_of_damage_is_found_once_and_names_its_file(
    dataset: Path,
    damage: Damage,
    layer: str,
    found: list[tuple[str, str]],
    quick: int | None,
) -> None:
    """``quick`` is the number of findings that need no more than footers and keys: by default all."""
    damage(dataset, sorted((dataset / layer).glob("*.parquet")))
    for report, expected in ((validate(str(dataset)), found), (validate(str(dataset), quick=True), found[:quick])):
        assert report.valid == (not expected)
        assert [finding.kind for finding in report.findings] == [kind for kind, _ in expected]
        for finding, (kind, text) in zip(report.findings, expected, strict=True):
            assert text in finding.message
            if kind == "damaged":
                shard = min(path.stem for path in (dataset / layer).iterdir())
                assert (finding.layer, finding.shard) == (layer, shard)
                assert f"reinforce drop {dataset} {layer} --shard {shard}" in finding.message


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


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_of_one_image_are_counted_as_the_sample_that_they_become(kind: str, tmp_path: Path) -> None:
    images = [image for n in range(3) for image in [picture(n, 8, 8)] * (n + 1)]
    keys, texts = ["a", "b", "b", "c", "c", "c"], [f"text {n}" for n in range(6)]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "key": keys, "text": texts}), path)
    else:
        rows = zip([base64.b64encode(image).decode() for image in images], keys, texts, strict=True)
        path.write_text(
            "".join(f"{json.dumps(dict(zip(('image', 'key', 'text'), row, strict=True)))}\n" for row in rows)
        )
    url = reinforce_here({
        "source": str(path), "output": f"{tmp_path}/out", "augmentations": {"count": 1, "size": 8},
        "input": {"captions": ["text"], "captions_per_sample": 3},
    })  # fmt: skip
    found = validate(url, [str(tmp_path)], count=True)
    assert (found.counted, found.errors, found.rows) == (1, [], 3)
