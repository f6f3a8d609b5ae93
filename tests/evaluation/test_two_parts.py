"""Evaluation without texts: sets of nearest neighbours and linear probes, their parts, and the models they are for."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import EvaluatedModels
from reinforce.evaluation.report import Result
from reinforce.settings import parse
from teachers.protocols import ImageSpec
from tests.helpers.commands import Command
from tests.helpers.data import config_of
from tests.helpers.evaluation import (
    COLOURS,
    CPU,
    ColourOracle,
    ConstantEncoder,
    RedNanEncoder,
    count_decoded,
    make_evaluator,
    solid_image,
    write_colour_folder,
    write_colour_shard,
    write_shard,
)
from tests.helpers.models import tiny_models
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tables import write_huggingface
from tests.helpers.views import make_view

NAMES = list(COLOURS)


class ImageOracle:
    """Right about solid images, and without a text side."""

    image = ImageSpec(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    encode_images = ColourOracle.encode_images


class HueEncoder(ImageOracle):
    """The mean colour of an image: classes overlap."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(pixels.mean((2, 3)), dim=1)


def both(train: dict[str, Any], test: dict[str, Any], k: int = 3) -> dict[str, Any]:
    parts = {"train": train, "test": test}
    return {"knn": {"set": {**parts, "k": [1, k]}}, "linear": {"set": {**parts, "l2": [0.01]}}}


