"""The built site without requests to other hosts: what a browser would fetch is found, and the one script is replaced.

The search of the theme uses a web worker, which browsers do not start for pages from a disk. The theme loads a small
script for that from a CDN; the site has a copy of it, ``iframe-worker.js``.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

SCRIPT = Path(__file__).with_name("iframe-worker.js")
_CDN = re.compile(r"https://unpkg\.com/iframe-worker/shim")
#: What a browser fetches when it shows a page: scripts, pictures, frames and style sheets. Links are not.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?(https?:)?//[^"'\s>]+"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?(https?:)?//[^"'\s>]+"""
    r"""|@import\s+(?:url\()?["']?(https?:)?//\S+|url\(["']?(https?:)?//[^)]+"""
)


def make_offline(site: Path) -> None:
    """Replace the script of the CDN in all pages of a built site."""
    shutil.copy(SCRIPT, site / "assets" / SCRIPT.name)
    for page in site.rglob("*.html"):
        local = os.path.relpath(site / "assets" / SCRIPT.name, page.parent)
        page.write_text(_CDN.sub(local, page.read_text(encoding="utf-8")), encoding="utf-8")


def outside_requests(site: Path) -> list[str]:
    """What pages and style sheets of a built site would fetch from other hosts, one line for each."""
    files = [path for ending in ("*.html", "*.css") for path in sorted(site.rglob(ending))]
    return [
        f"{path.relative_to(site)}: {found[0]}"
        for path in files
        for found in _FETCHED.finditer(path.read_text(encoding="utf-8"))
    ]
