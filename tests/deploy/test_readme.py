"""deploy/README.md names the files that there are."""

from __future__ import annotations

import re
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_each_link_has_a_file_and_each_file_is_linked() -> None:
    text = (DEPLOY / "README.md").read_text()
    links = {(DEPLOY / link.split("#")[0]).resolve() for link in re.findall(r"\]\(([^)]+)\)", text)}
    assert [link for link in links if not link.exists()] == []
    files = {path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path not in links and path.parent not in links} == {DEPLOY / "README.md"}
