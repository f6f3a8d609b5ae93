"""The Markdown pages of the repository: their blocks of code, headings and links."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_docs import check

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is its first line of content."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def under(self) -> str:
        """The heading that the block is under."""
        before = "\n".join(read_page(self.page).splitlines()[: self.line - 2])
        return _HEADING.findall(_FENCE.sub("", before + "\n"))[-1]

    @property
    def file(self) -> str | None:
        """The file that the block shows part of, by a comment in its first line such as ``# my.yaml``."""
        found = re.match(r"# (\S+\.(?:yaml|py))\s*$", self.text.partition("\n")[0])
        return found[1] if found else None

    def commands(self) -> list[list[str]]:
        """The words of each command of a console block, without comments."""
        lines = self.text.replace("\\\n", " ").replace(" && ", "\n").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def pages() -> list[str]:
    """Paths of all pages, relative to the root of the repository."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*/*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page, or those of some languages."""
    text = read_page(page)
    found = [Block(page, text[: m.start()].count("\n") + 2, m[1], m[2]) for m in _FENCE.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in pages() for block in blocks(page, *languages)]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", read_page(page))


def inline_code(page: str) -> list[str]:
    """The code spans in the sentences and tables of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def measured(name: str) -> dict[str, Any]:
    """The results of a benchmark, by which pages are written."""
    results: dict[str, Any] = json.loads(read_page(f"benchmarks/results/{name}.json"))
    return results


def links(page: str) -> list[str]:
    """Targets of the links and pictures of a page that stay in the repository."""
    return check.links(read_page(page))


def anchors(page: str) -> set[str]:
    """Names by which GitHub links to the headings of a page."""
    return check.anchors(read_page(page))
