"""Metrics of suites: known answers, ties, empty groups, and what scikit-learn computes."""

from __future__ import annotations

import numpy as np
import pytest

from reinforce.errors import UserError
from reinforce.evaluation.registry import published_metrics, select_sets
from reinforce.evaluation.suite.association import cue_text
from reinforce.evaluation.suite.metrics import (
    association_metrics,
    classification_metrics,
    jaccard,
    macro_f1,
    macro_recall,
)


def test_f1_recall_and_jaccard_equal_those_of_scikit_learn() -> None:
    """The numbers are those of scikit-learn 1.9.1: f1_score and recall_score with ``labels=np.unique(labels)`` and
    ``average="macro"``, balanced_accuracy_score, and jaccard_score of the chosen candidates."""
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 9, 200) * 2, rng.integers(0, 20, 200)
    predicted[:90] = labels[:90]
    assert macro_f1(labels, predicted) == pytest.approx(0.5363400906879168, abs=1e-12)
    assert macro_recall(labels, predicted) == pytest.approx(0.4610610715839474, abs=1e-12)
    scores, associated = rng.random(12).astype(np.float32), rng.random(12) < 0.5
    assert jaccard(scores, associated) == pytest.approx(0.4, abs=1e-12)


def test_classes_without_samples_and_classes_that_are_only_predicted() -> None:
    labels, predicted = np.array([0, 0, 2, 2]), np.array([0, 1, 2, -1])
    assert macro_recall(labels, predicted) == 0.5
    assert macro_f1(labels, predicted) == pytest.approx((2 / 3 + 2 / 3) / 2), "class 1 has no sample"
    assert macro_f1(labels, np.array([0, 2, 2, 2])) == pytest.approx((2 / 3 + 4 / 5) / 2), "a wrong 2 costs class 2"
    assert macro_f1(labels, np.full(4, -1)) == 0
    labels, ranks, predicted = np.array([0, 1, 1]), np.array([0, 4, 5]), np.array([0, 0, 3])
    metrics = classification_metrics(labels, ranks, predicted, 6)
    assert metrics == pytest.approx({"acc1": 1 / 3, "acc5": 2 / 3, "mean_per_class_recall": 1 / 2})
    assert classification_metrics(labels, ranks, predicted, 4)["acc5"] is None, "of fewer than five classes"


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
    assert places["vtab/pets"][1:] == (
        "hf://datasets/djghosh/wds_vtab-pets_test",
        "s3://b/sets/wds_vtab-pets_test",
    )
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
