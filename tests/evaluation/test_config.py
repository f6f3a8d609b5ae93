"""The metrics of a config, and the one that selects the best checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reinforce import settings
from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation

SETS: dict[str, Any] = {
    "zero_shot": {"emoji": {"images": "a.tar", "groups": "json:group"}, "in1k": {"images": "val"}},
    "retrieval": {"coco": {"pairs": "b.tar"}},
}


def test_metrics_are_named_by_kind_set_and_score_and_the_first_selects_unless_best_is_set() -> None:
    recalls = [f"retrieval/coco/{way}/r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert settings.parse(Evaluation, SETS).metrics == [
        "zero_shot/emoji/top1",
        "zero_shot/emoji/top5",
        "zero_shot/emoji/mean_per_class",
        "zero_shot/emoji/group",
        "zero_shot/in1k/top1",
        "zero_shot/in1k/top5",
        "zero_shot/in1k/mean_per_class",
        *recalls,
    ]
    retrieval = {"retrieval": SETS["retrieval"]}
    for keys, best in (
        (SETS, "zero_shot/emoji/top1"),
        (retrieval, "retrieval/coco/text_to_image/r1"),
        ({**SETS, "best": "retrieval/coco/image_to_text/r5"}, "retrieval/coco/image_to_text/r5"),
        ({}, None),
    ):
        assert settings.parse(Evaluation, keys).best_metric == best


def test_a_suite_has_main_metrics_and_their_mean_and_ranks_share_out_its_images() -> None:
    chosen = ["vtab/pets", "imagenet1k", "wilds/fmow", "renderedsst2"]
    config = settings.parse(Evaluation, {"suite": "datacomp", "data": "hf://", "sets": chosen})
    assert config.best_metric == "datacomp/mean"
    scores = {
        "datacomp/imagenet1k/acc1": 0.7,
        "datacomp/vtab/pets/mean_per_class_recall": 0.9,
        "datacomp/renderedsst2/acc1": 0.5,
        "datacomp/wilds/fmow/acc_worst_region": 0.1,
    }
    assert config.metrics == ["datacomp/mean", *scores]
    assert config.combine([scores]) == {"datacomp/mean": pytest.approx(0.55), **scores}
    failed = {name: score for name, score in scores.items() if "fmow" not in name}
    assert config.combine([{}, failed]) == failed, "no mean of a part"
    assert [{name.removeprefix("datacomp/") for name in share} for share in config.shares(2)] == [
        {"imagenet1k"},
        {"wilds/fmow", "vtab/pets", "renderedsst2"},
    ]
    both = settings.parse(Evaluation, {**SETS, "suite": "datacomp", "data": "x"})
    assert len(both.metrics) == 13 + 1 + 38
    assert sum(map(len, both.shares(128))) == len(frozenset().union(*both.shares(128))) == 3 + 38


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"suite": "datacomp"}, "suite, data: set both"),
        ({"sets": ["imagenet1k"]}, "suite, data: set both, and `sets` only with them"),
        ({"suite": "datacomp", "data": "x", "sets": ["imagenet9k"]}, "sets: datacomp has no set 'imagenet9k'; it has "),
        ({"suite": "imagenet", "data": "x"}, "'datacomp', 'sugarcrepe' or 'long-captions'"),
        ({**SETS, "best": "zero_shot/emojis/top1"}, "no set gives 'zero_shot/emojis/top1'; the metrics are: zero_shot"),
        ({**SETS, "best": "zero_shot/in1k/group"}, "no set gives 'zero_shot/in1k/group'"),
        ({"best": "zero_shot/in1k/top1"}, "none, since there are no sets"),
        ({"export": "best"}, "export: best needs a set to evaluate on"),
        ({"zero_shot": {"a/b": {"images": "x"}}}, "'a/b' cannot name a set"),
        (
            {"zero_shot": {"a": {"images": "x", "class": "y"}}},
            "known keys here: format, image, view, images, classes, label",
        ),
        ({"retrieval": {"a": {"pairs": "x", "captions": []}}}, "retrieval.a.captions"),
    ],
)
def test_faults_of_the_config_are_reported(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        settings.parse(Evaluation, config)
    assert message in str(error.value)


def test_the_section_of_a_training_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("output: x\nevaluate: {retrieval: {coco: {pairs: b.tar}}}\n")
    assert list(settings.load(Evaluation, path, section="evaluate").retrieval) == ["coco"]
    path.write_text("output: x\nevaluate: {retrieval: {coco: {pears: b.tar}}}\n")
    with pytest.raises(UserError, match=r"config\.yaml, evaluate has 2 errors:\n  retrieval\.coco\.pairs: is required"):
        settings.load(Evaluation, path, section="evaluate")
    path.write_text("output: x\n")
    with pytest.raises(UserError, match=r"config\.yaml has no section `evaluate`. Add it"):
        settings.load(Evaluation, path, section="evaluate")
    path.write_text("evaluate:\n")
    with pytest.raises(UserError, match=r"must be a mapping with keys such as `every` and `zero_shot`"):
        settings.load(Evaluation, path, section="evaluate")
