"""Patch features: stored, replayed with their crops, checked, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.codecs.codebooks import Place, find_codec, load
from reinforce.dataset.drop import drop, plan_drop
from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.recompute import recompute
from reinforce.errors import UserError
from reinforce.explore.report import inspect
from reinforce.publishing.labels import export_labels
from teachers.image_encoder import patches_of
from teachers.pixels import to_pixels
from teachers.registry import load_model
from tests.engine.worker.test_memory import limited
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.images import encode
from tests.helpers.models import tiny_models
from tests.helpers.models.patches import PatchTeacher
from tests.helpers.reinforced import reinforce_here, shard_process

pytest.importorskip("faiss")

MODEL = {"class": "tests.helpers.models.patches:PatchTeacher", "options": {"size": 16}}
CODECS = ("float16", "pca40", "pq24", "rq8")


@pytest.fixture(autouse=True, scope="module")
def small_samples() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reinforce.dataset.codecs.quantisers._LEAST_FOR_EACH", 1)
        find_codec.cache_clear()
        yield
    find_codec.cache_clear()


def config(
    folder: Path, output: Path | None = None, grid: Any = 4, model: Any = MODEL, sample: int = 400, **codecs: str
) -> dict[str, Any]:
    names = codecs or {name: name for name in CODECS}
    teachers = {n: {**model, "patches": {"grid": grid, "codec": codec, "sample": sample}} for n, codec in names.items()}
    changes = {"captioners": {}, "teachers": teachers, "augmentations": {"count": 2, "size": 16}}
    return config_of(f"{folder}/source/*.tar", output or folder / "out", **changes)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches")
    for number, size in enumerate((16, 9)):
        write_tar(folder / "source" / f"{number:05d}.tar", members_of(number, size))
    return Path(reinforce_here(config(folder)))


def test_the_grid_of_a_replayed_crop_is_the_stored_one_in_each_codec(stored: Path) -> None:
    teacher, books = PatchTeacher(torch.device("cpu"), size=16), {}
    for name in CODECS:
        layer = make_plan(parse_config(config(stored.parent))).layers[f"patches/{name}"]
        books[name] = load(layer.codebook_at(str(stored)))
    crops = operations = 0
    for sample in reinforce.open(str(stored)):
        for crop in range(2):
            image = torch.from_numpy(np.asarray(sample.augmented(crop)).copy())[None]
            with torch.inference_mode():
                patches = teacher.encode_patches(to_pixels(image, teacher.image))[0].numpy()
            for name, book in books.items():
                found = sample.values[f"patches/{name}"][crop]
                assert found.shape == (4, 4, 48)
                assert np.abs(found - book.decode(book.encode(patches))).mean() < 1e-3
            own = books["float16"].arrays
            expected = (patches - own["mean_of_channel"]) / own["deviation_of_channel"]
            assert np.abs(sample.values["patches/float16"][crop] - expected).max() < 1e-2
            crops += 1
            operations += len(sample.augmentations[crop].ops or ())
    assert (crops, operations) == (50, 100), "every crop has two random operations"


def test_patches_are_valid_equal_again_and_resumed_byte_for_byte(stored: Path, tmp_path: Path) -> None:
    assert validate(str(stored)).valid
    again = Path(reinforce_here(config(stored.parent, tmp_path / "again")))
    assert tree(again) == tree(stored)
    for path in (again / "patches" / "pq24").glob("00001*"):
        path.unlink()
    reinforce_here(config(stored.parent, again))
    assert tree(again) == tree(stored)
    assert not (again / "fitting").exists()
    found = recompute(parse_config(config(stored.parent)), str(stored), 4, pool=decode_pool())
    assert found.left_out == []
    compared = [found.layers[f"patches/{name}"] for name in CODECS]
    assert all(one.equal == one.rows > 0 for one in compared)


def test_a_training_example_picks_the_grid_of_its_crop(stored: Path) -> None:
    entries = json.loads((stored / "dataset.json").read_text())["layers"]
    for name in CODECS:
        layer, store = f"patches/{name}", Store(str(stored))
        kind = kind_of(layer)
        [target] = kind.target_tensors(entries[layer])
        with store.open_layer(layer, next(iter(store.shards(layer)))) as file:
            table = file.read()
        index = np.arange(len(table)) % 2
        picked = kind.pick(table, index)
        grids = np.stack(picked.arrays[0])
        assert (
            (grids.dtype.name, grids.shape[1:])
            == (target.dtype, target.shape)
            == ("float16", picked.arrays[0][0].shape)
        )
        decoded = [row[crop] for row, crop in zip(kind.decode(table), index, strict=True)]
        assert np.abs(grids - np.stack(decoded)).max() < 1e-2
        assert kind.compare(table, table).equal == len(table)


def test_patches_with_nan_are_null_and_in_the_quarantine(tmp_path: Path) -> None:
    members = members_of(0, 20)
    members[9] = (members[9][0], encode(Image.new("RGB", (40, 30)), "PNG"))
    write_tar(tmp_path / "source" / "0.tar", members)
    model = {**MODEL, "options": {"size": 16, "broken": True}}
    url = reinforce_here(config(tmp_path, model=model, red="pca8"))
    assert validate(url).valid
    shard = next(iter(Store(url).shards("patches/red")))
    rows = Store(url).quarantined("patches/red", shard)
    assert {row["reason"] for row in rows} == {"not_finite"}
    nulls = [sample.key for sample in reinforce.open(url) if sample.values["patches/red"] is None]
    assert nulls == [row["key"] for row in rows]
    assert "00000003" in nulls
    assert len(nulls) < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 5, "red": "float16"}, r"patches\.grid: \[5, 5\] in this config, and the model has 4 x 4 patches"),
        ({"grid": [2, 8], "red": "pq24"}, r"set grid: \[4, 4\]"),
        ({"red": "pq25"}, r"teachers\.red\.patches\.codec: .*48 numbers have no 25 equal parts; choose pq24"),
        ({"red": "pq24", "sample": 255}, r"teachers\.red\.patches\.codec: .* 256 .* has 255\..* as float16\."),
        ({"red": "first8"}, r"patches\.codec: first8"),
        ({"red": "int8"}, r"patches\.codec: int8: choose float16 or a codec with a codebook"),
        (
            {"red": "float16", "model": {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16}}},
            r"teachers\.red\.patches: ColorTeacher has no patches: add a method `encode_patches",
        ),
    ],
)
def test_a_teacher_without_such_patches_is_refused(
    stored: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        reinforce_here(config(stored.parent, tmp_path / "out", **changes))


def test_patches_that_do_not_fit_in_memory_are_computed_in_smaller_batches(stored: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(stored, tmp_path / "copied")
    before = tree(copied)
    shutil.rmtree(copied / "patches" / "pq24")
    shard = shard_process(config(stored.parent, copied))
    encoder = shard.models.encoder(kind_of("patches/pq24"), "pq24")
    shard.models._encoders["patches", "pq24"] = encoder._replace(encode=limited(encoder.encode, 4))
    result = shard.run()
    notes = [note.partition("now on ")[2] for note in result.notes if note.startswith("patches/pq24")]
    assert [note.partition(" at once")[0] for note in notes] == ["4 images", "2 images"]
    assert "patches/pq24: 8 images at once do not fit" in "".join(result.notes)
    after = tree(copied)
    assert all(before[name] == content for name, content in after.items())
    [missing] = before.keys() - after.keys()  # of the second shard
    assert missing.startswith("patches/pq24/")


def test_patches_of_a_transformer_of_open_clip_are_those_before_its_pooling(tmp_path: Path) -> None:
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 5))
    model = {"model": tiny_models.open_clip_model(tmp_path / "model"), "precision": "fp32"}
    url = reinforce_here(config(tmp_path, grid=4, model=model, vit="float16"))
    entry = json.loads(Path(url, "dataset.json").read_text())["layers"]["patches/vit"]
    assert (entry["grid"], entry["dim"], entry["count"]) == ([4, 4], 32, 2)
    spec = parse_config(config(tmp_path, grid=4, model=model, vit="float16")).teachers["vit"]
    encoder = patches_of(load_model("vit", spec, "cpu"), torch.device("cpu"))
    own = load(Place(url, "patches/vit", entry["codebook"]["digest"])).arrays
    for sample in reinforce.open(url):
        image = torch.from_numpy(np.asarray(sample.augmented(1)).copy())[None]
        with torch.inference_mode():
            patches = encoder.encode_patches(to_pixels(image, encoder.image))[0].numpy()
        expected = (patches - own["mean_of_channel"]) / own["deviation_of_channel"]
        assert np.abs(sample.values["patches/vit"][1] - expected).max() < 2e-2


def test_patches_are_published_with_their_codebooks_and_compared(stored: Path, tmp_path: Path) -> None:
    labels = export_labels(str(stored), str(tmp_path / "labels"), use_ray=False).output
    assert validate(labels).valid
    assert tree(Path(labels) / "codebooks") == tree(stored / "codebooks")
    assert "[2, 4, 4, 48] pq24, patches of augmented images" in Path(labels, "README.md").read_text()
    for layer in (f"patches/{name}" for name in CODECS):
        for shard in Store(str(stored)).shards(layer):
            with (
                Store(str(stored)).open_layer(layer, shard) as own,
                Store(labels).open_layer(layer, shard) as published,
            ):
                assert own.read().equals(published.read())
    inspect(str(stored), str(tmp_path / "report"), limit=4)
    assert (
        "4 × 4 × 48 rq8"
        in (tmp_path / "report" / "contents.html").read_text() + (tmp_path / "report" / "index.html").read_text()
    )
    drop(Store(labels), plan_drop(Store(labels), ["patches/*"]))
    assert not [name for name in tree(Path(labels)) if "patches" in name]
