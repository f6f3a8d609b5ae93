"""Opening, counting, restricting and iterating a dataset."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reinforce
from reinforce.dataset.files.store import Store
from reinforce.dataset.reading import row_counts
from reinforce.errors import UserError
from schemas import Reason
from tests.helpers.reinforced import small_dataset


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of 21, 9 and 14 samples."""
    return small_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def copy(url: str, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(url, tmp_path / "copy"))


def remove(dataset: Path, layer: str, *numbers: int) -> list[str]:
    """Delete a layer's files of some shards; returns the shards' names."""
    files = [sorted((dataset / layer).glob("*.parquet"))[number] for number in numbers]
    for file in files:
        file.unlink()
    return [file.stem for file in files]


def keys(data: reinforce.Dataset) -> list[str]:
    return [sample.key for sample in data]


def test_len_is_the_number_of_samples(url: str) -> None:
    data = reinforce.open(url)
    assert len(data) == len(keys(data)) == 44
    assert [len(data[shard]) for shard in data.shards] == [21, 9, 14]


def test_opening_and_truth_read_no_footer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "open_layer", None)
    monkeypatch.setattr(row_counts, "read_footer", None)
    assert reinforce.open(url)


def test_a_dataset_is_restricted_by_name_number_and_slice(url: str) -> None:
    data = reinforce.open(url)
    every = keys(data)
    first, second, third = data.shards
    assert keys(data[second]) == keys(data[1]) == keys(data[-2]) == every[21:30]
    assert data[1:].shards == [second, third]
    assert keys(data[1:]) == every[21:]
    assert data[::2].shards == [first, third]
    assert (data[5:].shards, len(data[5:]), keys(data[5:]), bool(data[5:])) == ([], 0, [], False)
    assert data[1:][0].shards == [second]
    assert (data.shards, len(data)) == ([first, second, third], 44), "the dataset itself is not changed"


def test_a_shard_that_does_not_exist_is_an_error_with_its_name(url: str) -> None:
    data = reinforce.open(url)
    with pytest.raises(KeyError, match="has no shard '00009' that is complete in every selected layer"):
        data["00009"]
    for number in (3, -4):
        with pytest.raises(IndexError, match=f"shard {number} is out of range: .* has 3 shards"):
            data[number]


def test_teachers_and_captioners_are_selected_by_name(url: str) -> None:
    data = reinforce.open(url, teachers=["blue"], captioners=[])
    sample = next(iter(data))
    assert (list(sample.images), list(sample.texts), sample.captions) == (["blue"], ["blue"], {})
    assert data.layers == ["samples", "embeddings/blue/images", "embeddings/blue/caption"]
    with pytest.raises(UserError, match="has no teacher 'green'; it has: red, blue"):
        reinforce.open(url, teachers=["green"])


def test_a_folder_without_a_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a reinforced dataset"):
        reinforce.open(str(tmp_path))


def test_missing_files_are_a_warning_with_the_numbers(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    assert len(reinforce.open(str(copy), teachers=["blue"])) == 44
    assert not caplog.records


def test_lost_samples_files_are_reported_too(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    remove(copy, "samples", 1)
    assert len(reinforce.open(str(copy))) == 35
    assert "2 of 3 shards are read, because samples lacks 1 of 3 shards" in caplog.text


def test_strict_refuses_missing_files(url: str, copy: Path) -> None:
    assert len(reinforce.open(url, strict=True)) == 44
    remove(copy, "embeddings/blue/caption", 1)
    with pytest.raises(UserError, match=r"embeddings/blue/caption lacks 1 of 3 shards .*, 2 of 3 shards are read\.$"):
        reinforce.open(str(copy), strict=True)
    assert len(reinforce.open(str(copy), teachers=["red"], strict=True)) == 44


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


def test_nothing_else_is_listed_if_nothing_is_missing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    listings = Store.listings
    monkeypatch.setattr(Store, "listings", lambda store, layers: (listed.extend(layers), listings(store, layers))[1])
    layers = reinforce.open(url).layers
    assert listed == layers


def test_a_dataset_without_a_complete_shard_is_an_error_with_the_numbers(copy: Path) -> None:
    remove(copy, "embeddings/red/images", 0, 1)
    remove(copy, "embeddings/blue/images", 2)
    with pytest.raises(UserError, match=r"no shard that is complete in samples.*\n.*red/images lacks 2 of 3 shards"):
        reinforce.open(str(copy))


def test_repr_is_a_summary(url: str) -> None:
    data = reinforce.open(url)
    lines = repr(data).splitlines()
    size = sum(path.stat().st_size for path in Path(url).rglob("*.parquet") if path.parent.name != "index")
    assert lines == [
        f"Dataset({url!r})",
        f"  44 samples in 3 shards, {size / 1024:.1f} KiB",
        "  teachers: red (dim 8, K 2, logit scale 50), blue (dim 12, K 2, logit scale 30)",
        "  captioners: namer (N 2)",
    ]
    assert "9 samples in 1 shard, " in repr(reinforce.open(url, teachers=[], captioners=[])[1])
    assert repr(reinforce.open(url, teachers=[], captioners=[])).splitlines()[2:] == [
        "  teachers: none",
        "  captioners: none",
    ]


def test_reading_imports_neither_torch_nor_ray(url: str) -> None:
    code = (
        f"import reinforce, sys; data = reinforce.open({url!r}); print(repr(data)); next(iter(data)).augmented(0); "
        "print({'torch', 'ray'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "set()"