def evaluate(model: Any, train: dict[str, Any], test: dict[str, Any], **config: Any) -> Result:
    return make_evaluator(**both(train, test, **config)).evaluate(model, CPU)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training images and two others of each of six colours, as folders and as shards."""
    root = tmp_path_factory.mktemp("parts")
    write_colour_folder(root / "train", each=5)
    write_colour_folder(root / "test", each=2)
    for path in (root / "test").glob("*/*.png"):
        path.write_bytes(solid_image(path.parent.name, 5 * int(path.stem)))
    write_colour_shard(root / "train.tar", each=5)
    return root


def test_metrics_have_the_defaults_of_dino_and_the_names_of_the_sets() -> None:
    parts = {"train": {"images": "a"}, "test": {"images": "b", "limit": 5}}
    config = parse(Evaluation, {"knn": {"a": parts}, "linear": {"b": {**parts, "train": {"images": "a", "limit": 3}}}})
    assert config.metrics == [
        *(f"knn/a/k{k}/top1" for k in (10, 20, 100, 200)),
        *(f"linear/b/{score}" for score in ("top1", "top5", "mean_per_class")),
    ]
    assert config.best_metric == "knn/a/k10/top1"
    assert (config.knn["a"].size, config.linear["b"].size) == (None, 8)
    assert config.shares(2) == [{"knn/a"}, {"linear/b"}]


def test_folders_shards_tables_and_views_are_parts_and_no_text_is_needed(root: Path, tmp_path: Path) -> None:
    folder, test = {"images": f"{root}/train"}, {"images": f"{root}/test"}
    images = [path.read_bytes() for path in sorted((root / "train").glob("*/*.png"))]
    table = write_huggingface(tmp_path / "train.parquet", images, {"label": [NAMES[n // 5] for n in range(30)]})
    dataset = reinforce_here(config_of(f"{root}/train.tar", tmp_path / "out", teachers={}, captioners={}))
    make_view(dataset, "key IS NOT NULL", name="all")
    shards = {"images": f"{root}/train.tar"}
    found = evaluate(HueEncoder(), folder, test)
    assert 0.5 < found.metrics["knn/set/k1/top1"] <= 1
    assert found.sets["linear/set"].images == 42
    assert found.sets["linear/set"].classes == 6
    for train in (
        {**shards, "label": "json:class"},
        {**shards, "classes": NAMES},
        {"images": table},
        {"images": dataset, "view": "all", "label": "json:class"},
    ):
        assert evaluate(HueEncoder(), train, test).metrics == pytest.approx(found.metrics)
    numbers = evaluate(ImageOracle(), shards, shards)
    assert {*numbers.metrics.values()} == {1.0}, "labels that are numbers need no names"
    assert evaluate(ConstantEncoder(), folder, test).metrics["linear/set/top1"] == pytest.approx(1 / 6)


def test_parts_are_joined_by_name_and_repeated_names_in_their_order(tmp_path: Path) -> None:
    """ImageNet's list of names has `missile` twice."""
    classes = ["missile", "blue", "missile"]
    colours = ["red", "blue", "grey"] * 2
    samples = [(f"{n}", solid_image(name, n // 3), {"cls": str(n % 3)}) for n, name in enumerate(colours)]
    url = write_shard(tmp_path / "a.tar", samples)
    part = {"images": url, "classes": classes}
    assert evaluate(ImageOracle(), part, {**part, "limit": 3}, k=2).metrics["knn/set/k1/top1"] == 1
    found = evaluate(ImageOracle(), part, {**part, "limit": 3}, k=2).sets["knn/set"]
    assert found.classes == 3
    folders = tmp_path / "folders"
    (folders / "blue").mkdir(parents=True)
    (folders / "blue" / "x.png").write_bytes(solid_image("blue"))
    other = evaluate(ImageOracle(), {"images": url, "classes": ["unused", *classes[1:]]}, {"images": str(folders)}, k=2)
    assert other.metrics["linear/set/top1"] == 1


def test_images_in_both_parts_are_counted_by_their_bytes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also in a second evaluation, whose images are cached."""
    sets = both({"images": f"{root}/train"}, {"images": f"{root}/test"})
    evaluator = make_evaluator(**sets)
    for _ in range(2):
        found = evaluator.evaluate(ImageOracle(), CPU).sets["knn/set"]
        assert str(found) == "42 images; 6 test images of 12 also in the training part"
        assert found.as_json()["note"] == "6 test images of 12 also in the training part"

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.scale * ImageOracle().encode_images(pixels)

    with caplog.at_level(logging.WARNING, "reinforce.evaluation"):
        result = evaluator.evaluate_module(Tower(), ImageOracle.image, None, CPU)
    assert result.metrics["knn/set/k3/top1"] == 1, "a module that encodes images alone"
    assert caplog.messages[0] == "knn/set: 42 images; 6 test images of 12 also in the training part"


def test_not_finite_features_and_parts_that_shrink_fail_with_a_reason(root: Path, tmp_path: Path) -> None:
    folder, test = {"images": f"{root}/train"}, {"images": f"{root}/test"}
    result = evaluate(RedNanEncoder(), folder, test)
    assert result.metrics == {}
    assert result.failed["knn/set"].startswith("7 of 42 image embeddings are not finite")
    two = [("0", solid_image("red"), {"cls": "red"}), ("1", solid_image("blue"), {"cls": "blue"})]
    grey = [("3", solid_image("grey"), {"cls": "grey"})]
    broken = [("2", b"no image", {"cls": "grey"})]
    holes = write_shard(tmp_path / "a.tar", [*two, *broken])
    for tests, message in (
        (two, "k of 3 neighbours is above the 2 usable images of the training part"),
        (grey, "1 of 1 classes of the test part have no usable image in the training part, such as 'grey'"),
        (broken, "the test part has no usable image"),
    ):
        result = evaluate(ImageOracle(), {"images": holes}, {"images": write_shard(tmp_path / "b.tar", tests)})
        assert result.failed["knn/set"].startswith(message)
        assert result.sets["knn/set"].refused[0].key == "train/2"


@pytest.mark.parametrize(
    ("section", "train", "test", "keys", "message"),
    [
        ("knn", "one", "one", {"k": [1]}, "the training part has one class, 'red': give images of two classes"),
        ("linear", "one", "one", {}, "the training part has one class"),
        ("knn", "train", "test", {}, "k of 200 neighbours is above the 30 usable images of the training part: set `k`"),
        ("linear", "two", "two", {}, "no class of the training part has 5 usable images, of which one would be held"),
        ("linear", "two", "test", {"l2": [0.1]}, "4 of 6 classes of the test part have no usable image in"),
        ("knn", "train", "none", {}, "knn/set.test: "),
    ],
)
def test_faults_of_parts_are_one_line_before_a_model_is_loaded(
    root: Path, tmp_path: Path, section: str, train: str, test: str, keys: dict[str, Any], message: str
) -> None:
    for name, colours in (("one", ["red"]), ("two", ["red", "blue"])):
        for colour in colours:
            (tmp_path / name / colour).mkdir(parents=True)
            (tmp_path / name / colour / "a.png").write_bytes(solid_image(colour))
    places = {name: tmp_path if (tmp_path / name).exists() else root for name in (train, test)}
    parts = {"train": {"images": f"{places[train]}/{train}"}, "test": {"images": f"{places[test]}/{test}"}}
    with pytest.raises(UserError) as error:
        make_evaluator(**{section: {"set": {**parts, **keys}}})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_keys_are_reported_with_their_place() -> None:
    parts = {"train": {"images": "a"}, "test": {"images": "b"}}
    for keys, message in (
        ({"knn": {"a": {"train": {"images": "x"}}}}, "knn.a.test: is required"),
        ({"knn": {"a": {**parts, "k": [5, 5]}}}, "a number is there twice"),
        ({"knn": {"a": {**parts, "k": [0]}}}, "knn.a.k.0"),
        ({"linear": {"a": {**parts, "l2": []}}}, "linear.a.l2"),
        ({"linear": {"a": {**parts, "templates": "x"}}}, "linear.a.templates: unknown key"),
    ):
        with pytest.raises(UserError) as error:
            parse(Evaluation, keys)
        assert message in str(error.value)


def test_equal_parts_are_decoded_and_encoded_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some are broken, and although sets of other parts are between them in the config."""
    holes = Path(shutil.copytree(root / "train", tmp_path / "train"))
    (holes / "red" / "0.png").write_bytes(b"no image")
    of_all = both({"images": str(holes)}, {"images": f"{root}/test"})
    of_some = both({"images": str(holes)}, {"images": f"{root}/test", "limit": 6})
    sets: dict[str, dict[str, Any]] = {
        section: {"all": of_all[section]["set"], "some": of_some[section]["set"]} for section in ("knn", "linear")
    }
    alone = {
        f"{section}/{name}": make_evaluator(**{section: {name: one}}).evaluate(HueEncoder(), CPU)
        for section, named in sets.items()
        for name, one in named.items()
    }
    decoded, encode_all = count_decoded(monkeypatch), EvaluatedModels.encode_all
    encoded: list[int] = []
    kept: list[int] = []

    class Counted(HueEncoder):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            encoded.append(len(pixels))
            return super().encode_images(pixels)

    def record_kept(models: EvaluatedModels, *args: Any) -> Any:
        kept.append(len(models.kept))
        return encode_all(models, *args)

    monkeypatch.setattr(EvaluatedModels, "encode_all", record_kept)
    evaluator, counted = make_evaluator(**sets), Counted()
    assert evaluator.images == 42 + 36
    for passes in (1, 2):
        result = evaluator.evaluate(counted, CPU)
        assert (sum(encoded), len(decoded)) == (passes * (41 + 35), 42 + 36), "decoded images stay between evaluations"
        assert result.metrics == {name: score for one in alone.values() for name, score in one.metrics.items()}
        assert [*result.sets.items()] == [item for one in alone.values() for item in one.sets.items()]
    assert kept == [0, 1] * 4, "vectors are kept until the last set of their images"
    assert evaluator.config.shares(2) == [{"knn/all", "linear/all"}, {"knn/some", "linear/some"}]


@pytest.fixture
def teachers(tmp_path: Path) -> dict[str, str]:
    """Names of image-only and other teachers on the command line."""
    folder = tiny_models.transformers_dinov2(tmp_path / "dinov2")
    colour = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}}
    stored = {"family": "published", "model": "x", "columns": [0, 768], "logit_scale": 1.0}
    bert = {"family": "transformers", "model": tiny_models.transformers_bert(tmp_path / "bert")}
    entries = {
        "a.b": colour,
        "stored": stored,
        "bert": bert,
        "dino": {"family": "transformers", "model": folder, "pooling": "cls"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"source": "x", "output": "y", "teachers": entries}))
    return {
        "family": f"transformers:{folder}",
        "class": "class:tests.evaluation.test_two_parts:LoadedOracle",
        "config": f"{tmp_path}/run.yaml:dino",
        "options": f"{tmp_path}/run.yaml:a.b",
    }


