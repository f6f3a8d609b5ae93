"""Codecs that need no codebook: whole vectors, or their first numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.convert import convert
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.dataset.vectors import decode
from reinforce.engine.plan.plan import make_plan
from reinforce.errors import UserError
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import reinforce_here

MODEL = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}}
CODECS = ("float32", "float16", "first4", "first4-int8")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One teacher in each codec."""
    folder = tmp_path_factory.mktemp("stored")
    for number, size in enumerate((9, 5)):
        write_tar(folder / "source" / f"{number:05d}.tar", members_of(number, size))
    return Path(reinforce_here(config(folder)))


def config(folder: Path, **codecs: str) -> dict[str, Any]:
    names = codecs or {name: name for name in CODECS}
    teachers = {name: {**MODEL, "codec": codec} for name, codec in names.items()}
    return config_of(f"{folder}/source/*.tar", folder / "out", captioners={}, teachers=teachers)


def test_first_numbers_are_those_of_the_whole_vectors_at_unit_norm(stored: Path) -> None:
    rows = 0
    for sample in reinforce.open(str(stored)):
        for of in (sample.images, {name: texts["caption"] for name, texts in sample.texts.items()}):
            first = of["float16"][:, :4] / np.linalg.norm(of["float16"][:, :4], axis=1, keepdims=True)
            assert np.abs(of["first4"] - first).max() <= 2**-11
            assert np.abs(of["first4-int8"] - first).max() <= 1 / 254 + 1e-6
        rows += 1
    assert rows == 14
    assert validate(str(stored)).valid


def test_the_codec_is_part_of_the_fingerprint(stored: Path) -> None:
    def fingerprint(**keys: str) -> str:
        changes = {"teachers": {"red": {**MODEL, **keys}}, "captioners": {}}
        parsed = parse_config(config_of(f"{stored.parent}/source/*.tar", stored.parent / "other", **changes))
        return make_plan(parsed).layers["embeddings/red/images"].fingerprint

    assert fingerprint() == fingerprint(codec="float16")
    assert len({fingerprint(codec=codec) for codec in ("float16", "int8", "first4")}) == 3


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (
            "float8",
            r"teachers\.red\.codec: there is no codec 'float8'; there are: float16, float32, int8, .*; first256, ",
        ),
        ("first0", "there is no codec"),
        ("first9", r"teachers\.red\.codec: first9: the vectors have 8 numbers; choose at most first8"),
    ],
)
def test_a_codec_that_cannot_store_the_vectors_is_refused_before_anything_is_written(
    stored: Path, tmp_path: Path, codec: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        reinforce_here(
            config_of(
                f"{stored.parent}/source/*.tar", tmp_path, captioners={}, teachers={"red": {**MODEL, "codec": codec}}
            )
        )


def test_a_vector_whose_first_numbers_are_zero_is_null_with_a_reason_in_runs_and_conversions(tmp_path: Path) -> None:
    members = [member for member in members_of(0, 30) if member[0] != "00000013.txt"]
    write_tar(tmp_path / "source" / "0.tar", members)
    model = {**MODEL, "class": "tests.helpers.models:SparseTeacher"}
    teachers = {"red": {**model, "codec": "float16"}, "short": {**model, "codec": "first4"}}
    source = f"{tmp_path}/source/*.tar"
    both = reinforce_here(config_of(source, tmp_path / "both", captioners={}, teachers=teachers))
    url = reinforce_here(config_of(source, tmp_path / "out", captioners={}, teachers={"red": teachers["red"]}))
    convert(url, "red", "short", "first4", 280, use_ray=False)
    for name in ("images", "caption"):
        layer = f"embeddings/short/{name}"
        [shard] = Store(both).shards(layer)
        assert tree(Path(url, layer)) == tree(Path(both, layer))
        rows = Store(both).quarantined(layer, shard)
        assert Store(url).quarantined(layer, shard) == rows, "also in their order"
        tables = {of: pq.read_table(Path(both, f"embeddings/{of}/{name}/{shard}.parquet")) for of in teachers}
        whole, first = (dict(zip(table["key"].to_pylist(), decode(table), strict=True)) for table in tables.values())
        zeros = {key for key, value in whole.items() if not value[:, :4].any(axis=1).all()}
        assert {row["key"] for row in rows if row["reason"] == "zero_vector"} == zeros
        assert 0 < len(zeros) < 29
        assert {row["detail"] for row in rows} >= {"the numbers of a vector that first4 stores are all zero"}
        assert {key for key, value in first.items() if np.isnan(value).any()} == {str(row["key"]) for row in rows}
    assert {row["reason"] for row in rows} == {"zero_vector", "no_text"}
    for dataset in (both, url):
        assert validate(dataset).valid
