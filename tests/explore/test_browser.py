"""Reports in a browser: Debian's chromium, driven by playwright. Skipped where one of them is missing."""

from __future__ import annotations

import functools
import http.server
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reinforce.explore import gallery
from reinforce.explore.report import inspect
from tests.helpers.inspected import REFUSED, SCRIPT, WITHOUT_CAPTION, hostile_dataset
from tests.helpers.web import serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")

OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-software-rasterizer", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PAGES = ("index.html", "gallery.html", "contents.html", "captions.html", "plots.html")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report that has pictures of some samples only."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "_RANDOM", 6)
        patch.setattr(gallery, "_RANKED", 4)
        inspect(hostile_dataset(folder), str(folder / "report"))
    return folder / "report"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        yield context


class Watched:
    """A page, what it has asked for, and what went wrong in it."""

    def __init__(self, page: Any) -> None:
        self.page, self.requests, self.errors = page, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", self._note_failure)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: self.errors.append(dialog.message))

    def _note_failure(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # by a reload, before an image had come
            self.errors.append(f"{request.url} failed: {request.failure}")


@pytest.fixture
def watched(context: Any) -> Iterator[Watched]:
    watched = Watched(context.new_page())
    yield watched
    watched.page.close()
    assert watched.errors == []
    assert [url for url in watched.requests if not url.startswith(("file://", "http://127.0.0.1:", "data:"))] == []


def shown(page: Any) -> list[str]:
    """The titles of the cards that are shown, in order."""
    titles: list[str] = page.locator(".card:not([hidden]) h2").all_inner_texts()
    return titles


def choose(page: Any, tab: str) -> None:
    page.locator(f"input[name=tab][value={tab}]").check(force=True)


def test_pages_open_from_disk_and_from_a_server_with_names_for_screen_readers(report: Path, watched: Watched) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(report))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with serving(handler) as url:
        for root in (f"file://{report}", url):
            for name in PAGES:
                watched.page.goto(f"{root}/{name}", wait_until="networkidle")
                heading = "Summary" if name == "index.html" else name.removesuffix(".html").capitalize()
                assert watched.page.locator("h1").inner_text() == heading
                if root != url:
                    check_names(watched.page)
    assert len(watched.requests) > 20


def check_names(page: Any) -> None:
    """Assert that landmarks, images and tables have names, and that headings are nested."""
    counts = {role: page.get_by_role(role).count() for role in ("banner", "navigation", "main", "contentinfo")}
    assert counts == {"banner": 1, "navigation": 1, "main": 1, "contentinfo": 1}
    unnamed = "img:not([alt]), table:not(:has(caption)), [role=img]:not([aria-label]), input[type=search]:not([id])"
    assert [found.inner_html() for found in page.locator(unnamed).all()] == []
    names = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(names) == len(set(names))
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_markup_in_captions_and_keys_stays_text(report: Path, watched: Watched) -> None:
    page = watched.page
    page.goto(f"file://{report}/gallery.html#tab=key")
    page.fill("#query", "<script>")
    assert page.locator(".card:not([hidden])").first.locator("bdi", has_text=SCRIPT).count() >= 1
    page.locator("#found-list li").first.wait_for(state="attached")  # built by the script
    assert SCRIPT in page.locator("#found-list li").first.inner_text()
    own = "[...document.scripts].map((script) => script.getAttribute('src'))"
    assert all(source.startswith(("report.js", "data/rows-")) for source in page.evaluate(own))
    assert page.evaluate("document.querySelectorAll('main img[onerror], main svg[onload], [onmouseover]').length") == 0
    assert page.evaluate("window.attacked") is None


