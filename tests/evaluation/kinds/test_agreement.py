"""Agreement of models with the teachers of a reinforced dataset: nearest neighbours and explained variance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import reinforce
from reinforce.dataset.sample import Sample
from reinforce.dataset.store import MANIFEST
from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.evaluator import Evaluator
from reinforce.evaluation.kinds.agreement import RIDGE
from reinforce.evaluation.report import Result
from reinforce.settings import parse
from reinforce.student.train import StudentTask
from teachers.pixels import to_pixels
from tests.helpers.commands import Command
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.evaluation import CPU, make_evaluator
from tests.helpers.models import ColorTeacher
from tests.helpers.reinforced import manifest_to_change, reinforce_here, rewrite
from tests.helpers.students import student_config

SIZES, K = (60, 36), 4
SCORES = ("knn", "variance")
#: Of the size of the recorded crops, so that their vectors of these are those that are stored.
TEACHERS: dict[str, dict[str, Any]] = {
    "red": {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}, "codec": "float32"},
    "blue": {
        "class": "tests.helpers.models:ColorTeacher",
        "options": {"size": 16, "dim": 12, "seed": 1},
        "codec": "int8",
    },
}
PARTIAL = {"class": "tests.helpers.models.partial:Partial", "options": {"nulls": "nan"}}


def make(folder: Path, sizes: tuple[int, ...] = SIZES, **changes: Any) -> str:
    """A dataset whose images are decoded at half their size, and augmented by another backend than usual."""
    for number, size in enumerate(sizes):
        members = members_of(number, size, width=80, height=60, format_="JPEG")
        write_tar(folder / "source" / f"{number:05d}.tar", members)
    augmentations = {"count": 2, "size": 16, "backend": "fixed-point-1"}
    keys: dict[str, Any] = {"teachers": TEACHERS, "captioners": {}, "input": {"reduce_to": 24}}
    keys |= {"augmentations": augmentations, **changes}
    return reinforce_here(config_of(f"{folder}/source/*.tar", folder / "out", **keys))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("agreement"))


@pytest.fixture(scope="module")
def holes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a quarter of the rows, one teacher has no vectors."""
    return make(tmp_path_factory.mktemp("holes"), teachers={**TEACHERS, "partial": PARTIAL})


def sets(dataset: str, **keys: Any) -> dict[str, Any]:
    return {"agreement": {"set": {"dataset": dataset, "k": K, **keys}}}


def evaluate(model: Any, dataset: str, **keys: Any) -> Result:
    return make_evaluator(**sets(dataset, **keys)).evaluate(model, CPU)


def teacher(name: str) -> ColorTeacher:
    return ColorTeacher(torch.device("cpu"), **TEACHERS[name]["options"])


