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


def probes(train: dict[str, Any], test: dict[str, Any], k: int = 3) -> dict[str, Any]:
    parts = {"train": train, "test": test}
    return {"probes": {"set": {**parts, "k": [1, k], "l2": [0.01]}}}


def evaluate(model: Any, train: dict[str, Any], test: dict[str, Any], **config: Any) -> Result:
    return make_evaluator(**probes(train, test, **config)).evaluate(model, CPU)


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
    some = {**parts, "train": {"images": "a", "limit": 3}}
    config = parse(Evaluation, {"probes": {"a": {**parts, "l2": []}, "b": {**some, "k": []}, "c": {**some, "k": [2]}}})
    linear = ("top1", "top5", "mean_per_class")
    assert config.metrics == [
        *(f"probes/a/k{k}/top1" for k in (10, 20, 100, 200)),
        *(f"probes/b/linear/{score}" for score in linear),
        *("probes/c/k2/top1", *(f"probes/c/linear/{score}" for score in linear)),
    ]
    assert config.best_metric == "probes/a/k10/top1"
    assert (config.probes["a"].size, config.probes["b"].size) == (None, 8)
    assert config.shares(2) == [{"probes/a"}, {"probes/b", "probes/c"}]


def test_folders_shards_tables_and_views_are_parts_and_no_text_is_needed(root: Path, tmp_path: Path) -> None:
    folder, test = {"images": f"{root}/train"}, {"images": f"{root}/test"}
    images = [path.read_bytes() for path in sorted((root / "train").glob("*/*.png"))]
    table = write_huggingface(tmp_path / "train.parquet", images, {"label": [NAMES[n // 5] for n in range(30)]})
    dataset = reinforce_here(config_of(f"{root}/train.tar", tmp_path / "out", teachers={}, captioners={}))
    make_view(dataset, "key IS NOT NULL", name="all")
    shards = {"images": f"{root}/train.tar"}
    found = evaluate(HueEncoder(), folder, test)
    assert 0.5 < found.metrics["probes/set/k1/top1"] <= 1
    assert found.sets["probes/set"].images == 42
    assert found.sets["probes/set"].classes == 6
    for train in (
        {**shards, "label": "json:class"},
        {**shards, "classes": NAMES},
        {"images": table},
        {"images": dataset, "view": "all", "label": "json:class"},
    ):
        assert evaluate(HueEncoder(), train, test).metrics == pytest.approx(found.metrics)
    numbers = evaluate(ImageOracle(), shards, shards)
    assert {*numbers.metrics.values()} == {1.0}, "labels that are numbers need no names"
    assert evaluate(ConstantEncoder(), folder, test).metrics["probes/set/linear/top1"] == pytest.approx(1 / 6)


def test_parts_are_joined_by_name_and_repeated_names_in_their_order(tmp_path: Path) -> None:
    """ImageNet's list of names has `missile` twice."""
    classes = ["missile", "blue", "missile"]
    colours = ["red", "blue", "grey"] * 2
    samples = [(f"{n}", solid_image(name, n // 3), {"cls": str(n % 3)}) for n, name in enumerate(colours)]
    url = write_shard(tmp_path / "a.tar", samples)
    part = {"images": url, "classes": classes}
    assert evaluate(ImageOracle(), part, {**part, "limit": 3}, k=2).metrics["probes/set/k1/top1"] == 1
    found = evaluate(ImageOracle(), part, {**part, "limit": 3}, k=2).sets["probes/set"]
    assert found.classes == 3
    folders = tmp_path / "folders"
    (folders / "blue").mkdir(parents=True)
    (folders / "blue" / "x.png").write_bytes(solid_image("blue"))
    other = evaluate(ImageOracle(), {"images": url, "classes": ["unused", *classes[1:]]}, {"images": str(folders)}, k=2)
    assert other.metrics["probes/set/linear/top1"] == 1


def test_images_in_both_parts_are_counted_by_their_bytes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also in a second evaluation, whose images are cached."""
    sets = probes({"images": f"{root}/train"}, {"images": f"{root}/test"})
    evaluator = make_evaluator(**sets)
    for _ in range(2):
        found = evaluator.evaluate(ImageOracle(), CPU).sets["probes/set"]
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
    assert result.metrics["probes/set/k3/top1"] == 1, "a module that encodes images alone"
    assert caplog.messages[0] == "probes/set: 42 images; 6 test images of 12 also in the training part"


def test_not_finite_features_and_parts_that_shrink_fail_with_a_reason(root: Path, tmp_path: Path) -> None:
    folder, test = {"images": f"{root}/train"}, {"images": f"{root}/test"}
    result = evaluate(RedNanEncoder(), folder, test)
    assert result.metrics == {}
    assert result.failed["probes/set"].startswith("7 of 42 image embeddings are not finite")
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
        assert result.failed["probes/set"].startswith(message)
        assert result.sets["probes/set"].refused[0].key == "train/2"


@pytest.mark.parametrize(
    ("train", "test", "keys", "message"),
    [
        ("one", "one", {"k": [1], "l2": []}, "the training part has one class, 'red': give images of two classes"),
        ("one", "one", {"k": []}, "the training part has one class"),
        (
            "train",
            "test",
            {"l2": []},
            "k of 200 neighbours is above the 30 usable images of the training part: set",
        ),
        ("two", "two", {"k": []}, "no class of the training part has 5 usable images, of which one would be held"),
        ("two", "test", {"l2": [0.1]}, "4 of 6 classes of the test part have no usable image in"),
        ("train", "none", {}, "probes/set.test: "),
    ],
)
def test_faults_of_parts_are_one_line_before_a_model_is_loaded(
    root: Path, tmp_path: Path, train: str, test: str, keys: dict[str, Any], message: str
) -> None:
    for name, colours in (("one", ["red"]), ("two", ["red", "blue"])):
        for colour in colours:
            (tmp_path / name / colour).mkdir(parents=True)
            (tmp_path / name / colour / "a.png").write_bytes(solid_image(colour))
    places = {name: tmp_path if (tmp_path / name).exists() else root for name in (train, test)}
    parts = {"train": {"images": f"{places[train]}/{train}"}, "test": {"images": f"{places[test]}/{test}"}}
    with pytest.raises(UserError) as error:
        make_evaluator(probes={"set": {**parts, **keys}})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_keys_are_reported_with_their_place() -> None:
    parts = {"train": {"images": "a"}, "test": {"images": "b"}}
    for one, message in (
        ({"train": {"images": "x"}}, "probes.a.test: is required"),
        ({**parts, "k": [5, 5]}, "a number is there twice"),
        ({**parts, "k": [0]}, "probes.a.k.0"),
        ({**parts, "k": [], "l2": []}, "set numbers of `k`, or weights of `l2`, or both"),
        ({**parts, "templates": "x"}, "probes.a.templates: unknown key"),
    ):
        with pytest.raises(UserError) as error:
            parse(Evaluation, {"probes": {"a": one}})
        assert message in str(error.value)


def test_both_classifiers_learn_from_images_that_are_decoded_once_and_encoded_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gives what it gives alone, also where some images are broken."""
    holes = Path(shutil.copytree(root / "train", tmp_path / "train"))
    (holes / "red" / "0.png").write_bytes(b"no image")
    both = probes({"images": str(holes)}, {"images": f"{root}/test"})["probes"]["set"]
    alone = [
        make_evaluator(probes={"set": {**both, **without}}).evaluate(HueEncoder(), CPU)
        for without in ({"l2": []}, {"k": []})
    ]
    decoded = count_decoded(monkeypatch)
    encoded: list[int] = []

    class Counted(HueEncoder):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            encoded.append(len(pixels))
            return super().encode_images(pixels)

    evaluator, counted = make_evaluator(probes={"set": both}), Counted()
    assert evaluator.images == 42
    for passes in (1, 2):
        result = evaluator.evaluate(counted, CPU)
        assert (sum(encoded), len(decoded)) == (passes * 41, 42), "decoded images stay between evaluations"
        assert result.metrics == {name: score for one in alone for name, score in one.metrics.items()}
        line = "41 images; 1 refused: train/red/0.png (image_format); 5 test images of 12 also in the training part"
        assert {str(one.sets["probes/set"]) for one in (result, *alone)} == {line}


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
    sets = [item for part in parts for item in ("--set", f"probes.pets.{part}")]
    status, out, err = command(
        "evaluate", *teachers.values(), *sets, "--set", "probes.pets.k=[1, 5]", "--json", f"{tmp_path}/report.json"
    )
    assert status == 0, err
    assert "probes/pets: 42 images; 6 test images of 12 also in the training part" in out.replace("\n", " ")
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    assert models[teachers["class"]]["metrics"]["probes/pets/k5/top1"] == 1
    assert models[teachers["class"]]["metrics"]["probes/pets/linear/mean_per_class"] == 1
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
        (teachers["class"], "has no text side: evaluate it on sets of `probes` and `segmentation`"),
        (teachers["config"], "has no text side: evaluate it on sets of `probes` and `segmentation`"),
    ):
        status, out, err = command("evaluate", name, *zero_shot)
        assert status == 2, name
        assert message in err.replace("\n", " "), (name, err)
        assert "Traceback" not in out + err
    status, _, err = command("evaluate", teachers["class"], "--suite", "datacomp", "--data", str(root))
    assert status == 2
