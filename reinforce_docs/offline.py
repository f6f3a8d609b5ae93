"""The built site: its search, no requests to other hosts, and addresses of pages that earlier versions had.

What a browser would fetch is found, and the one script is replaced.

The search of the theme uses a web worker, which browsers do not start for pages from a disk. The theme loads a small
script for that from a CDN; the site has a copy of it, ``iframe-worker.js``.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from pathlib import Path

SCRIPT = Path(__file__).with_name("iframe-worker.js")
_CDN = re.compile(r"https://unpkg\.com/iframe-worker/shim")
#: The parser of the search of the theme, which wants all words of a query, and makes an operand of each.
_PARSER = re.compile(r'"and",(\w+)=>\(\{field:"\*"')
#: Words that say nothing of what is looked for.
STOP_WORDS = (
    *("a", "about", "an", "and", "any", "are", "as", "at", "be", "by", "can", "do", "does", "for", "from", "get"),
    *("have", "how", "i", "if", "in", "into", "is", "it", "its", "me", "my", "of", "on", "or", "our", "so", "that"),
    *("the", "their", "them", "then", "there", "these", "this", "to", "use", "using", "was", "we", "what", "when"),
    *("where", "which", "who", "why", "will", "with", "you", "your"),
)
#: What a browser fetches when it shows a page: scripts, pictures, frames and style sheets. Links are not.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?(https?:)?//[^"'\s>]+"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?(https?:)?//[^"'\s>]+"""
    r"""|@import\s+(?:url\()?["']?(https?:)?//\S+|url\(["']?(https?:)?//[^)]+"""
)
#: Name of a former page in docs/ -> the page there, with the anchor of a section where it has become one.
REDIRECTS = {
    "citing": "README#how-to-cite",
    "cookbook": "runs#recipes",
    "devices": "shipping",
    "glossary": "file-formats#words",
    "guide-data-engineer": "README#where-to-begin",
    "guide-migrating": "comparison",
    "guide-ml-engineer": "README#where-to-begin",
    "guide-researcher": "README#where-to-begin",
    "how-it-works": "runs",
    "inspect": "reading#a-report",
    "latency": "shipping#latency",
    "monitoring": "clusters#metrics",
    "named-teachers": "teachers#models-by-name",
    "published-sets": "labels#published-sets",
    "raygen": "comparison#from-raygen",
    "reference/exit-statuses": "command-line#errors",
    "reference/reasons": "bad-data#reasons",
    "reproduce": "recipes#reproduce-the-published-numbers",
    "scores": "choosing#scores",
    "sources": "data#source",
    "sql": "reading#sql-and-frames",
    "temperature-tuning": "loss#temperature-tuning",
    "transfer": "ablations#what-a-student-learns-from-stored-embeddings",
}
_PAGE = """<!doctype html>
<meta charset="utf-8"><title>Moved</title>
<meta http-equiv="refresh" content="0; url={target}"><link rel="canonical" href="{target}">
<p>This page has moved: <a href="{target}">{target}</a></p>
"""


def make_offline(site: Path) -> None:
    """Replace the script of the CDN in all pages of a built site."""
    shutil.copy(SCRIPT, site / "assets" / SCRIPT.name)
    for page in site.rglob("*.html"):
        local = os.path.relpath(site / "assets" / SCRIPT.name, page.parent)
        page.write_text(_CDN.sub(local, page.read_text(encoding="utf-8")), encoding="utf-8")


def find_any_word(site: Path) -> None:
    """Let the search of a built site find pages with any word of a query, without stop words; those with more words
    come first. Raises ValueError if the theme has another search than the one that is known.
    """
    [worker] = site.glob("assets/javascripts/workers/search.*.js")
    words = json.dumps(STOP_WORDS)
    operand = r'"or",\1=>self.stopWords.has(\1.value.toLowerCase())?void 0:({field:"*"'
    text, count = _PARSER.subn(operand, worker.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{worker}: the parser of queries was found {count} times. Adapt reinforce_docs.offline.")
    worker.write_text(f"self.stopWords=new Set({words});{text}", encoding="utf-8")


def outside_requests(site: Path) -> list[str]:
    """What pages and style sheets of a built site would fetch from other hosts, one line for each."""
    files = [path for ending in ("*.html", "*.css") for path in sorted(site.rglob(ending))]
    return [
        f"{path.relative_to(site)}: {found[0]}"
        for path in files
        for found in _FETCHED.finditer(path.read_text(encoding="utf-8"))
    ]


def write_redirects(site: Path) -> None:
    """Write the former pages into a built site."""
    for old, new in REDIRECTS.items():
        page, anchor, section = new.partition("#")
        # The site generator makes the index of a folder of its README.
        name = "index" if page == "README" else page
        target = html.escape("../" * old.count("/") + f"{name}.html{anchor}{section}")
        path = site / "docs" / f"{old}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_PAGE.format(target=target), encoding="utf-8")
