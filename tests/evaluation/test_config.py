"""The config, the command and the report of evaluations, and the metrics of configs and suites."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from reinforce import settings
from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.kinds.association import association_metrics, cue_text, jaccard
from reinforce.evaluation.kinds.base import classification_metrics, macro_recall
from reinforce.evaluation.kinds.classification import macro_f1
from reinforce.evaluation.registry import published_metrics, select_sets
from reinforce.evaluation.suite import file_name
from reinforce.processes.cores import available_cores
from teachers.fast_paths.usage import enabled, fast_path, loading
from tests.helpers.commands import Command
from tests.helpers.evaluation import (
    colour_samples,
    solid_image,
    write_classification,
    write_colour_folder,
    write_colour_shard,
    write_shard,
)
from tests.helpers.models import tiny_models

SETS: dict[str, Any] = {
    "zero_shot": {"emoji": {"images": "a.tar", "groups": "json:group"}, "in1k": {"images": "val"}},
    "retrieval": {"coco": {"pairs": "b.tar"}},
}


def test_metrics_are_named_by_kind_set_and_score_and_the_first_selects_unless_best_is_set() -> None:
    of_emoji = [f"zero_shot/emoji/{score}" for score in ("top1", "top5", "mean_per_class", "group")]
    recalls = [f"retrieval/coco/{way}/r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    named = settings.parse(Evaluation, SETS).metrics
    assert (named[:4], named[7:]) == (of_emoji, recalls)
    alone, stated = {"retrieval": SETS["retrieval"]}, {**SETS, "best": recalls[4]}
    for keys, best in ((SETS, of_emoji[0]), (alone, recalls[0]), (stated, recalls[4]), ({}, None)):
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
    assert config.parts({}) == {"datacomp/mean": "4 of 38 sets"}
    assert both.parts({}) == {}
    assert both.parts({"datacomp/mnist": "12 of 10000 images", "retrieval/coco": "151 of 301 images"}) == {
        "datacomp/mean": "38 of 38 sets with 1 in part",
        "datacomp/mnist/acc1": "12 of 10000 images",
        **{name: "151 of 301 images" for name in both.metrics if name.startswith("retrieval/coco/")},
    }
    assert len(both.metrics) == 13 + 1 + 38
    assert sum(map(len, both.shares(128))) == len(frozenset().union(*both.shares(128))) == 3 + 38


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"suite": "datacomp"}, "suite, data: set both"),
        ({"sets": ["imagenet1k"]}, "suite, data: set both, and `sets` only with them"),
        ({"suite": "datacomp", "data": "x", "sets": ["imagenet9k"]}, "sets: datacomp has no set 'imagenet9k'; it has "),
        ({"suite": "imagenet", "data": "x"}, "'datacomp', 'sugarcrepe', 'long-captions', 'xm3600' or 'dense'"),
        ({**SETS, "best": "zero_shot/emojis/top1"}, "no set gives 'zero_shot/emojis/top1'; the metrics are: zero_shot"),
        ({**SETS, "best": "zero_shot/in1k/group"}, "no set gives 'zero_shot/in1k/group'"),
        ({"best": "zero_shot/in1k/top1"}, "none, since there are no sets"),
        ({"export": "best"}, "export: best needs a set to evaluate on"),
        (
            {"suite": "datacomp", "data": "x", "sets": ["mnist", "stl10"], "export": "best"},
            "export: best would choose by datacomp/mean of 2 of 38 sets; set `best` to the metric that chooses",
        ),
        ({"zero_shot": {"a/b": {"images": "x"}}}, "'a/b' cannot name a set"),
        (
            {"zero_shot": {"a": {"images": "x", "class": "y"}}},
            "known keys here: format, image, view, limit, images, classes, label",
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


def test_f1_recall_and_jaccard_equal_those_of_scikit_learn() -> None:
    """The numbers are those of scikit-learn 1.9.1: f1_score and recall_score with ``labels=np.unique(labels)`` and
    ``average="macro"``, balanced_accuracy_score, and jaccard_score of the chosen candidates."""
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 9, 200) * 2, rng.integers(0, 20, 200)
    predicted[:90] = labels[:90]
    assert macro_f1(labels, predicted) == pytest.approx(0.5363400906879168, abs=1e-12)
    assert macro_recall(labels, predicted) == pytest.approx(0.4610610715839474, abs=1e-12)
    assert macro_f1(labels, np.full(200, -1)) == 0
    assert classification_metrics(labels, labels, predicted, 4)["acc5"] is None, "of fewer than five classes"
    scores, associated = rng.random(12).astype(np.float32), rng.random(12) < 0.5
    assert jaccard(scores, associated) == pytest.approx(0.4, abs=1e-12)


def test_association_counts_ties_in_order_and_is_averaged_by_the_number_of_candidates() -> None:
    associated = np.array([True, False, True, False, False])
    assert jaccard(np.array([9.0, 1, 8, 2, 3]), associated) == 1
    assert jaccard(np.array([9.0, 8, 1, 2, 3]), associated) == pytest.approx(1 / 3)
    assert jaccard(np.ones(5), associated) == pytest.approx(1 / 3), "the first two are chosen"
    assert jaccard(np.full(5, np.nan), associated) == 0
    assert [cue_text(cue) for cue in ("Dog", "owl", "Umbrella")] == ["A dog", "An owl", "An umbrella"]
    metrics = association_metrics([1.0, 0.5, 0.25, 0.0], [5, 6, 10, 12])
    assert metrics == {
        "avg_jaccard_score": 0.4375,
        "jaccard_score_5": 1.0, "jaccard_score_6": 0.5, "jaccard_score_10": 0.25, "jaccard_score_12": 0.0,
        "jaccard_score_5-6": 0.75, "jaccard_score_10-12": 0.125,
    }  # fmt: skip
    assert "jaccard_score_10-12" not in association_metrics([1.0], [5])


# --- the sets and what is published


def test_averages_of_published_models_come_out_as_published() -> None:
    keys = [one.key for one in select_sets("datacomp")]
    assert len(keys) == 38
    for model, average in (("mobileclip2_s0", 0.597), ("mobileclip2_s2", 0.641), ("mobileclip2_b", 0.658)):
        published = published_metrics(model)
        assert round(sum(published[key] for key in keys) / 38, 3) == average


def test_sets_are_chosen_by_key_and_read_from_where_they_are_published() -> None:
    assert [one.key for one in select_sets("datacomp", ["pets", "cifar10", "vtab/pets"])] == ["cifar10", "vtab/pets"]
    with pytest.raises(UserError, match="has no set 'imagenet'"):
        select_sets("datacomp", ["imagenet"])
    places = {one.key: (one.folder, one.place("hf://"), one.place("s3://b/sets/")) for one in select_sets("datacomp")}
    assert places["fairness/geode"][0] == "wds_geode_test"
    assert places["vtab/pets"][1:] == ("hf://datasets/djghosh/wds_vtab-pets_test", "s3://b/sets/wds_vtab-pets_test")
    assert places["misc/winogavil"] == (
        "winogavil",
        "hf://datasets/nlphuji/winogavil@refs/convert/parquet",
        "s3://b/sets/winogavil",
    )


def test_published_metrics_are_found_by_every_spelling_of_a_published_name() -> None:
    found = published_metrics("mobileclip_b_lt")
    assert found["imagenet1k"] == pytest.approx(0.772, abs=5e-4)
    assert published_metrics("MobileCLIP-B (LT)") == published_metrics("mobileclip_blt") == found
    with pytest.raises(UserError, match="nothing is published of 'MobileCLIP-S9'; choose one of mobileclip2_b, "):
        published_metrics("MobileCLIP-S9")


@pytest.fixture
def evaluate(command: Command) -> Command:
    return partial(command, "evaluate")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of them in the output of a training, sets, and a file that is not of results."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_models.open_clip_model(root / "plain")
    tiny_models.open_clip_model(root / "trained" / "student", image_size=24, seed=1)
    write_colour_folder(root / "folder")
    write_colour_shard(root / "colours.tar")
    samples = [
        ("a", solid_image("red"), {"txt": "red"}),
        ("b", b"bad", {"txt": "blue"}),
        ("c", solid_image("grey"), {"txt": "g"}),
    ]
    write_shard(root / "holes.tar", samples)
    write_classification(root / "sets", "mnist", colour_samples(1))
    (root / "bad").mkdir()
    (root / "bad" / file_name(f"{root}/plain")).write_text("[]\n")
    return root


def test_models_are_compared_and_refused_images_listed(evaluate: Command, root: Path, tmp_path: Path) -> None:
    models = [f"local-dir:{root}/plain", f"{root}/trained", f"{root}/trained/student"]
    sets = ["--zero-shot", f"colours={root}/folder", "--retrieval", f"holes={root}/holes.tar"]
    sets += ["--set", "zero_shot.colours.templates=none"]
    status, out, _ = evaluate(*models, *sets, "--json", f"{tmp_path}/out/report.json", "--set", "batch=4")
    assert status == 0
    for part in ("zero_shot/colours/top1", "retrieval/holes/image_to_text/r10", "zero_shot/colours: 12 images"):
        assert part in out
    assert out.startswith(f"{torch.get_num_threads()} CPU thread")
    assert f"{available_cores()} decoding thread" in out.splitlines()[0]
    assert out.count("retrieval/holes: 2 images; 1 refused: b (image_format)") == 1, "equal summaries share a line"
    report = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
    assert list(report) == models
    one, other, same = (report[model] for model in models)
    assert other == same, "the output of a training is its student"
    assert one["metrics"] != other["metrics"]
    assert one["sets"]["zero_shot/colours"] == {"images": 12, "refused": []}
    (refused,) = one["sets"]["retrieval/holes"]["refused"]
    assert (refused["key"], refused["reason"]) == ("b", "image_format")
    assert f"{100 * one['metrics']['zero_shot/colours/top1']:.2f}" in out


@pytest.mark.usefixtures("own_fast_paths")
def test_sets_of_the_config_and_the_command_line_are_merged(evaluate: Command, root: Path, tmp_path: Path) -> None:
    section: dict[str, Any] = {"zero_shot": {"a": {"images": f"{root}/folder"}, "b.1": {"images": "nowhere.tar"}}}
    section["probes"] = {"c": {part: {"images": f"{root}/folder"} for part in ("train", "test")} | {"k": [3], "l2": []}}
    config = tmp_path / "student.yaml"
    config.write_text(yaml.safe_dump({"output": "x", "student": {"model": "y"}, "evaluate": section}))
    b = ["--zero-shot", f"b.1={root}/colours.tar", "--limit", "5"]
    b += ["--set", "zero_shot.b.1.label=json:class", "--set", "zero_shot.b.1.groups=json:group"]
    with loading("elsewhere"):
        fast_path("compile").fall_back("of another command")
    status, out, err = evaluate(f"{root}/plain", "--config", str(config), *b, "--set", "accelerator=plain")
    assert status == 0, err
    assert not enabled()
    assert "fast path" not in out
    for part in (
        "zero_shot/a: 5 images",
        "zero_shot/b.1: 5 images",
        "zero_shot/b.1/group",
        "probes/c: 17 images; 5 test",
        "metric, %",
    ):
        assert part in out


SET = "{root}/plain --zero-shot a={root}/folder"
SUITE = "{root}/plain --suite datacomp"
MNIST = f"{SUITE} --data {{root}}/sets --sets mnist"
FAULTS = {
    "nothing to judge by": ("{root}/plain", "nothing to evaluate on: name sets with --zero-shot"),
    "no model of that name": ("ViT-L14 --zero-shot a={root}/folder", "did you mean ViT-L-14"),
    "no name of the set": ("{root}/plain --zero-shot {root}/folder", "want NAME=URL"),
    "a key without a set": ("{root}/plain --set zero_shot.a.label=x", "zero_shot.a.images: is required"),
    "unwritable JSON": (f"{SET} --json {{root}}/colours.tar/x.json", "cannot be written"),
    "no root": (SUITE, "name the folder or URL of its sets with --data"),
    "no set at all": (f"{SUITE} --data {{root}}", "--data has none of the 38 sets: Caltech-101 is"),
    "options of other sets": (f"{SUITE} --limit 5", "--limit: not with --suite"),
    "no suite": ("{root}/plain --data x", "belong to --suite"),
    "sets that may be missing, of no suite": ("{root}/plain --zero-shot a=b --allow-missing", "belong to --suite"),
    "a result that is no result": (f"{MNIST} --out {{root}}/bad", ".jsonl has a line that is not of results"),
    "a folder that cannot be written": (f"{MNIST} --out {{root}}/plain/open_clip_config.json", "cannot be written"),
}


def test_a_user_error_is_one_message(evaluate: Command, root: Path) -> None:
    for fault, (arguments, message) in FAULTS.items():
        status, out, err = evaluate(*arguments.format(root=root).split())
        assert status == 2, fault
        assert err.startswith("error: "), fault
        assert message in err.replace("\n", " "), fault
        assert "Traceback" not in out + err, fault
