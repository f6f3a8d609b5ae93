"""Addresses of pages that earlier versions of the site had, which lead to the pages that have their content now."""

from __future__ import annotations

import html
from pathlib import Path

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
