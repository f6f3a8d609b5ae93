"""``reinforce evaluate --suite``: sets in their published layouts, results that are kept, and faulty sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce.errors import UserError
from reinforce.evaluation import suite as run
from reinforce.evaluation.encoding import Encoder, EvaluatedModels
from reinforce.evaluation.evaluator import evaluate_published, read_content
from reinforce.evaluation.kinds.base import ImageSet, SetKind, find_files
from reinforce.evaluation.kinds.base import find_set as find_published
from reinforce.evaluation.kinds.registry import KINDS
from reinforce.evaluation.reading import ContentDigest, ImageBatches, LabelledImage
from reinforce.evaluation.registry import select_sets
from reinforce.evaluation.report import Metrics, Outcome
from reinforce.evaluation.suite import SetJob, file_name
from tests.helpers.commands import Command
from tests.helpers.evaluation import (
    COLOURS,
    CPU,
    ColourOracle,
    ConstantEncoder,
    NanEncoder,
    colour_samples,
    count_decoded,
    find_set,
    solid_image,
    stored,
    write_classification,
    write_sharegpt4v,
    write_sugarcrepe,
    write_table,
    write_urban1k,
    write_xm3600,
)
from tests.helpers.models import tiny_models


def evaluate_set(root: Path, key: str, **encoders: Encoder) -> Outcome:
    """Evaluate encoders, by default one that is right about colours, on a set below ``root``."""
    one, models = find_set(key), EvaluatedModels(encoders or {"oracle": ColourOracle()}, CPU, batch=5, threads=2)
    return evaluate_published(one, find_published(one, str(root)), models)


def test_sets_with_the_same_classes_share_a_classifier(tmp_path: Path) -> None:
    class Counter(ColourOracle):
        texts = 0

        def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
            self.texts += len(texts)
            return super().encode_texts(texts)

    encoder = Counter()
    models = EvaluatedModels({"model": encoder}, CPU, batch=5, threads=2)
    templates = {"imagenet1k": ["{c}", "a {c}"], "imagenetv2": ["{c}", "a {c}"], "imagenet_sketch": ["{c}", "the {c}"]}
    counts = []
    for key, lines in templates.items():
        write_classification(tmp_path, key, colour_samples(1), templates=lines)
        files = find_published(find_set(key), str(tmp_path))
        assert evaluate_published(find_set(key), files, models).metrics["model"]["acc1"] == 1
        counts.append(encoder.texts)
    assert counts == [12, 12, 24]


def test_groups_of_each_set_with_metadata_and_the_worst_of_them(tmp_path: Path) -> None:
    """The constant model ranks classes by their index, so the last of six is not among its top five."""
    samples = [(label, image, (label // 5, 1, label % 2)) for label, image, _ in colour_samples(1)]
    write_classification(tmp_path, "wilds/fmow", samples)
    write_classification(tmp_path, "fairness/dollar_street", samples)
    write_classification(tmp_path, "wilds/iwildcam", [(label, image, range(9)) for label, image, _ in samples])
    constant = partial(evaluate_set, tmp_path, model=ConstantEncoder())
    fmow = constant("wilds/fmow").metrics["model"]
    assert (fmow["acc_worst_region"], fmow["acc_worst_year"]) == (0, pytest.approx(1 / 6))
    street = constant("dollar_street").metrics["model"]
    assert (street["acc_top5_income_ds:0"], street["acc_top5_wg"]) == (1, 0)
    samples = [(label, image, (label % 3, 8)) for label, image, _ in colour_samples(1)]
    samples[4] = (0, samples[4][1], (1, 8))  # a wrong label: half of region 1 is missed
    write_classification(tmp_path, "fairness/geode", samples)
    assert evaluate_set(tmp_path, "geode").metrics["oracle"] == pytest.approx(
        {
            "acc1": 5 / 6, "acc5": 1, "mean_per_class_recall": 0.9, "acc_avg": 5 / 6, "acc_wg": 1 / 2,
            "acc_region:0": 1, "acc_region:1": 1 / 2, "acc_region:2": 1,
            "count_region:0": 2, "count_region:1": 2, "count_region:2": 2,
        }
    )  # fmt: skip
    iwildcam = constant("iwildcam").metrics["model"]
    assert iwildcam["F1-macro_all"] == pytest.approx(2 / 7 / 6)
    assert iwildcam["recall-macro_all"] == pytest.approx(1 / 6)


def test_equal_captions_of_two_images_are_two_texts(tmp_path: Path) -> None:
    colours = ["red", "green", "blue"]
    columns = {
        "image": [stored(solid_image(colour)) for colour in colours],
        "caption": [["red", "red paint"], ["green"], ["red", "blue"]],
    }
    write_table(tmp_path, "flickr", columns)
    metrics = evaluate_set(tmp_path, "flickr").metrics["oracle"]
    assert metrics["image_retrieval_recall@1"] == 4 / 5
    assert metrics["text_retrieval_recall@1"] == 1
    assert metrics["mean_recall@1"] == metrics["image_retrieval_recall@1"] / 2 + 1 / 2


def associations(count: int, right: int) -> dict[str, list[Any]]:
    """An instance with ``count`` candidates about red, of which ``right`` of two associated ones are red."""
    names = [f"c{number}" for number in range(count)]
    pictures = ["red"] * right + ["blue"] * (count - right)
    return {
        "cue": ["Red"],
        "candidate_images": [[stored(solid_image(colour, number)) for number, colour in enumerate(pictures)]],
        "candidates": [names],
        "associations": [["c0", names[-1]] if right == 1 else ["c0", "c1"]],
    }


def test_association_counts_instances_of_ten_and_twelve_candidates(tmp_path: Path) -> None:
    small, large = associations(5, 2), associations(12, 1)
    write_table(tmp_path, "winogavil", {name: small[name] + large[name] for name in small})
    metrics = evaluate_set(tmp_path, "winogavil").metrics["oracle"]
    assert metrics["jaccard_score_5-6"] == 1
    assert metrics["jaccard_score_10-12"] == pytest.approx(1 / 3), "c0 is chosen, and c1 for the last"


def test_the_right_caption_must_have_the_higher_score(tmp_path: Path) -> None:
    rows = [("red", "red", "blue"), ("red", "blue", "red"), ("blue", "red", "green"), ("blue", "blue", "red")]
    file = write_sugarcrepe(tmp_path, rows)
    encoders = {"oracle": ColourOracle(), "constant": ConstantEncoder(), "nan": NanEncoder()}
    outcome = evaluate_set(tmp_path, "swap_obj", **encoders)
    assert outcome.samples == 4
    assert outcome.metrics == {"oracle": {"acc": 0.5}, "constant": {"acc": 0}}, "ties are no hits"
    assert {*outcome.failed} == {"nan"}
    assert find_files(find_set("add_obj"), str(tmp_path)) is None, "each of the seven is a set of its own"
    for broken in ('{"0": {"filename": "a.jpg"}}', '{"0": {"filename"', "[]"):
        file.write_text(broken)
        with pytest.raises(UserError, match=r"swap_obj.json has another shape than the published file"):
            evaluate_set(tmp_path, "swap_obj")
    write_sugarcrepe(tmp_path, [("none", "red", "blue")])
    with pytest.raises(UserError, match=r"none.jpg cannot be read"):
        evaluate_set(tmp_path, "swap_obj")


def test_long_captions_are_read_as_they_are_published(tmp_path: Path) -> None:
    write_urban1k(tmp_path, {"x": ("red", "The red one.\nblue is a second line.\n"), "y": ("blue", "The green one.")})
    assert evaluate_set(tmp_path, "urban1k").metrics["oracle"]["mean_recall@1"] == 0.5
    assert find_files(find_set("urban1k"), "hf://") is None, "which the Hub has only in an archive"
    file = write_sharegpt4v(tmp_path, [("red", "A\nred one"), ("blue", "A blue one")])
    outcome = evaluate_set(tmp_path, "sharegpt4v-1k")
    assert (outcome.samples, outcome.metrics["oracle"]["mean_recall@1"]) == (2, 1)
    file.write_text(file.read_text()[:-30])
    with pytest.raises(UserError, match="has another shape than the published file"):
        evaluate_set(tmp_path, "sharegpt4v-1k")


def test_the_languages_of_xm3600_are_sets_that_share_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    languages = [one.key.removeprefix("xm3600/") for one in select_sets("xm3600")]
    assert len(languages) == 36
    captions = {colour: {one: [f"{colour} in {one}", "a second caption"] for one in languages} for colour in COLOURS}
    captions["red"]["de"] = ["blue by mistake"]
    file = write_xm3600(tmp_path, captions)
    models = EvaluatedModels({"oracle": ColourOracle(), "constant": ConstantEncoder()}, CPU, batch=5, threads=2)
    decoded = count_decoded(monkeypatch)

    def evaluate(key: str) -> Outcome:
        one = find_set(f"xm3600/{key}")
        return evaluate_published(one, find_published(one, str(tmp_path)), models, ContentDigest())

    german, english, again = (evaluate(key) for key in ("de", "en", "de"))
    assert len(decoded) == len(COLOURS), "once for all languages"
    assert english.metrics["oracle"]["mean_recall@1"] == 1
    assert english.metrics["constant"]["mean_recall@1"] == pytest.approx(1 / 6)
    assert german.metrics["oracle"] == {**german.metrics["oracle"], "image_retrieval_recall@1": pytest.approx(5 / 6)}
    assert (german.metrics, german.content) == (again.metrics, again.content)
    assert german.content != english.content
    one = find_set("xm3600/de")
    assert read_content(one, find_published(one, str(tmp_path)), 2) == german.content
    (file.parent / "images/red.jpg").write_bytes(solid_image("yellow"))
    assert evaluate("en").metrics["oracle"]["mean_recall@1"] < 1, "another image"
    assert len(decoded) == 2 * len(COLOURS)
    del captions["red"]["sw"]
    write_xm3600(tmp_path, captions)
    with pytest.raises(UserError, match=r"captions\.jsonl has another shape than the published file"):
        evaluate("sw")
    assert find_files(one, "hf://") is None


def test_one_more_kind_of_sets_needs_a_kind_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of images that have the colour of their label in a file of names."""

    def score(models: EvaluatedModels, images: ImageBatches) -> Outcome:
        vectors, targets = models.encode_all(images)
        metrics: dict[str, Metrics] = {
            name: {"share": float((found.argmax(1).numpy() == targets).mean())} for name, found in vectors.items()
        }
        return Outcome(metrics, len(targets), images.refused)

    def read() -> Iterator[LabelledImage]:
        for number, name in enumerate(COLOURS):
            yield LabelledImage(name, partial(solid_image, name), number)

    monkeypatch.setitem(KINDS, "colours", SetKind("colours", lambda one, files: ImageSet(one.name, read, score)))
    write_classification(tmp_path, "mnist", colour_samples())
    files = find_published(find_set("mnist"), str(tmp_path))
    one = replace(find_set("mnist"), kind="colours", main_metric="share")
    models = EvaluatedModels({"oracle": ColourOracle(), "constant": ConstantEncoder()}, CPU, batch=5, threads=2)
    outcome = evaluate_published(one, files, models, ContentDigest())
    assert outcome.metrics == {"oracle": {"share": 1}, "constant": {"share": pytest.approx(1 / 6)}}
    assert outcome.content == read_content(one, files, 2)


