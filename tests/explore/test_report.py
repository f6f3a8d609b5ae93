"""The files of a report, without a browser."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import reinforce
from reinforce.dataset.kinds.registry import kind_of
from reinforce.errors import UserError
from reinforce.explore.report import inspect
from tests.helpers.data import tree
from tests.helpers.inspected import REFUSED, WITHOUT_CAPTION, hostile_dataset
from tests.helpers.reinforced import small_dataset
from tests.helpers.views import make_view

PAGES = ("index.html", "gallery.html", "captions.html", "plots.html")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return hostile_dataset(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def whole(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on all of it."""
    folder = tmp_path_factory.mktemp("whole") / "report"
    inspect(url, str(folder))
    return folder


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no charts, which take most of the time."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


files_of = functools.partial(tree, layers_only=False)


class Addresses(HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def check_addresses(folder: Path, *pages: str) -> None:
    """Assert that every address in the pages is a file of the report."""
    for address in [address for name in pages for address in Addresses((folder / name).read_text()).found]:
        if not address.startswith(("#", "data:,")):
            assert (folder / address.partition("#")[0]).is_file(), address


def test_equal_reports_are_equal_files_and_an_earlier_one_leaves_nothing(url: str, whole: Path, tmp_path: Path) -> None:
    inspect(url, str(tmp_path / "once"), limit=11, seed=3)
    shutil.copytree(whole, tmp_path / "again")
    other = files_of(tmp_path / "again")
    found = inspect(url, str(tmp_path / "again"), limit=11, seed=3)
    once = files_of(tmp_path / "once")
    assert once == files_of(tmp_path / "again")
    assert json.loads(once["report.json"])["files"] == sorted(set(once) - {"report.json"})
    assert once["gallery.html"] != other["gallery.html"]
    assert (found.rows, found.samples, found.exact) == (11, 42, True)
    text = Addresses(once["index.html"].decode()).text
    assert ("Looked at 11 of 42 samples" in text, "2 row groups" in text) == (True, True)


def test_addresses_are_files_of_the_report_and_quarantined_items_are_listed_with_their_reason(whole: Path) -> None:
    check_addresses(whole, *PAGES)
    assert not re.search(rb"https?://(?!example)", (whole / "gallery.html").read_bytes())
    text = Addresses((whole / "gallery.html").read_text()).text
    for key in REFUSED:
        assert re.search(rf"{key}\s+00000-\w+\s+image_\w+ in samples", text)
    assert "no_text in embeddings/red/caption" in text


@pytest.mark.usefixtures("without_charts")
def test_only_the_chosen_teachers_and_captioners_are_read(url: str, tmp_path: Path) -> None:
    inspect(url, str(tmp_path / "report"), ["blue"], [])
    plots = Addresses((tmp_path / "report" / "plots.html").read_text()).text
    assert "embeddings/blue/images" in plots
    assert "embeddings/red" not in plots
    assert "evil" not in Addresses((tmp_path / "report" / "captions.html").read_text()).text
    assert "needs two that have a logit scale" in plots
    with pytest.raises(UserError, match="green"):
        inspect(url, str(tmp_path / "other"), ["green"])


def test_a_dataset_without_texts_or_teachers_has_a_report(tmp_path: Path) -> None:
    for name, teachers in (("none", {}), ("images", {"only": {"class": "tests.helpers.models:ImageOnly"}})):
        data = small_dataset(tmp_path / name, (3,), teachers=teachers, captioners={})
        found = inspect(data, str(tmp_path / name / "report"))
        assert (found.rows, found.pictures) == (3, 3)
        for page in ("captions.html", "plots.html"):
            assert "No teacher has vectors of both" in (tmp_path / name / "report" / page).read_text()


@pytest.mark.usefixtures("without_charts")
def test_images_by_reference_are_shown_from_the_named_folder_only(tmp_path: Path) -> None:
    data = small_dataset(tmp_path, (4,), images="reference")
    found = inspect(data, str(tmp_path / "without"))
    assert (found.rows, found.pictures, found.problems) == (4, 0, 1)
    assert "add --images-from" in Addresses((tmp_path / "without" / "index.html").read_text()).text
    found = inspect(data, str(tmp_path / "with"), images_from=[str(tmp_path / "source")])
    assert (found.pictures, found.problems) == (4, 0)


@pytest.mark.usefixtures("without_charts")
def test_a_damaged_file_is_a_problem_and_without_matplotlib_the_numbers_of_charts_are_shown(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = shutil.copytree(url, tmp_path / "data")
    victim = min(data.glob("embeddings/red/images/*.parquet"))
    content = bytearray(victim.read_bytes())
    content[100:140] = bytes(40)
    victim.write_bytes(content)
    found = inspect(str(data), str(tmp_path / "report"))
    assert (found.rows, found.problems) == (30, 1)
    text = Addresses((tmp_path / "report" / "index.html").read_text()).text
    assert f"embeddings/red/images/{victim.name} cannot be read" in text
    page = (tmp_path / "report" / "plots.html").read_text()
    assert "<details open><summary>Numbers" in page
    assert 'role="img"' not in page
    assert "'.[report]'" in caplog.text


@pytest.mark.usefixtures("without_charts")
def test_other_files_in_a_folder_or_in_a_forged_list_of_a_report_stay_as_they_are(url: str, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "index.html").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        inspect(url, str(tmp_path / "thesis"))
    (tmp_path / "thesis" / "report.json").write_text('{"kind": "other", "files": ["index.html"]}')
    with pytest.raises(UserError, match="another program"):
        inspect(url, str(tmp_path / "thesis"))
    assert (tmp_path / "thesis" / "index.html").read_text() == "mine"
    with pytest.raises(UserError, match="not empty"):
        inspect(url, url)
    (tmp_path / "kept.html").write_text("kept")
    folder = tmp_path / "report"
    folder.mkdir()
    names = ["../kept.html", str(tmp_path / "kept.html"), "images/../../kept.html", 7]
    (folder / "report.json").write_text(json.dumps({"kind": "reinforce-inspect", "files": names}))
    inspect(url, str(folder), limit=4)
    assert (tmp_path / "kept.html").read_text() == "kept"


@pytest.mark.usefixtures("without_charts")
def test_a_report_in_an_object_store_has_the_types_that_browsers_need(url: str, s3: Any) -> None:
    inspect(url, "s3://bucket/report", limit=8)
    inspect(url, "s3://bucket/report", limit=4)
    types = {"index.html": "text/html", "report.css": "text/css", "report.js": "javascript"}
    for name, kind in types.items():
        assert kind in s3.info(f"bucket/report/{name}", refresh=True)["ContentType"], name
    names = {path.removeprefix("bucket/report/") for path in s3.find("bucket/report")}
    assert names == {"report.json", *json.loads(s3.cat("bucket/report/report.json"))["files"]}


SCORES = {"match": {"similarity": "red"}}


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset with scores and hostile captions, and a view by a threshold and by keys."""
    url = hostile_dataset(tmp_path_factory.mktemp("viewed"), scores=SCORES)
    make_view(url, {"keep": {"top": 0.5, "by": "scores.match.caption_mean"}}, "key NOT LIKE '%7'", name="best")
    return url


def thumbnails(page: str) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Value and key of each thumbnail by the headings above it, in the order of the pictures."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    heads = ["", ""]
    for match in re.finditer(
        r"<h2[^>]*>(.*?)</h2>|<h3[^>]*>(.*?)</h3>|<p>(?:<b>([^<]*)</b> )?(?:<a[^>]*>)?<bdi>(.*?)</bdi>", page
    ):
        section, side, value, key = match.groups()
        if key is None:
            heads = [section, ""] if section else [heads[0], side]
        else:
            found.setdefault((heads[0], heads[1]), []).append((value or "", key))
    return found


def test_samples_at_the_quantiles_of_a_score_are_shown(viewed: str, tmp_path: Path) -> None:
    found_lines = inspect(viewed, str(tmp_path / "report")).lines()
    found = {sample.key: sample.values["scores/match"]["caption_mean"] for sample in reinforce.open(viewed)}
    values = {key: value for key, value in found.items() if value is not None}
    ordered = sorted(values, key=values.__getitem__)
    shown = thumbnails((tmp_path / "report" / "plots.html").read_text())["Scores", "scores/match: caption_mean"]
    expected = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)]
    assert [key for _, key in shown] == expected
    [line] = [line for line in found_lines if line.startswith("scores/match: caption_mean: ")]
    assert line.endswith(f"100 % {values[ordered[-1]]:.4g} ({ordered[-1]})")
    assert [text for text, _ in shown][::6] == [f"0 %: {values[ordered[0]]:.4g}", f"100 %: {values[ordered[-1]]:.4g}"]


@pytest.mark.usefixtures("without_charts")
def test_a_report_on_a_view_has_its_samples_and_both_sides_of_each_rule(viewed: str, tmp_path: Path) -> None:
    view = reinforce.open(viewed, view="best")
    found = inspect(viewed, str(tmp_path / "report"), view="best")
    assert found.lines()[1].startswith("1 keep: ")
    assert (found.rows, found.samples, found.exact) == (len(view), len(view), True)
    page = (tmp_path / "report" / "view.html").read_text()
    sides = thumbnails(page)
    values = {sample.key: sample.values["scores/match"]["caption_mean"] for sample in reinforce.open(viewed)}
    ordered = sorted((key for key in values if values[key] is not None), key=lambda key: -values[key])
    half = round(len(ordered) / 2)
    near = "next to the threshold first"
    assert [key for _, key in sides["1 keep", f"Left out, {near}"]] == ordered[half : half + 12]
    assert [key for _, key in sides["1 keep", f"Kept, {near}"]] == ordered[:half][::-1][:12]
    assert {key for _, key in sides["1 keep", "Left out, without a value"]} == {*WITHOUT_CAPTION}
    assert {key for _, key in sides["2 where", "Left out"]} == {key for key in ordered[:half] if key.endswith("7")}
    assert {key for _, key in sides["2 where", "Kept"]} <= {sample.key for sample in view}
    check_addresses(tmp_path / "report", "view.html")
    assert re.findall("<script[^>]*>", page) == ['<script src="report.js">'], "captions stay text"
    before = files_of(tmp_path / "report")
    inspect(viewed, str(tmp_path / "report"), view="best")
    assert files_of(tmp_path / "report") == before
    inspect(viewed, str(tmp_path / "report"), limit=4)
    assert not (tmp_path / "report" / "view.html").exists()
    with pytest.raises(UserError, match="has no view 'worst'; it has: best"):
        inspect(viewed, str(tmp_path / "report"), view="worst")


def test_equal_patches_have_equal_colours_and_a_grid_may_have_few() -> None:
    kind = kind_of("patches/dino")
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 9)).astype(np.float32)
    values[0, 2, 3] = values[1, 0, 0]
    colours = kind.pictures(values, 8)
    assert (colours.shape, colours.dtype) == ((2, 3, 4, 3), np.uint8)
    assert np.array_equal(colours[0, 2, 3], colours[1, 0, 0])
    assert len(kind.pictures(values, 1)) == 1
    assert kind.pictures(values[:, :1, :1, :2], 8).shape == (2, 1, 1, 3)
    assert not len(kind.pictures(None, 8))
    assert kind.pictures(values * np.nan, 8).shape == (2, 3, 4, 3)
    # centred, so that a shift or a scale of all patches changes nothing
    assert np.abs(kind.pictures(3 * values + 1, 8).astype(int) - colours).max() <= 1


def test_a_report_shows_the_grids_of_the_crops(tmp_path: Path) -> None:
    patches = {"grid": 4, "codec": "float16", "sample": 100}
    teacher: dict[str, Any] = {"class": "tests.helpers.models.patches:PatchTeacher", "options": {"size": 16}}
    teachers = {"dino": {**teacher, "patches": patches}, "plain": teacher}
    url = small_dataset(tmp_path, (9,), captioners={}, teachers=teachers)
    inspect(url, str(tmp_path / "report"))
    files = sorted((tmp_path / "report" / "images").glob("*-grids-*.webp"))
    assert files
    count = len(next(iter(reinforce.open(url))).augmentations)
    with Image.open(files[0]) as picture:
        assert picture.size == (144 * count, 144)
    page = (tmp_path / "report" / "gallery.html").read_text()
    assert page.count('<figure class="grids">') == len(files)
    assert "<code>patches/dino</code>" in page
    assert "patches/plain" not in page