class LoadedOracle(ImageOracle):
    """A class of a user's."""

    dim = len(COLOURS)

    def __init__(self, device: torch.device) -> None:
        pass


def test_any_teacher_is_evaluated_by_name(
    command: Command, root: Path, teachers: dict[str, str], tmp_path: Path
) -> None:
    parts = [f"{part}.images={root}/{part}" for part in ("train", "test")]
    sets = [item for section in ("knn", "linear") for part in parts for item in ("--set", f"{section}.pets.{part}")]
    status, out, err = command(
        "evaluate", *teachers.values(), *sets, "--set", "knn.pets.k=[1, 5]", "--json", f"{tmp_path}/report.json"
    )
    assert status == 0, err
    assert "knn/pets: 42 images; 6 test images of 12 also in the training part" in out.replace("\n", " ")
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    assert models[teachers["class"]]["metrics"]["knn/pets/k5/top1"] == 1
    assert models[teachers["class"]]["metrics"]["linear/pets/mean_per_class"] == 1
    assert all(len(of_model["metrics"]) == 5 for of_model in models.values())


def test_faults_of_names_are_one_message(command: Command, root: Path, teachers: dict[str, str]) -> None:
    config = teachers["config"].rpartition(":")[0]
    zero_shot = ("--zero-shot", f"a={root}/test")
    for name, message in (
        (f"{config}:dion", "has no teacher 'dion'; it has a.b, bert, dino, stored."),
        ("class:tests.nowhere:Oracle", "class tests.nowhere:Oracle cannot be imported"),
        (f"{config}:stored", "outputs are stored, not computed"),
        ("transformers:", "transformers:"),
        (f"{config}:bert", "it has no image side; evaluate a model that encodes images"),
        (teachers["class"], "has no text side: evaluate it on sets of `knn`, `linear` and `segmentation`"),
        (teachers["config"], "has no text side: evaluate it on sets of `knn`, `linear` and `segmentation`"),
    ):
        status, out, err = command("evaluate", name, *zero_shot)
        assert status == 2, name
        assert message in err.replace("\n", " "), (name, err)
        assert "Traceback" not in out + err
    status, _, err = command("evaluate", teachers["class"], "--suite", "datacomp", "--data", str(root))
    assert status == 2