# --- the command


@pytest.fixture
def evaluate(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    tiny_models.open_clip_model(tmp_path / "plain")
    tiny_models.open_clip_model(tmp_path / "other", image_size=24, seed=1)
    return partial(command, "evaluate", "plain", "other", "--suite", "datacomp", "--data", "sets", "--out", "out")


def test_sets_are_compared_with_published_ones_and_missing_ones_are_named(
    evaluate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classification(tmp_path / "sets", "mnist", colour_samples())
    decoded = count_decoded(monkeypatch)
    chosen = ("--sets", "mnist,stl10", "--compare", "mobileclip2_s0")
    status, out, err = evaluate(*chosen)
    assert status == 3
    assert "1 of 2 sets are missing: stl10. Copy them below --data" in err
    assert len(decoded) == 12, "each image is decoded once for both models"
    assert evaluate(*chosen, "--allow-missing")[0] == 0
    for line in (
        "* MNIST: 12 samples (published: 10,000), 6 classes (published: 10): not comparable",
        "STL-10 is missing, and not in the mean: expected at",
        "https://huggingface.co/datasets/djghosh/wds_stl10_test",
        "The mean is not that of the 38 sets of datacomp.",
        "mean of 1 of 38 sets",
    ):
        assert line in out
    (line,) = map(json.loads, (tmp_path / "out" / file_name("plain")).read_text().splitlines())
    assert (line["key"], line["dataset"]) == ("mnist", "MNIST")
    assert line["metrics"]["main_metric"] == line["metrics"]["acc1"]
    table = (tmp_path / "out" / "datacomp.md").read_text()
    assert "| MNIST | acc1 |" in table
    assert "| 85.03 |  |" in table, "a set of another size has no difference"
    assert (tmp_path / "out" / "datacomp.png").stat().st_size > 10_000
    write_classification(tmp_path / "sets", "stl10", colour_samples(1))
    status, out, _ = evaluate(*chosen, "--json", "-")
    assert (status, len(decoded)) == (0, 18), "the finished set is kept"
    report = json.loads(out)
    assert (report["sets"], report["missing"]) == (["mnist", "stl10"], {})
    assert [len(model["results"]) for model in report["models"].values()] == [2, 2]


def test_a_failed_set_leaves_the_others_and_the_status(evaluate: Command, tmp_path: Path) -> None:
    write_classification(tmp_path / "sets", "mnist", colour_samples(), classes=["red"])
    write_classification(tmp_path / "sets", "cifar10", colour_samples(1))
    status, out, err = evaluate("--sets", "mnist", "--sets", "cifar10")
    assert status == 2
    assert "MNIST failed, and is not in the mean: MNIST: s0000002 has the label 1 in its .cls" in out
    assert "sets failed: mnist. The same command tries them again." in err
    assert "mean of 1 of 38 sets" in out


# --- faulty sets


RED = solid_image("red")
#: Files of the set that are removed or have another content, or its third sample; and a part of the error.
DAMAGE: dict[str, tuple[dict[str, str | None] | tuple[Any, ...], str]] = {
    "no classes": ({"classnames.txt": None}, "has no classnames.txt. Download the whole set"),
    "no number of shards": ({"test/nshards.txt": None}, "has no test/nshards.txt"),
    "bad number of shards": ({"test/nshards.txt": "<html>"}, "is '<html>', not the number of shards"),
    "a missing shard": ({"test/1.tar": None}, "has no test/1.tar"),
    "a damaged shard": ({"test/1.tar": "x" * 600}, "1.tar: shard_unreadable"),
    "a label beyond the classes": (
        (6, RED, (0, 1)),
        "has the label 6 in its .cls member; want the index of one of the 6 classes",
    ),
    "a negative label": ((-1, RED, (0, 1)), "has the label -1"),
    "a label that is a name": (("red", RED, (0, 1)), "has the label 'red' in its .cls member; want the index"),
    "no metadata": ((0, RED, None), "whole numbers region, country in its .npy member; it has none"),
    "metadata of another shape": ((0, RED, (1, 2, 3)), "its shape is (3,), its values are [1, 2, 3]"),
    "metadata that is no number": ((0, RED, (0.5, 1)), "its shape is (2,), its values are [0.5, 1.0]"),
    "a broken image": ((0, b"x", (0, 1)), "1 of 6 images cannot be used, more than 0.1%: s0000002"),
}


def test_a_faulty_set_has_an_error_instead_of_a_number(tmp_path: Path) -> None:
    for fault, (damage, message) in DAMAGE.items():
        samples: list[Any] = [(label, image, (0, 1)) for label, image, _ in colour_samples(1)]
        if isinstance(damage, tuple):
            samples[2] = damage
        folder = write_classification(tmp_path / fault, "geode", samples)
        for name, text in damage.items() if isinstance(damage, dict) else ():
            (folder / name).unlink() if text is None else (folder / name).write_text(text)
        with pytest.raises(UserError) as error:
            evaluate_set(tmp_path / fault, "geode")
        assert message in str(error.value), fault


def test_one_broken_image_in_a_thousand_is_left_out_and_named(tmp_path: Path) -> None:
    samples = [*colour_samples(1)] * 200
    samples[7] = (0, b"broken", None)
    write_classification(tmp_path, "cifar10", samples)
    one, outcome = find_set("cifar10"), evaluate_set(tmp_path, "cifar10")
    assert outcome.samples == len(samples)
    line = run._line(SetJob(one, find_published(one, str(tmp_path)), ("oracle",)), outcome, "oracle")
    assert line["refused"] == ["1 of 1,200 left out: s0000007 (image_format)"]
    assert line["metrics"]["main_metric"] == 1


SHAPES: list[tuple[str, dict[str, Any], str]] = [
    ("flickr", {"caption": [[]]}, "has no list of captions"),
    ("flickr", {"caption": ["red"]}, "has no list of captions in its column caption, but 'red'"),
    ("flickr", {"caption": None}, "has no column caption"),
    ("flickr", {"image": [{"bytes": None, "path": "a.jpg"}]}, "has no image bytes"),
    ("winogavil", {"associations": [["other"]]}, "5 images for 5 candidates, of which 0 are associated"),
    ("winogavil", {"candidates": [["c0", "c1"]]}, "has 5 images for 2 candidates"),
    ("winogavil", {"cue": [""]}, "lacks one of cue"),
    ("winogavil", {}, "has no jaccard_score_10-12"),
]


def test_a_table_of_another_shape_is_an_error(tmp_path: Path) -> None:
    for number, (key, change, message) in enumerate(SHAPES):
        columns = {"image": [stored(RED)], "caption": [["red"]]} if key == "flickr" else associations(5, 2)
        columns = {name: values for name, values in (columns | change).items() if values is not None}
        write_table(tmp_path / str(number), key, columns)
        with pytest.raises(UserError) as error:
            evaluate_set(tmp_path / str(number), key)
        assert message in str(error.value)