def test_search_and_tabs_choose_samples(report: Path, watched: Watched) -> None:
    page = watched.page
    page.goto(f"file://{report}/gallery.html")
    assert len(shown(page)) == 6
    page.fill("#query", "قطة")
    page.locator("#status").filter(has_text="with a picture", has_not_text="loaded").wait_for(state="attached")
    everything = page.locator("main").inner_text()
    assert "قطة سوداء" in everything
    assert "thing 3 of shard 1" not in everything
    page.fill("#query", "no caption has these words")
    page.locator("#status").filter(has_not_text="loaded").wait_for(state="attached")
    assert page.locator("#nothing").is_visible()
    page.fill("#query", "")
    choose(page, "key")
    places = [*zip(page.locator(".card:not([hidden]) .where bdi").all_inner_texts(), shown(page), strict=True)]
    assert places == sorted(places)
    choose(page, "disagree")
    agreement = [float(text.split()[-1]) for text in page.locator(".card:not([hidden]) .agreement").all_inner_texts()]
    assert len(agreement) == 4
    assert agreement == sorted(agreement)
    choose(page, "quarantine")
    assert set(shown(page)) == {*REFUSED, *WITHOUT_CAPTION}
    card = page.locator(".card:not([hidden])", has_text=REFUSED[0])
    assert card.locator(".refusal").inner_text().startswith("image_")
    page.reload()  # the address keeps the tab
    assert set(shown(page)) == {*REFUSED, *WITHOUT_CAPTION}


def test_words_are_searched_in_all_tabs_and_samples_sorted_and_filtered(report: Path, watched: Watched) -> None:
    page = watched.page
    page.goto(f"file://{report}/gallery.html#tab=quarantine")
    page.fill("#query", "THING shard 1")
    page.locator("#status").filter(has_not_text="loaded").wait_for(state="attached")
    titles = [*shown(page), *page.locator("#found-list b").all_inner_texts()]
    assert sorted(titles) == [f"001{number:05d}" for number in range(30)], "of every tab, and without a picture"
    page.fill("#query", "")
    choose(page, "key")
    everything = len(shown(page))
    numbers = "[...document.querySelectorAll('.card:not([hidden])')].map((c) => c.dataset.numbers.split(' ')[{}])"
    for measure, title in enumerate(page.locator("#by option").all_inner_texts()[1:]):
        page.select_option("#by", str(measure))
        found = [float(text) for text in page.evaluate(numbers.format(measure))]
        assert found == sorted(found), title
        assert 0 < len(found) <= everything
        page.check("#down")
        assert [float(text) for text in page.evaluate(numbers.format(measure))] == sorted(found, reverse=True)
        middle = sorted(found)[len(found) // 2]
        page.fill("#least", str(middle))
        assert min(float(text) for text in page.evaluate(numbers.format(measure))) == middle
        page.reload()  # the address keeps them
        assert page.input_value("#least") == str(middle)
        assert min(float(text) for text in page.evaluate(numbers.format(measure))) == middle
        page.fill("#least", "")
        page.uncheck("#down")
    assert title == "words of the true caption"
    page.fill("#least", "1e9")
    assert page.locator("#nothing").is_visible()


def test_the_keyboard_reaches_everything_and_focus_is_visible(report: Path, watched: Watched) -> None:
    page = watched.page
    page.goto(f"file://{report}/gallery.html")
    outline = """() => {
      const active = document.activeElement;
      const drawn = active.matches(".tabs input") ? active.nextElementSibling : active;
      const style = getComputedStyle(drawn);
      const name = active.id || active.name || active.textContent.trim();
      return [name, style.outlineStyle, parseFloat(style.outlineWidth)];
    }"""
    stops = []
    for _ in range(10):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(outline))
    names = [name for name, *_ in stops]
    pages = ["Summary", "Gallery", "Contents", "Captions", "Plots"]
    assert names == ["Skip to the content", *pages, "theme", "tab", "query", "by"]
    assert [(style, width) for _, style, width in stops if style == "none" or width < 2] == []
    for _ in range(2):
        page.keyboard.press("Shift+Tab")  # to the tabs
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "key"
    assert len(shown(page)) > 6
    page.locator("#theme").focus()
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.keyboard.press("Space")
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    assert page.evaluate(ground) != light
    page.keyboard.press("Space")
    assert page.evaluate(ground) == light
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_pages_fit_a_phone_and_follow_the_colours_of_the_system(report: Path, browser: Any) -> None:
    with browser.new_context(viewport={"width": 360, "height": 800}) as context:
        page = context.new_page()
        for name, colours in itertools.product(PAGES, ("light", "dark")):
            page.emulate_media(color_scheme=colours)
            page.goto(f"file://{report}/{name}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground.startswith("rgb(2") == (colours == "light")
