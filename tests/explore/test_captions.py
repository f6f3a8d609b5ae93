"""Figures of captions in a report on datasets that the pipeline made, and statistics compared with counts by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reinforce
from reinforce.dataset.layers import TRUE_CAPTION
from reinforce.explore.captions import DEFINITIONS, bleu, text_statistics
from reinforce.explore.report import inspect
from tests.helpers.data import config_of
from tests.helpers.reinforced import small_dataset


def figures_of(url: str, folder: Path, **options: Any) -> Any:
    """The figures of captions in report.json."""
    inspect(url, str(folder), **options)
    return json.loads((folder / "report.json").read_text())["captions"]


def test_figures_are_those_of_the_stored_captions_and_vectors(tmp_path: Path) -> None:
    own = config_of("", "")
    own["captioners"]["repetitive"] = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {}}
    own["teachers"] |= {
        "images-only": {"class": "tests.helpers.models:ImageOnly"},
        "texts-only": {"class": "tests.helpers.models:TextOnly"},
    }
    dataset = small_dataset(tmp_path / "data", (12, 5), **{name: own[name] for name in ("captioners", "teachers")})
    report = figures_of(dataset, tmp_path / "report")
    samples = list(reinforce.open(dataset))
    assert report["texts"].keys() == {"namer", "repetitive", TRUE_CAPTION}
    null = sum(sample.captions["repetitive"] is None for sample in samples)
    assert null > 0
    assert report["texts"]["repetitive"]["null"] == null / 17
    assert report["texts"]["namer"]["captions"] == 2 * 17
    assert report["texts"]["repetitive"]["duplicates_within_image"] == pytest.approx(1 / 3), "repeated by `clean`"
    assert report["texts"][TRUE_CAPTION]["words"] == np.mean([len(str(sample.caption).split()) for sample in samples])
    assert report["definitions"].keys() - {"similarity"} == DEFINITIONS.keys()
    for teacher in ("red", "blue"):
        for what in ("namer", "repetitive", TRUE_CAPTION):
            cosines = [
                float(text @ image)
                for sample in samples
                for text in sample.texts[teacher][what]
                for image in sample.images[teacher]
                if np.isfinite(text).all()
            ]
            summary = report["similarity"][teacher][what]
            assert summary["mean"] == pytest.approx(np.mean(cosines), abs=2e-3)  # float16 changes the norms a little
            assert summary["captions"] == len(cosines) / 2
    assert report["similarity"]["images-only"] == report["similarity"]["texts-only"] == {}, "they encode one side"
    page = (tmp_path / "report" / "captions.html").read_text()
    for shown in (
        f"{report['texts']['namer']['self_bleu']:.3f}",
        f"{report['similarity']['red']['namer']['mean']:.3f}",
    ):
        assert f'<td class="number">{shown}</td>' in page
    for title in ("Lengths", "red", "Distinct 1-grams of an image", "Distinct 3-grams of an image"):
        assert f'<div role="img" aria-label="{title}.' in page


def test_reports_without_captions_or_sacrebleu_have_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {"characters": 1}}
    changes = {"captioners": {"silent": silent}, "input": {"captions": ["json:nothing"]}}
    report = figures_of(small_dataset(tmp_path / "silent", (3,), **changes), tmp_path / "report")
    assert report["texts"][TRUE_CAPTION]["null"] == 1
    assert report["similarity"]["red"].keys() == {"silent"}
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    report = figures_of(small_dataset(tmp_path / "data", (3,)), tmp_path / "report")
    assert report["texts"]["namer"]["self_bleu"] is None
    assert report["texts"]["namer"]["words"] > 0


def test_distinct_ngrams_are_counted_over_all_captions_and_within_an_image() -> None:
    summary = text_statistics([["A cat, a cat.", "a dog"], ["a cat", "the bird sings"]])
    # Words: a cat a cat a dog | a cat the bird sings; distinct: a cat dog the bird sings.
    assert summary["distinct"]["1"] == pytest.approx(6 / 11)
    # Pairs: a-cat cat-a a-cat a-dog | a-cat the-bird bird-sings; none crosses the end of a caption.
    assert summary["distinct"]["2"] == pytest.approx(5 / 7)
    assert summary["distinct"]["3"] == pytest.approx(3 / 3)
    assert summary["distinct_within_image"]["1"] == pytest.approx([(2 / 4 + 2 / 2) / 2, (3 / 6 + 5 / 5) / 2])
    assert summary["distinct_within_image"]["2"] == pytest.approx([(2 / 3 + 1) / 2, (3 / 4 + 1) / 2])
    assert summary["distinct_within_image"]["3"] == pytest.approx([1, 1])


def test_lengths_duplicates_missing_end_marks_and_ends_mid_sentence_are_counted() -> None:
    summary = text_statistics([["A dog's life - in 3 acts.", ""], ["one two", "one"]])
    assert summary["lengths"] == {"0": 1, "1": 1, "2": 1, "6": 1}
    assert summary["words"] == pytest.approx(9 / 4)
    summary = text_statistics([["a cat", "A cat!", "a dog"], ["a dog", "a bird", "a fish"], ["x", "y", "y"]])
    assert summary["duplicates_within_image"] == pytest.approx(2 / 9)
    assert summary["duplicates_across_images"] == pytest.approx(2 / 9), "both captions `a dog`, and no others"
    summary = text_statistics(
        [["a cat.", 'he says "stop!"', "a cat on the", "a cat"], ["猫です。", "it is of", "a cat and", "so?"]]
    )
    assert summary["no_end_mark"] == pytest.approx(4 / 8)
    assert summary["ends_midway"] == pytest.approx(3 / 8)


def test_rows_without_captions_count_only_as_null_and_equal_captions_have_a_self_bleu_of_one() -> None:
    summary = text_statistics([None, ["a cat", "a dog"], None, None])
    assert (summary["rows"], summary["captions"], summary["null"]) == (4, 2, 0.75)
    assert summary.keys() - {"rows", "captions"} == DEFINITIONS.keys()
    nothing = text_statistics([None])
    assert (nothing["null"], nothing["words"], nothing["self_bleu"]) == (1.0, None, None)
    assert nothing["distinct"] == {"1": None, "2": None, "3": None}
    same = "a photo of a cat"
    assert text_statistics([[same] * 3, [same + " and a dog"] * 3])["self_bleu"] == pytest.approx(1)
    assert text_statistics([[same], ["another one of these"]])["self_bleu"] is None
    assert text_statistics([[same, "two dogs run on green grass"]])["self_bleu"] < 0.1


WORDS = st.sampled_from(["a", "cat", "dog", "sits", "on", "the", "mat."])
TEXTS = st.lists(WORDS, min_size=1, max_size=9).map(" ".join)


@given(st.lists(st.lists(TEXTS, min_size=2, max_size=3), min_size=1, max_size=6))
def test_self_bleu_is_that_of_each_caption_with_the_others_of_its_image(images: list[list[str]]) -> None:
    captions = [text for image in images for text in image]
    others = [[text for j, text in enumerate(image) if j != i] for image in images for i in range(len(image))]
    assert text_statistics(images)["self_bleu"] == pytest.approx(bleu(captions, others))
