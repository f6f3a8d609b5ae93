"""The captions report on datasets that the pipeline made, and its statistics compared with counts by hand."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

import reinforce
from reinforce.captioning.metrics import bleu
from reinforce.dataset.layers import TRUE_CAPTION
from reinforce.report.captions import _rows_per_shard, captions_report, captions_table, write_report
from reinforce.report.texts import DEFINITIONS, TextStatistics
from tests.helpers.commands import Command
from tests.helpers.data import config_of
from tests.helpers.reinforced import small_dataset

FILES = {"report.json", "lengths.png", "distinct.png", "similarity.png"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two captioners, and teachers of images and texts, only of images and only of texts."""
    own = config_of("", "")
    own["captioners"]["repetitive"] = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {}}
    own["teachers"] |= {
        "images-only": {"class": "tests.helpers.models:ImageOnly"},
        "texts-only": {"class": "tests.helpers.models:TextOnly"},
    }
    models = {name: own[name] for name in ("captioners", "teachers")}
    return small_dataset(tmp_path_factory.mktemp("captions"), (12, 5), **models)


def test_statistics_are_those_of_the_stored_captions_and_vectors(dataset: str) -> None:
    report = captions_report(dataset)
    samples = list(reinforce.open(dataset))
    assert report["rows"] == len(samples) == 17
    assert list(report["texts"]) == ["namer", "repetitive", TRUE_CAPTION]
    null = sum(sample.captions["repetitive"] is None for sample in samples)
    assert null > 0
    assert report["texts"]["repetitive"]["null"] == null / 17
    assert report["texts"]["namer"]["captions"] == 2 * 17
    assert report["texts"]["repetitive"]["duplicates_within_image"] == pytest.approx(1 / 3), "repeated by `clean`"
    assert report["texts"][TRUE_CAPTION]["words"] == np.mean([len(str(sample.caption).split()) for sample in samples])

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
            assert sum(summary["histogram"]) == summary["captions"] == len(cosines) / 2
            centres = np.linspace(-1, 1, len(summary["histogram"]), endpoint=False) + 1 / len(summary["histogram"])
            assert np.average(centres, weights=summary["histogram"]) == pytest.approx(summary["mean"], abs=0.01)
    assert report["similarity"]["images-only"] == report["similarity"]["texts-only"] == {}, (
        "these encode only images or only texts"
    )


def test_captioners_and_teachers_can_be_selected_and_what_is_missing_is_an_error(dataset: str, tmp_path: Path) -> None:
    report = captions_report(dataset, captioners=["repetitive"], teachers=["blue"])
    assert list(report["texts"]) == ["repetitive", TRUE_CAPTION]
    assert list(report["similarity"]) == ["blue"]
    bare = small_dataset(tmp_path, (2,), captioners={}, teachers={})
    for url, options, message in (
        (dataset, {"captioners": ["coca"]}, "has no captioner 'coca'; it has: namer, repetitive"),
        (dataset, {"teachers": ["dfn"]}, "has no teacher 'dfn'; it has: red, blue, images-only, texts-only"),
        (bare, {}, "has no synthetic captions"),
        (str(tmp_path), {}, "is not a reinforced dataset"),
    ):
        with pytest.raises(reinforce.UserError, match=message):
            captions_report(url, **options)


def test_rows_are_read_evenly_from_each_shard_and_spread_over_many(dataset: str, tmp_path: Path) -> None:
    for limit, taken in {1: [1], 6: [3, 3], 11: [5, 6], 16: [5, 11], 100: [5, 12]}.items():
        assert sorted(rows for _, rows in _rows_per_shard(reinforce.open(dataset), limit)) == taken
    assert captions_report(dataset, limit=11)["rows"] == 11
    data = reinforce.open(small_dataset(tmp_path, [1] * 30, teachers={}))
    places = sorted(data.shards.index(shard) for shard, _ in _rows_per_shard(data, 10))
    assert len(places) == 10
    assert max(b - a for a, b in itertools.pairwise([*places, 30])) <= 4
    assert captions_report(data.store.url)["rows"] == 30, "all rows, as the limit allows"


