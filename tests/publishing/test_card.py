"""The card of a dataset: Hugging Face's ``datasets`` reads every layer by it, and data cannot change its form."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

import reinforce
from reinforce.cli import main
from reinforce.dataset.drop import drop, plan_drop
from reinforce.dataset.store import MANIFEST, Store
from reinforce.errors import UserError
from reinforce.publishing.card import MARK, markdown, write_card
from tests.helpers.data import config_of
from tests.helpers.reinforced import manifest_to_change, small_dataset
from tests.helpers.views import make_view

TEACHERS = {
    **config_of("", "")["teachers"],
    "small": {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 4}, "codec": "int8"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_dataset(tmp_path_factory.mktemp("card"), (5, 3), teachers=TEACHERS)


@pytest.fixture(scope="module")
def card(dataset: str) -> dict[str, Any]:
    """The front matter of the dataset's card."""
    with pytest.raises(SystemExit) as ended:
        main(["publish", "card", dataset, "--license", "cc-by-4.0"])
    assert not ended.value.code
    return front_matter(Path(dataset, "README.md"))


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def front_matter(path: Path) -> dict[str, Any]:
    found = re.match(r"---\n(.*?\n)---\n", path.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    loaded: dict[str, Any] = yaml.safe_load(found[1])
    return loaded


def load(dataset: str, layer: str, tmp_path: Path, **options: Any) -> Any:
    return datasets.load_dataset(dataset, layer, split="train", cache_dir=str(tmp_path / "cache"), **options)


def test_views_that_are_current_are_configurations(dataset: str, tmp_path: Path) -> None:
    url = str(shutil.copytree(dataset, tmp_path / "out"))
    for name, where in (("some", "key LIKE '%1'"), ("stale", "captions.namer[1] IS NOT NULL")):
        make_view(url, where, name=name)
    drop(Store(url), plan_drop(Store(url), ["captions/*", "embeddings/*"]))
    write_card(url, force=True)
    card = front_matter(Path(url, "README.md"))
    assert [one["config_name"] for one in card["configs"]] == ["samples", "views--some"]
    rows = load(url, "views--some", tmp_path)
    assert [row["key"] for row in rows if row["left_out"] is None] == [s.key for s in reinforce.open(url, view="some")]
    assert "| `views--some` | 2 | " in Path(url, "README.md").read_text()


def test_datasets_reads_every_layer(dataset: str, card: dict[str, Any], tmp_path: Path) -> None:
    layers = [name.replace("/", "--") for name in reinforce.open(dataset).manifest["layers"]]
    assert [one["config_name"] for one in card["configs"]] == layers
    read = {layer: list(load(dataset, layer, tmp_path, streaming=True)) for layer in layers}
    whole = {layer: list(load(dataset, layer, tmp_path)) for layer in layers if layer != "samples"}
    assert whole == {layer: rows for layer, rows in read.items() if layer != "samples"}
    for number, sample in enumerate(reinforce.open(dataset)):
        row = read["samples"][number]
        assert isinstance(row["image"], Image.Image)
        assert row["image"].convert("RGB").tobytes() == sample.pil().tobytes()
        assert (row["key"], row["caption"], row["width"]) == (sample.key, sample.caption, sample.width)
        records = [(one["crop"], [(op["name"], op["magnitude"]) for op in one["ops"]]) for one in row["augmentations"]]
        assert records == [
            (vars(one.crop), [(op.name, op.magnitude) for op in one.ops or ()]) for one in sample.augmentations
        ]
        assert read["captions--namer"][number]["captions"] == sample.captions["namer"]
        for teacher in ("red", "blue", "small"):
            stored = read[f"embeddings--{teacher}--images"][number]
            vectors = np.array(stored["embeddings"], np.float32).reshape(sample.images[teacher].shape)
            vectors *= np.array(stored.get("scales", [1, 1]), np.float32)[:, None]
            np.testing.assert_array_equal(vectors, sample.images[teacher])
            assert {layer["key"] for layer in (stored, read[f"embeddings--{teacher}--namer"][number])} == {sample.key}


def test_the_card_has_sizes_licence_teachers_and_captioners(dataset: str, card: dict[str, Any]) -> None:
    assert (card["license"], card["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    infos = {one["config_name"]: one for one in card["dataset_info"]}
    size = sum(path.stat().st_size for path in Path(dataset, "samples").iterdir())
    assert infos["samples"]["splits"] == [{"name": "train", "num_bytes": size, "num_examples": 8}]
    assert {"name": "image", "dtype": "image"} in infos["samples"]["features"]
    assert {"name": "embeddings", "list": "float16", "length": 16} in infos["embeddings--red--images"]["features"]
    text = Path(dataset, "README.md").read_text()
    for shown in ("## Teachers", r"tests\.helpers\.models\:ColorTeacher", "| 50 |", r"SeedCaptioner", "load_dataset("):
        assert shown in text


def test_references_are_read_as_structs(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path, (3,), images="reference")
    assert write_card(dataset, f"{tmp_path}/elsewhere") == f"{tmp_path}/elsewhere/README.md"
    assert not Path(dataset, "README.md").exists()
    write_card(dataset)
    rows = list(load(dataset, "samples", tmp_path, streaming=True))
    assert [row["image_ref"]["url"] for row in rows] == [f"{tmp_path}/source/00000.tar"] * 3
    assert all(isinstance(row["image_digest"], int) for row in rows)


def test_what_comes_from_data_is_escaped(tmp_path: Path) -> None:
    hostile = "x\n---\nlicense: mit\n| a | <script>alert(1)</script> [b](http://c) `d` \x1b[31m"
    dataset = small_dataset(tmp_path, (3,))
    store = Store(dataset)
    manifest = manifest_to_change(dataset)
    manifest["teachers"]["red"]["model"] = {"class": hostile}
    manifest["captioners"]["namer"]["model"] = hostile
    manifest["policies"]["image"] = hostile
    store.write_json(manifest, MANIFEST)
    write_card(dataset, licence=hostile)
    text = Path(dataset, "README.md").read_text(encoding="utf-8")
    assert front_matter(Path(dataset, "README.md"))["license"].startswith("x --- license: mit | a |")
    page = text.partition(MARK)[2]
    assert text.count("\n---\n") == 1, "the front matter ends once"
    for tag in ("<script", "[b]", "`d`", "\x1b", "\n| a |", "http://"):
        assert tag not in page
    assert page.count("&lt;script&gt;") == 4
    assert len(markdown("x" * 999)) == 203, "long texts are cut"
    assert len({line.count(" | ") for line in page.splitlines() if line.startswith("| red")}) == 1


def test_a_readme_of_somebody_else_is_kept(dataset: str, card: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README.md was not written by this command. --force replaces it"):
        write_card(dataset, str(tmp_path))
    write_card(dataset, str(tmp_path), force=True)
    write_card(dataset, str(tmp_path))  # its own is replaced
    assert front_matter(tmp_path / "README.md")["license"] == "unknown"
