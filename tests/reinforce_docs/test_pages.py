"""The pages of the site: complete, linked inside the site, listed in its navigation, and without outside requests."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from reinforce_docs.offline import REDIRECTS, find_any_word, make_offline, outside_requests, write_redirects
from reinforce_docs.pages import _LINK, ROOT, adapt, first_screen, source_pages, write_pages
from tests.helpers.pages import anchors


def listed(entries: list[object]) -> list[str]:
    values = [value for entry in entries for value in (entry.values() if isinstance(entry, dict) else [entry])]
    return [name for value in values for name in (listed(value) if isinstance(value, list) else [str(value)])]


def test_every_page_is_written_and_once_in_the_navigation_and_links_lead_to_pages_of_the_site(tmp_path: Path) -> None:
    written = tmp_path / "docs"
    write_pages(written)
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [path.relative_to(written) for path in written.rglob("*.md") if "files" not in path.parts]
    assert {*source_pages()} <= {*pages}
    assert sorted(listed(site["nav"])) == sorted(map(str, pages))
    [styles] = site["extra_css"]
    assert "math {" in (written / styles).read_text(encoding="utf-8")
    for page in pages:
        for link in _LINK.findall((written / page).read_text(encoding="utf-8")):
            assert ((written / page).parent / link[1]).exists(), f"{page}: {link[1]}"


def test_diagrams_become_the_picture_files_become_pages_and_equations_stay_in_their_paragraph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: set[Path] = set()
    text = (
        "See [it](../reinforce/config.py) and [that](data.md#limits), `[code](x.py)`.\n\n```mermaid\nflowchart\n```\n"
    )
    adapted = adapt(text, Path("docs/page.md"), shown)
    assert "[it](../files/reinforce/config.py.md) and [that](data.md#limits)" in adapted
    assert "![How a run works](run.svg)" in adapted
    assert shown == {Path("reinforce/config.py")}
    convert = SimpleNamespace(convert=lambda text, display="inline": f"<math>{text}</math>")
    monkeypatch.setitem(sys.modules, "latex2mathml", SimpleNamespace(converter=convert))
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", convert)
    adapted = adapt("$s$ is a scale, and $$Q$$", Path("docs/page.md"), set())
    assert adapted == "<span><math>s</math></span> is a scale, and \n<math>Q</math>\n"


def test_a_request_to_another_host_is_found_and_a_link_is_none(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text('<a href="https://arxiv.org/abs/2311.17049">paper</a>')
    assert outside_requests(tmp_path) == []
    for markup in (
        '<script src="https://unpkg.com/x"></script>',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<img alt="x" src="//cdn.example/x.png">',
        "<style>@import url(https://example.org/a.css)</style>",
    ):
        (tmp_path / "page.html").write_text(markup)
        assert len(outside_requests(tmp_path)) == 1, markup


def test_the_script_of_the_search_is_in_the_site(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/page.html").write_text('<script src="https://unpkg.com/iframe-worker/shim"></script>')
    make_offline(tmp_path)
    assert outside_requests(tmp_path) == []
    assert 'src="../assets/iframe-worker.js"' in (tmp_path / "sub/page.html").read_text()
    assert "MIT" in (tmp_path / "assets/iframe-worker.js").read_text()


def test_the_first_screen_has_the_line_of_installation_and_leads_from_photos_to_a_model() -> None:
    text = first_screen((ROOT / "README.md").read_text())
    assert "\n```console\npip install dataset-reinforcement\n```\n" in text[:800]
    assert "[Your photos to a small model](docs/photos.md){ .md-button .md-button--primary }" in text[:1000]


WORKER = 'parser:n=>Yt(n,"and",s=>({field:"*",value:te(s.value),range:{}})),compiler:Jt'


def test_the_search_wants_any_word_that_is_no_stop_word_and_another_theme_is_reported(tmp_path: Path) -> None:
    worker = tmp_path / "assets/javascripts/workers/search.c47bb847.min.js"
    worker.parent.mkdir(parents=True)
    worker.write_text(WORKER)
    find_any_word(tmp_path)
    words, parser = worker.read_text().split(";parser", 1)
    assert {"the", "how", "to"} <= {*json.loads(words.removeprefix("self.stopWords=new Set(").removesuffix(")"))}
    assert parser.startswith(':n=>Yt(n,"or",s=>self.stopWords.has(s.value.toLowerCase())?void 0:({field:"*",')
    with pytest.raises(ValueError, match="was found 0 times"):
        find_any_word(tmp_path)


def test_former_pages_lead_to_sections_of_pages_that_exist(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    write_redirects(tmp_path)
    for old, new in REDIRECTS.items():
        page, _, section = new.partition("#")
        assert not (ROOT / f"docs/{old}.md").exists()
        assert section in {"", *anchors(f"docs/{page}.md")}, new
        name = f"{page}.html".replace("README", "index") + f"#{section}" * bool(section)
        found = tmp_path / f"docs/{old}.html"
        [target] = re.findall(r'content="0; url=([^"]+)"', found.read_text())
        assert (found.parent / target).resolve() == tmp_path / "docs" / name
    assert outside_requests(tmp_path) == []