class Random(ColorTeacher):
    """Gives vectors that do not depend on the image."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(len(pixels), self.dim), dim=1)


class Both(ColorTeacher):
    """The vectors of both teachers side by side, of which those of the second have so much length."""

    def __init__(self, share: float) -> None:
        super().__init__(torch.device("cpu"))
        self.parts, self.share = [teacher("red"), teacher("blue")], share

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        first, second = (part.encode_images(pixels) for part in self.parts)
        return torch.nn.functional.normalize(torch.cat([first, self.share * second], 1), dim=1)


def encode(model: ColorTeacher, samples: list[Sample]) -> np.ndarray:
    """The vectors of a model of the first crops, replayed at its size, float64 [N, D]."""
    crops = [np.asarray(sample.augmented(0, model.image.height)) for sample in samples]
    pixels = to_pixels(torch.from_numpy(np.stack(crops)), model.image)
    return model.encode_images(pixels).double().numpy()


def expected(features: np.ndarray, samples: list[Sample], name: str) -> tuple[float, float]:
    """Both metrics by definition; the regression is solved by the products of rows."""
    stored = np.stack([sample.images[name][0] for sample in samples]).astype(float)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    shares = []
    for row in range(len(samples)):
        near = [[n for n in np.argsort(-(rows @ rows[row])) if n != row][:K] for rows in (features, stored)]
        shares.append(len({*near[0]} & {*near[1]}) / K)
    explained = []
    for first in (0, 1):
        fitted = np.arange(len(samples)) % 2 == first
        x, y = features - features[fitted].mean(0), stored - stored[fitted].mean(0)
        products = x[fitted] @ x[fitted].T
        ridge = RIDGE * np.trace(products) / len(products)
        predicted = x[~fitted] @ x[fitted].T @ np.linalg.solve(products + ridge * np.eye(len(products)), y[fitted])
        explained.append(1 - ((y[~fitted] - predicted) ** 2).sum() / (y[~fitted] ** 2).sum())
    return float(np.mean(shares)), float(np.mean(explained))


def test_metrics_equal_a_plain_computation_on_the_replayed_crops_of_all_codecs(dataset: str) -> None:
    """Also for a model with more dimensions than there are rows to fit."""
    samples = [*reinforce.open(dataset)]
    for model in (ColorTeacher(torch.device("cpu"), size=24, dim=200, seed=5), Both(0.5)):
        found = evaluate(model, dataset)
        assert str(found.sets["agreement/set"]) == f"{sum(SIZES)} images"
        by_hand = {name: expected(encode(model, samples), samples, name) for name in TEACHERS}
        assert all(0.1 < score < 0.999 for scores in by_hand.values() for score in scores)
        for number, score in enumerate(SCORES):
            of_teachers = [scores[number] for scores in by_hand.values()]
            both = {"mean": np.mean(of_teachers), "lowest": min(of_teachers)}
            wanted = both | {name: scores[number] for name, scores in by_hand.items()}
            assert {name: found.metrics[f"agreement/set/{name}/{score}"] for name in wanted} == pytest.approx(wanted)


def test_a_teacher_agrees_with_itself_and_random_vectors_with_none(dataset: str) -> None:
    itself = evaluate(teacher("red"), dataset).metrics
    assert itself["agreement/set/red/knn"] == 1
    assert itself["agreement/set/red/variance"] > 0.99
    torch.manual_seed(0)
    chance = K / (sum(SIZES) - 1)
    for dim in (6, 300):
        found = evaluate(Random(torch.device("cpu"), dim=dim), dataset).metrics
        for name in TEACHERS:
            assert found[f"agreement/set/{name}/knn"] == pytest.approx(chance, abs=0.04)
            assert 0 <= found[f"agreement/set/{name}/variance"] < 0.1


def test_a_starved_teacher_is_seen_in_the_lowest_and_less_in_the_mean(dataset: str) -> None:
    starved, balanced = (evaluate(Both(share), dataset).metrics for share in (0.05, 1.0))
    for score in SCORES:
        assert starved[f"agreement/set/red/{score}"] > balanced[f"agreement/set/red/{score}"]
        lost = {
            name: balanced[f"agreement/set/{name}/{score}"] - starved[f"agreement/set/{name}/{score}"]
            for name in ("mean", "lowest", "blue")
        }
        assert lost["lowest"] > 0
        assert lost["lowest"] > lost["mean"]
        assert starved[f"agreement/set/lowest/{score}"] == starved[f"agreement/set/blue/{score}"]


def test_rows_without_a_vector_or_an_image_are_left_out_and_counted(holes: str, tmp_path: Path) -> None:
    samples = [*reinforce.open(holes)]
    null = {sample.key for sample in samples if not np.isfinite(sample.images["partial"]).all()}
    assert 5 < len(null) < len(samples) / 2
    assert evaluate(teacher("red"), holes, teachers=["red", "blue"]).sets["agreement/set"].images == len(samples)
    model = Both(0.5)
    found = evaluate(model, holes)
    outcome = found.sets["agreement/set"]
    assert {(refusal.key, refusal.reason.value) for refusal in outcome.refused} == {(key, "not_finite") for key in null}
    assert outcome.part == f"{len(samples) - len(null)} of {len(samples)} images"
    rest = [sample for sample in samples if sample.key not in null]
    for name in TEACHERS:
        metrics = [found.metrics[f"agreement/set/{name}/{score}"] for score in SCORES]
        assert metrics == pytest.approx(expected(encode(model, rest), rest, name))

    url = make(tmp_path)
    shutil.rmtree(Path(url, "embeddings", "red", "caption"))  # which is not read
    spoil_images(url, 1)
    change_vectors(url, lambda numbers: numbers * (np.arange(len(numbers)) != 2)[:, None].astype(numbers.dtype))
    reasons = [refusal.reason.value for refusal in evaluate(model, url).sets["agreement/set"].refused]
    assert reasons == ["image_format", "zero_vector", "image_format"]


def spoil_images(dataset: str, count: int) -> None:
    """Replace the first images of each shard by bytes that are none."""

    def change(table: pa.Table) -> pa.Table:
        images = [*[b"no image"] * count, *table["image"].to_pylist()[count:]]
        place = table.schema.get_field_index("image")
        return table.set_column(place, table.schema.field(place), pa.array(images))

    for path in Path(dataset, "samples").glob("*.parquet"):
        rewrite(path, change)


def change_vectors(dataset: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the vectors [rows, numbers] of the teacher red in the first shard."""

    def changed(table: pa.Table) -> pa.Table:
        column = table["embeddings"].combine_chunks()
        numbers = change(column.storage.values.to_numpy().copy().reshape(len(table), -1))
        lists = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), numbers.shape[1])
        return table.set_column(1, table.schema.field(1), pa.ExtensionArray.from_storage(column.type, lists))

    rewrite(next(Path(dataset, "embeddings", "red", "images").glob("00000*.parquet")), changed)