def test_the_command_prints_a_table_and_writes_what_the_libraries_that_are_there_allow(
    dataset: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("captions-report", dataset, "--captioner", "namer", "--teacher", "red", "--limit", "9")
    assert status == 0
    assert "self-BLEU-4" in out
    assert "9 images; written: captions-report/report.json" in out
    assert {path.name for path in (tmp_path / "captions-report").iterdir()} == FILES
    caplog.clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, _ = command("captions-report", dataset, "--out", f"{tmp_path}/report")
    assert out.endswith(f"17 images; written: {tmp_path}/report/report.json\n")
    assert caplog.messages == [
        f"{tmp_path}/report/lengths.png and others are not drawn: run pip install -e '.[report]' in the checkout"
    ]
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    status, _, err = command("captions-report", dataset)
    assert (status, "captions-report needs sacrebleu: run pip install -e '.[report]'" in err) == (2, True)


def test_a_report_is_formatted_as_a_table_and_written_as_json_and_plots(dataset: str) -> None:
    report = captions_report(dataset)
    paths = write_report(report, "memory://reports/captions")
    assert {path.rpartition("/")[2] for path in paths} == FILES
    for path in paths:
        with fsspec.open(path, "rb") as file:
            if path.endswith(".png"):
                assert min(Image.open(file).size) > 300
            else:
                assert json.load(file) == report

    console = Console(width=90, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(captions_table(report))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == ["namer", "repetitive", "true", "captions"]
    values = {tuple(line[:-3]): line[-3:] for line in lines[1:]}
    assert values["captions",][0] == "34"
    assert values["duplicates", "in", "an", "image"][2] == "-"
    assert values["similarity,", "images-only"] == ["-"] * 3
    mean = report["similarity"]["red"]["namer"]["mean"]
    assert values["similarity,", "red"][0].startswith(f"{mean:.3f}±")


def test_a_report_on_rows_without_captions_is_drawn(tmp_path: Path) -> None:
    silent = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {"characters": 1}}
    changes = {"captioners": {"silent": silent}, "input": {"captions": ["json:nothing"]}}
    report = captions_report(small_dataset(tmp_path, (3,), **changes))
    assert report["texts"][TRUE_CAPTION]["null"] == 1
    assert report["similarity"]["red"][TRUE_CAPTION]["mean"] is None
    assert len(write_report(report, str(tmp_path / "report"))) == 4
    captions_table(report)


def summary_of(*images: list[str] | None, count: int = 0) -> dict[str, Any]:
    statistics = TextStatistics(count or max(len(image or []) for image in images))
    statistics.add(images)
    return statistics.summary()


def test_distinct_ngrams_are_counted_over_all_captions_and_within_an_image() -> None:
    summary = summary_of(["A cat, a cat.", "a dog"], ["a cat", "the bird sings"])
    # Words: a cat a cat a dog | a cat the bird sings; distinct: a cat dog the bird sings.
    assert summary["distinct"]["1"] == pytest.approx(6 / 11)
    # Pairs: a-cat cat-a a-cat a-dog | a-cat the-bird bird-sings; none crosses the end of a caption.
    assert summary["distinct"]["2"] == pytest.approx(5 / 7)
    assert summary["distinct"]["3"] == pytest.approx(3 / 3)
    assert summary["distinct_within_image"]["1"] == pytest.approx([(2 / 4 + 2 / 2) / 2, (3 / 6 + 5 / 5) / 2])
    assert summary["distinct_within_image"]["2"] == pytest.approx([(2 / 3 + 1) / 2, (3 / 4 + 1) / 2])
    assert summary["distinct_within_image"]["3"] == pytest.approx([1, 1])


def test_lengths_duplicates_missing_end_marks_and_ends_mid_sentence_are_counted() -> None:
    summary = summary_of(["A dog's life - in 3 acts.", ""], ["one two", "one"])
    assert summary["lengths"] == {"0": 1, "1": 1, "2": 1, "6": 1}
    assert summary["words"] == pytest.approx(9 / 4)
    summary = summary_of(["a cat", "A cat!", "a dog"], ["a dog", "a bird", "a fish"], ["x", "y", "y"])
    assert summary["duplicates_within_image"] == pytest.approx(2 / 9)
    assert summary["duplicates_across_images"] == pytest.approx(2 / 9), "both captions `a dog`, and no others"
    summary = summary_of(
        ["a cat.", 'he says "stop!"', "a cat on the", "a cat"], ["猫です。", "it is of", "a cat and", "so?"]
    )
    assert summary["no_end_mark"] == pytest.approx(4 / 8)
    assert summary["ends_midway"] == pytest.approx(3 / 8)


def test_rows_without_captions_count_only_as_null_and_equal_captions_have_a_self_bleu_of_one() -> None:
    summary = summary_of(None, ["a cat", "a dog"], None, None)
    assert (summary["rows"], summary["captions"], summary["null"]) == (4, 2, 0.75)
    assert summary.keys() - {"rows", "captions"} == DEFINITIONS.keys()
    nothing = summary_of(None, count=2)
    assert (nothing["null"], nothing["words"], nothing["self_bleu"]) == (1.0, None, None)
    assert nothing["distinct"] == {"1": None, "2": None, "3": None}
    same = "a photo of a cat"
    assert summary_of([same] * 3, [same + " and a dog"] * 3)["self_bleu"] == pytest.approx(1)
    assert summary_of([same], ["another one of these"])["self_bleu"] is None
    assert summary_of([same, "two dogs run on green grass"])["self_bleu"] < 0.1


WORDS = st.lists(st.sampled_from(["a", "cat", "dog", "sits", "on", "the", "mat."]), min_size=1, max_size=9).map(
    " ".join
)


@given(st.lists(st.lists(WORDS, min_size=3, max_size=3), min_size=1, max_size=6), st.integers(0, 6))
def test_adding_images_in_parts_gives_the_same_statistics(images: list[list[str]], cut: int) -> None:
    whole, parts = TextStatistics(3), TextStatistics(3)
    whole.add(images)
    parts.add(images[:cut])
    parts.add(images[cut:])
    assert parts.summary() == whole.summary()
    captions = [text for image in images for text in image]
    others = [[text for j, text in enumerate(image) if j != i] for image in images for i in range(3)]
    assert whole.summary()["self_bleu"] == pytest.approx(bleu(captions, others))
