"""python -m reinforce_docs.check: the style of pages and modules, a part of ``make lint``; prints what to mend.

Links between pages lead somewhere, blocks of code name a language, lines of pages have at most 120 characters, the
index names every page, and what is to stay short does. A module has at most 900 lines, a package a first line.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Pages that programs write.
GENERATED = {"docs/ablations.md", "docs/hostile.md"}
LANGUAGES = {"console", "python", "yaml", "mermaid", "text"}
LINE, MODULE, README, TEACHER, BARE = 120, 900, 130, 25, 6
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://)([^)\s]*)\)")
_HEADING = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)


def main() -> None:
    found = [*_all_problems(ROOT)]
    print("\n".join(found) or "pages and modules: no problem")
    sys.exit(bool(found))


def _all_problems(root: Path) -> Iterator[str]:
    pages = sorted([*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("configs/*/*.md")])
    for page in pages:
        yield from page_problems(page, root)
    yield from _index_problems(pages, root)
    for package in ("reinforce", "teachers"):
        for module in sorted((root / package).rglob("*.py")):
            yield from module_problems(module, root)


def links(text: str) -> list[str]:
    """Targets of the links and pictures of a page that stay in the repository."""
    return _LINK.findall(_FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Names by which GitHub links to the headings of a page."""
    headings = _HEADING.findall(_FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def page_problems(page: Path, root: Path) -> Iterator[str]:
    """Links that lead nowhere, blocks of no known language, and lines that are too long."""
    name, text = str(page.relative_to(root)), page.read_text(encoding="utf-8")
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield f"{name}: the link {link} leads nowhere"
    for block in _FENCE.finditer(text):
        if block[1] not in LANGUAGES:
            at = text.count("\n", 0, block.start()) + 1
            yield f"{name}:{at}: a block needs one of {', '.join(sorted(LANGUAGES))}"
    for number, line in enumerate(text.splitlines() if name not in GENERATED else (), start=1):
        if len(line) > LINE and not line.lstrip().startswith("|"):
            yield f"{name}:{number}: {len(line)} characters, and {LINE} are allowed"


def module_problems(module: Path, root: Path) -> Iterator[str]:
    """Modules that are too long, and packages whose subject has no name."""
    name, text = str(module.relative_to(root)), module.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > MODULE:
        yield f"{name}: {lines} lines, and {MODULE} are allowed"
    if module.name == "__init__.py" and not ast.get_docstring(ast.parse(text)):
        yield f"{name}: a docstring with the subject of the package is missing"
    elif not (module.parent / "__init__.py").exists():
        yield f"{module.parent.relative_to(root)}: __init__.py is missing"


def _index_problems(pages: list[Path], root: Path) -> Iterator[str]:
    """Pages that the index lacks, and what is to stay short."""
    index = {link.partition("#")[0] for link in links((root / "docs/README.md").read_text(encoding="utf-8"))}
    for page in pages:
        if page.parent.name == "docs" and page.name not in {*index, "README.md"}:
            yield f"docs/README.md: a link to {page.name} is missing"
    for name, start, most in (
        ("README.md", None, README), ("docs/teachers.md", "", TEACHER), ("docs/reading.md", "import glob", BARE),
    ):  # fmt: skip
        text = (root / name).read_text(encoding="utf-8")
        shown = [block[2] for block in _FENCE.finditer(text) if block[1] == "python"]
        for part in [text] if start is None else [one for one in shown if one.startswith(start)]:
            if (lines := len(part.strip().splitlines())) > most:
                yield f"{name}: {lines} lines, and {most} are allowed" + " of this Python" * (start is not None)


if __name__ == "__main__":
    main()