def test_a_training_reports_all_metrics_and_chooses_by_one_and_ranks_share_sets(dataset: str, tmp_path: Path) -> None:
    keys = {"best": "agreement/set/lowest/knn", "every": 1, **sets(dataset, limit=40)}
    config = student_config(tmp_path, dataset, evaluate=keys)
    names = [f"agreement/set/{name}/{score}" for name in ("mean", "lowest", *TEACHERS) for score in SCORES]
    assert config.evaluate.metrics == names
    results = reinforce.train(config)
    assert [*results.metrics] == names
    assert results.best is not None
    assert results.best.metric == "agreement/set/lowest/knn"
    assert all(value is not None and 0 <= value <= 1 for value in results.metrics.values())

    two = sets(dataset, limit=40)["agreement"]
    evaluation = parse(Evaluation, {"agreement": {**two, "other": {**two["set"], "teachers": "red", "limit": 30}}})
    shares = evaluation.shares(2)
    assert shares == [{"agreement/set"}, {"agreement/other"}]
    task = StudentTask(config)
    parts = [Evaluator(evaluation, share).evaluate_module(*module_of(task)).metrics for share in shares]
    whole = Evaluator(evaluation).evaluate_module(*module_of(task)).metrics
    assert evaluation.combine(parts) == whole
    assert [*whole] == evaluation.metrics


def module_of(task: StudentTask) -> tuple[Any, ...]:
    return task.model.clip, task.model.image, task.tokenizer, CPU


def test_the_command_prints_each_teacher_for_each_model(dataset: str, command: Command) -> None:
    model = "class:tests.helpers.models:ColorTeacher"
    keys = [f"dataset={dataset}", f"k={K}", "teachers=r*", "limit=30"]
    status, out, _ = command("evaluate", model, *(word for key in keys for word in ("--set", f"agreement.set.{key}")))
    assert status == 0
    assert ["agreement/set/red/knn", "100.00"] in [line.split() for line in out.splitlines()]
    assert "agreement/set: 30 images" in out
    assert "blue" not in out


def test_faults_are_one_line_before_a_model_is_loaded(dataset: str, holes: str, tmp_path: Path) -> None:
    texts = {"class": "tests.helpers.models:TextOnly"}
    mixed = make(tmp_path / "texts", (12,), teachers={"red": TEACHERS["red"], "ears": texts, "eyes": TEACHERS["blue"]})
    assert parse(Evaluation, sets(mixed)).agreement["set"].names == ["red", "eyes"]
    lowest = make(tmp_path / "lowest", (12,), teachers={"lowest": TEACHERS["red"]})
    only = make(tmp_path / "only", (12,), teachers={"ears": texts})
    reference = make(tmp_path / "reference", (12,), images="reference")
    labels = make(tmp_path / "labels", (12,))
    Path(labels, MANIFEST).write_text(json.dumps({**manifest_to_change(labels), "images": "none"}))
    refused: list[tuple[str, dict[str, Any], str]] = [
        (dataset, {"limit": 9}, r"agreement/set: k of 4 neighbours needs 10 samples with .* red and blue, and 9 are"),
        (holes, {"k": 47}, r"needs 96 samples with a vector of red and blue and partial, and \d\d are usable"),
        (mixed, {"teachers": ["ears"]}, r"has no vectors of images of teacher ears; red, eyes has them"),
        (only, {}, r"has no vectors of images of a teacher\. Run a config"),
        (mixed, {"teachers": ["green"]}, r"has no teacher 'green'; it has: red, ears, eyes"),
        (lowest, {}, r"a metric over all teachers is named lowest, too"),
        (reference, {}, r'in no folder that you have allowed.*evaluate\.images_from: \["'),
        (labels, {}, r"has labels without images"),
        (str(tmp_path), {}, r"no dataset"),
    ]
    for url, keys, message in refused:
        with pytest.raises(UserError, match=message) as error:
            make_evaluator(**sets(url, **keys))
        assert "\n" not in str(error.value)
    allowed = {"images_from": f"{tmp_path}/reference/source", **sets(reference)}
    model: Any = Both(0.5)
    assert make_evaluator(**allowed).evaluate(model, CPU).sets["agreement/set"].images == 12
    with pytest.raises(
        UserError, match="best: no set gives 'agreement/set/green/knn'; the metrics are: agreement/set/"
    ):
        parse(Evaluation, {**sets(dataset), "best": "agreement/set/green/knn"})


def test_models_and_teachers_without_usable_vectors_fail_with_a_reason(tmp_path: Path, dataset: str) -> None:
    class Broken(ColorTeacher):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode_images(pixels) * torch.nan

    class Constant(ColorTeacher):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.eye(8)[[0] * len(pixels)]

    found = evaluate(Broken(torch.device("cpu")), dataset)
    assert found.metrics == {}
    assert found.failed["agreement/set"].startswith("96 of 96 image embeddings are not finite")
    assert evaluate(Constant(torch.device("cpu")), dataset).metrics["agreement/set/mean/variance"] == 0

    url = make(tmp_path, (20,))
    change_vectors(url, lambda numbers: np.tile(numbers[0], (len(numbers), 1)))
    found = evaluate(teacher("blue"), url)
    assert found.failed["agreement/set"].startswith("all stored vectors of red are equal")
    spoil_images(url, 13)
    found = evaluate(teacher("blue"), url, teachers=["blue"])
    assert found.failed["agreement/set"].startswith("k of 4 neighbours needs 10 samples with a vector of blue, and 7")
