"""Opening, counting, restricting and iterating a dataset."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.dataset import aligned as row_counts
from reinforce.dataset.aligned import AlignedLayers, check_completeness, row_group_table
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import LayerWriter, Listing, Store
from reinforce.errors import UserError
from schemas import Reason


def remove(dataset: Path, layer: str, *numbers: int) -> list[str]:
    """Delete a layer's files of some shards; returns the shards' names."""
    files = [sorted((dataset / layer).glob("*.parquet"))[number] for number in numbers]
    for file in files:
        file.unlink()
    return [file.stem for file in files]


def keys(data: reinforce.Dataset) -> list[str]:
    return [sample.key for sample in data]


def test_opening_and_truth_read_no_footer_and_list_nothing_else_if_nothing_is_missing(
    labelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "open_layer", None)
    monkeypatch.setattr(row_counts, "read_footer", None)
    listed = []
    listings = Store.listings
    monkeypatch.setattr(Store, "listings", lambda store, layers: (listed.extend(layers), listings(store, layers))[1])
    data = reinforce.open(labelled)
    assert data
    assert listed == data.layers


def test_a_dataset_has_a_length_and_is_restricted_by_name_number_and_slice(labelled: str) -> None:
    data = reinforce.open(labelled)
    every = keys(data)
    first, second, third = data.shards
    assert [len(data[shard]) for shard in data.shards] == [21, 9, 14]
    assert keys(data[second]) == keys(data[1]) == keys(data[-2]) == every[21:30]
    assert data[1:].shards == [second, third]
    assert keys(data[1:]) == every[21:]
    assert data[::2].shards == [first, third]
    assert (data[5:].shards, len(data[5:]), keys(data[5:]), bool(data[5:])) == ([], 0, [], False)
    assert data[1:][0].shards == [second]
    assert (data.shards, len(data), len(every)) == ([first, second, third], 44, 44), "the dataset is not changed"
    with pytest.raises(KeyError, match="has no shard '00009' that is complete in every selected layer"):
        data["00009"]
    for number in (3, -4):
        with pytest.raises(IndexError, match=f"shard {number} is out of range: .* has 3 shards"):
            data[number]


def test_teachers_and_captioners_are_selected_by_name(labelled: str) -> None:
    data = reinforce.open(labelled, teachers=["blue"], captioners=[])
    sample = next(iter(data))
    assert (list(sample.images), list(sample.texts), sample.captions) == (["blue"], ["blue"], {})
    assert data.layers == ["samples", "embeddings/blue/images", "embeddings/blue/caption"]
    assert reinforce.open(labelled, teachers=["r*"]).teachers == ["red"]
    with pytest.raises(UserError, match="has no teacher 'green'; it has: red, blue"):
        reinforce.open(labelled, teachers=["green"])
    with pytest.raises(UserError, match="is not a reinforced dataset"):
        reinforce.open(str(Path(labelled).parent))


def test_missing_files_are_a_warning_with_the_numbers_and_strict_refuses_them(
    labelled: str, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = remove(copy, "embeddings/red/images", 0, 2)
    remove(copy, "embeddings/red/caption", 2)
    assert len(reinforce.open(str(copy))) == 9
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (
            "WARNING",
            f"{copy}: 1 of 3 shards are read, because embeddings/red/images lacks 2 of 3 shards ({', '.join(lost)}); "
            f"embeddings/red/caption lacks 1 of 3 shards ({lost[1]}). `reinforce run` with the dataset's config "
            "computes what is missing.",
        )
    ]
    caplog.clear()
    assert (
        len(reinforce.open(str(copy), teachers=["blue"], strict=True))
        == len(reinforce.open(labelled, strict=True))
        == 44
    )
    assert not caplog.records
    with pytest.raises(UserError, match=r"red/caption lacks 1 of 3 shards .*, 1 of 3 shards are read\.$"):
        reinforce.open(str(copy), strict=True)
    remove(copy, "embeddings/red/images", 0)
    with pytest.raises(UserError, match=r"no shard that is complete in samples.*\n.*red/images lacks 3 of 3 shards"):
        reinforce.open(str(copy))


def test_quarantined_shards_are_logged_without_a_warning(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    for layer in ("captions/namer", "embeddings/red/namer", "embeddings/blue/namer"):
        (lost,) = remove(copy, layer, 1)
    Store(str(copy)).quarantine("captions/namer", lost, [(None, Reason.SHARD_FAILED, "the captioner raised")])
    with caplog.at_level(logging.INFO, "reinforce"):
        assert len(reinforce.open(str(copy), strict=True)) == 35
    text = f"{copy}: 2 of 3 shards are read; 1 shard is left out because it is quarantined in a layer"
    assert [(record.levelname, record.message) for record in caplog.records] == [("INFO", text)]
    caplog.clear()
    remove(copy, "embeddings/red/images", 0)
    assert len(reinforce.open(str(copy))) == 14
    (record,) = caplog.records
    assert "lacks 1 of 3 shards" in record.message
    assert "; 1 shard is left out because it is quarantined" in record.message


def test_repr_is_a_summary(labelled: str) -> None:
    data = reinforce.open(labelled)
    lines = repr(data).splitlines()
    size = sum(path.stat().st_size for path in Path(labelled).rglob("*.parquet") if path.parent.name != "index")
    assert lines == [
        f"Dataset({labelled!r})",
        f"  44 samples in 3 shards, {size / 1024:.1f} KiB",
        "  teachers: red (dim 8, K 2, logit scale 50), blue (dim 12, K 2, logit scale 30)",
        "  captioners: namer (N 2)",
    ]
    assert "9 samples in 1 shard, " in repr(reinforce.open(labelled, teachers=[], captioners=[])[1])
    assert repr(reinforce.open(labelled, teachers=[], captioners=[])).splitlines()[2:] == [
        "  teachers: none",
        "  captioners: none",
    ]


def test_reading_imports_neither_torch_nor_ray(labelled: str) -> None:
    code = (
        f"import reinforce, sys; data = reinforce.open({labelled!r}); repr(data); next(iter(data)).augmented(0); "
        "print({'torch', 'ray'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "set()"


def of(*numbers: str) -> Listing:
    return Listing.of((f"s{number}", 1) for number in numbers)


def test_a_layer_lacks_shards_of_which_some_are_named_but_not_those_that_another_layer_has_quarantined(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    store.quarantine("captions/c", "s1", [(None, Reason.SHARD_FAILED, "raised")])
    store.quarantine("captions/c", "s2", [("a key", Reason.NO_TEXT, "one row")])
    layers = {"samples": of(*"0123456"), "captions/c": of(*"03456"), "embeddings/t/c": of(*"03")}
    found = check_completeness(store, layers)
    assert (found.complete, found.total, found.quarantined) == (["s0", "s3"], 7, 1)
    assert found.describe_missing() == (
        "captions/c lacks 1 of 7 shards (s2); embeddings/t/c lacks 4 of 7 shards (s2, s4, s5, ...)"
    )


SCHEMA = pa.schema([("key", pa.string()), ("captions", pa.list_(pa.string()))])
GROUPS = [["a", "b"], ["c"]]


def write(store: Store, name: str, groups: list[list[str]], fingerprint: str = "f00d") -> None:
    with LayerWriter(store, Layer(name, KINDS["captions"], fingerprint), SCHEMA, "s", "s.tar") as writer:
        for keys in groups:
            writer.write(pa.table([keys, [[name]] * len(keys)], schema=SCHEMA))
        writer.commit()


def open_(store: Store, **columns: list[str]) -> AlignedLayers:
    return AlignedLayers(store, {"samples": "f00d", "other": "f00d"}, columns)


@pytest.fixture
def aligned(tmp_path: Path) -> Store:
    store = Store(str(tmp_path))
    write(store, "samples", GROUPS)
    return store


@pytest.mark.parametrize("whole", [True, False])
def test_layers_of_a_row_group_are_read_on_request(aligned: Store, whole: bool) -> None:
    write(aligned, "other", [["a", "b"], ["changed"]])
    with open_(aligned, other=["key"]).open("s", whole=whole) as shard:
        group = shard.row_group(0)
        assert group.samples["key"].to_pylist() == ["a", "b"]
        assert group.read("samples") is group.samples
        assert group.read("other").column_names == ["key"]
        later = shard.row_group(1)
        with pytest.raises(UserError, match=r"other/s\.parquet does not have the keys of samples/s\.parquet"):
            later.read("other")


def test_a_missing_file_another_fingerprint_and_another_number_of_row_groups_are_errors(aligned: Store) -> None:
    with pytest.raises(UserError, match=r"other/s\.parquet is missing\. `reinforce run`"), open_(aligned).open("s"):
        pass
    write(aligned, "other", GROUPS, fingerprint="beef")
    with pytest.raises(UserError, match="has fingerprint beef, its layer has f00d"), open_(aligned).open("s"):
        pass
    write(aligned, "other", [["a", "b", "c"]])
    with pytest.raises(UserError, match=r"other/s\.parquet does not have the keys"), open_(aligned).open("s"):
        pass


TABLE = [[0, 0, 8], [0, 1, 8], [0, 2, 5], [1, 0, 8], [1, 1, 1], [2, 0, 8], [2, 1, 6]]


def read_table(store: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[list[int]]]:
    """The number of footers that were read, and the table."""
    footers: list[str] = []
    check = row_counts.check_footer
    fingerprint = read_manifest(store)["layers"][SAMPLES]["fingerprint"]
    with monkeypatch.context() as patch:
        patch.setattr(row_counts, "check_footer", lambda path, *rest: (footers.append(path), check(path, *rest)))
        table = row_group_table(store, fingerprint, dict(sorted(store.shards(SAMPLES).items())))
    return len(footers), table.tolist()


def test_row_groups_are_counted_by_the_index_or_else_by_footers(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(copy))
    assert read_table(store, monkeypatch) == (0, TABLE)
    path = store.layer_path(SAMPLES, sorted(store.shards(SAMPLES))[1])
    pq.write_table(pq.read_table(path), path, row_group_size=8, compression="none")
    assert read_table(store, monkeypatch) == (1, TABLE), "a file of another size"
    index = Path(store.path("index", "samples.parquet"))
    index.write_bytes(b"PAR1 no")
    assert read_table(store, monkeypatch) == (3, TABLE), "a damaged index"
    index.unlink()
    assert read_table(store, monkeypatch) == (3, TABLE)
    assert row_group_table(store, "", {}).tolist() == []
    monkeypatch.setattr(row_counts, "TAIL_BYTES", 100)
    assert read_table(store, monkeypatch) == (3, TABLE), "footers that are longer than the tail"
    shards = store.shards(SAMPLES)
    first = min(shards)
    with pytest.raises(UserError, match=rf"samples/{first}\.parquet has fingerprint .*, its layer has beef"):
        row_group_table(store, "beef", {first: shards[first]})
    Path(store.layer_path(SAMPLES, first)).write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match=rf"samples/{first}\.parquet cannot be read .* set it aside by reinforce drop "):
        row_group_table(store, "beef", {first: 8})
