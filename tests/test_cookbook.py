"""The recipes of docs/cookbook.md do what they say, on a small dataset that is made in this process."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import reinforce
from reinforce.dataset.validate.validate import validate
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.pages import blocks
from tests.helpers.reinforced import reinforce_here
from tests.helpers.views import make_view

PAGE = "docs/cookbook.md"
COLOUR = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}, "logit_scale": 50.0}
NAMER = {"class": "tests.helpers.models:SeedCaptioner", "captions": 2}
KEPT = 8  # samples of the view
RECIPES = [block for block in blocks(PAGE, "yaml") if block.file == "my.yaml"]


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    teachers = {"conv-64": COLOUR, "tiny": {**COLOUR, "options": {"size": 24, "dim": 12, "seed": 1}}}
    changes = {"teachers": teachers, "captioners": {"coca": NAMER}, **changes}
    return config_of(f"{folder}/source/*.tar", folder / "my-data", **changes)


def small(key: str, value: Any) -> Any:
    """A section of a recipe with small models in place of the named ones; what else it says of them stays."""
    if key == "teachers":
        return {name: {**COLOUR, "dtype": spec.get("dtype", "float16")} for name, spec in value.items()}
    return {name: {**NAMER, "captions": 2} for name in value} if key == "captioners" else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset ``my-data``, whose second shard has a sample that is refused."""
    folder = tmp_path_factory.mktemp("cookbook")
    for shard in range(2):
        broken = [(f"{shard:03d}99999.png", b"no image"), (f"{shard:03d}99999.txt", b"none")] * shard
        write_tar(folder / "source" / f"{shard:05d}.tar", [*members_of(shard, 6), *broken])
    url = reinforce_here(config(folder))
    make_view(url, {"sample": KEPT}, name="best")
    return folder


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """The names that the Python of the page leaves."""
    scope: dict[str, Any] = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(PAGE, "python"):
            exec(compile("\n" * (block.line - 1) + block.text, PAGE, "exec"), scope)
    return scope


def test_the_best_caption_is_a_true_or_a_synthetic_one(names: dict[str, Any]) -> None:
    for sample in names["samples"]:
        assert names["captions"][sample.key] in [sample.caption, *sample.captions["coca"]]


def test_filtered_samples_are_tars_that_a_run_reads(folder: Path, names: dict[str, Any]) -> None:
    with tarfile.open(folder / "filtered.tar") as tar:
        keys = {name.partition(".")[0] for name in tar.getnames()}
    assert keys == {sample.key for sample in reinforce.open(str(folder / "my-data"), view="best")}
    assert len(keys) == KEPT
    again = reinforce_here({**config(folder), "source": f"{folder}/filtered.tar", "output": f"{folder}/filtered"})
    assert {sample.key for sample in reinforce.open(again)} == keys


def test_a_copied_dataset_is_valid_and_complete(folder: Path, names: dict[str, Any]) -> None:
    assert len(names["moved"]) == len(names["data"]) == 12
    assert validate(f"{folder}/moved-data").valid


def test_the_quarantine_is_counted_and_nothing_else_lacks_a_vector(names: dict[str, Any]) -> None:
    assert names["refused"] == {("samples", "image_format"): 1}
    assert names["incomplete"] == []


def test_layers_are_joined_and_read_without_this_project(names: dict[str, Any]) -> None:
    synthetic = {sample.key: sample.captions["coca"][0] for sample in names["samples"]}
    assert {key: text for key, _, text in names["longest"]} == synthetic
    stored = {sample.key: sample.images["conv-64"] for sample in names["samples"]}
    for key, vectors in zip(names["keys"], names["images"], strict=True):
        np.testing.assert_array_equal(vectors.astype(np.float32), stored[key])
    assert (names["crop"].size, names["large"].size) == ((24, 24), (96, 96))


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_a_config_makes_the_layers_that_its_recipe_promises(block: Any, tmp_path: Path) -> None:
    write_tar(tmp_path / "source/00000.tar", members_of(0, 3))
    shown = yaml.safe_load(block.text)
    recipe = config(tmp_path, **{key: small(key, value) for key, value in shown.items()})
    data = reinforce.open(reinforce_here(recipe), images_from=[f"{tmp_path}/source"])
    assert [*data.teachers] == [*recipe["teachers"]]
    assert [*data.captioners] == [*recipe["captioners"]]
    sample = next(iter(data))
    assert len(sample.augmentations) == recipe["augmentations"]["count"]
    assert data.manifest["images"] == shown.get("images", "embed")


def test_there_are_twenty_recipes() -> None:
    titles = [line for line in (Path(__file__).parents[1] / PAGE).read_text().splitlines() if line.startswith("### ")]
    assert len(titles) >= 20
