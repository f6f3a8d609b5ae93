"""The pages of the site: those of the repository with links that lead inside the site, and the reference."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from reinforce_docs import api, commands, formats, keys, variables

ROOT = Path(__file__).parents[1]
REFERENCE: dict[str, Callable[[], str]] = {
    "commands": commands.commands_page,
    **{f"config-{name}": (lambda name=name: keys.keys_page(name)) for name in keys.CONFIGS},  # type: ignore[misc]
    "columns": formats.formats_page,
    "environment": variables.variables_page,
    "python": api.api_page,
}
_LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?://|#)([^)\s#]+)(#[^)\s]*)?\)")
_INSTALL = re.compile(r"^`(pip install [^`]+)`, then go from \[([^\]]+)\]\(([^)]+)\)\.$", re.MULTILINE)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".cff": "yaml"}
#: The picture that stands in the site for the diagrams, which the repository's host draws.
PICTURE = "docs/run.svg"
STYLES = Path(__file__).with_name("site.css")


def source_pages() -> list[Path]:
    """The Markdown pages of the repository, relative to its root."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*/*.md"), *ROOT.glob("deploy/*.md")]
    return sorted(path.relative_to(ROOT) for path in found)


def write_pages(folder: Path) -> None:
    """Write pages, pictures, styles, shown files and the reference to a new folder, in the layout of the repository."""
    shutil.rmtree(folder, ignore_errors=True)
    shown: set[Path] = set()
    for page in source_pages():
        text = adapt((ROOT / page).read_text(encoding="utf-8"), page, shown)
        if page == Path("README.md"):
            text = first_screen(text)
        _write(folder / page, text)
    for path in sorted(shown):
        _write(folder / shown_as(path), show(path))
    for name, render in REFERENCE.items():
        _write(folder / "docs/reference" / f"{name}.md", render())
    for picture in [*ROOT.glob("docs/*.webp"), *ROOT.glob("docs/*.svg"), *ROOT.glob("docs/**/*.png")]:
        target = folder / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    shutil.copy(STYLES, folder / STYLES.name)


def first_screen(text: str) -> str:
    """The first page with its line of installation as code that can be copied, and the first pages as buttons."""

    def show_first(found: re.Match[str]) -> str:
        title, page = found[2], found[3]
        first = f"[{title[0].upper()}{title[1:]}]({page}){{ .md-button .md-button--primary }}"
        return f"\n```console\n{found[1]}\n```\n\n{first} [Tutorial](docs/tutorial.md){{ .md-button }}"

    return _INSTALL.sub(show_first, text, count=1)


def adapt(text: str, page: Path, shown: set[Path]) -> str:
    """A page for the site: links to files of the repository lead to pages that show them, which are added to ``shown``.

    Diagrams become the picture, and equations MathML, so that no script is loaded for them.
    """
    picture = os.path.relpath(PICTURE, page.parent)
    pieces, end = [], 0
    for fence in _FENCE.finditer(text):
        pieces.append(_adapt_prose(text[end : fence.start()], page, shown))
        pieces.append(f"![How a run works]({picture})" if fence[1] == "mermaid" else fence[0])
        end = fence.end()
    return "".join([*pieces, _adapt_prose(text[end:], page, shown)])


def shown_as(path: Path) -> Path:
    """The page that shows a file or a folder of the repository."""
    return Path("files") / f"{path}.md"


def show(path: Path) -> str:
    """A page with the content of a file, or with the files of a folder. The search leaves it out."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if (ROOT / path).is_dir():
        return head + "".join(f"- `{name}`\n" for name in sorted(os.listdir(ROOT / path)) if name[0] not in "._")
    content = (ROOT / path).read_text(encoding="utf-8")
    if len(content) > 200_000:
        return head + f"{len(content):,} characters; see the repository.\n"
    fence = "`" * (3 + max((len(run) for run in re.findall(r"`{3,}", content)), default=0))
    return f"{head}{fence}{_LANGUAGES.get(path.suffix, 'text')}\n{content}\n{fence}\n"


def _adapt_prose(text: str, page: Path, shown: set[Path]) -> str:
    def link(found: re.Match[str]) -> str:
        if found[2] is None:  # a code span
            return found[0]
        target = Path(os.path.normpath(page.parent / found[2]))
        if target.suffix in (".md", ".png", ".svg", ".webp"):
            return found[0]
        shown.add(target)
        return f"{found[1]}{os.path.relpath(shown_as(target), page.parent)})"

    text = re.sub(f"{_LINK.pattern}|`[^`]+`", link, text)
    parts = (part for part in re.split(r"(`[^`]+`)", text) if part)
    return "".join(part if part[0] == "`" else _equations(part) for part in parts)


def _equations(text: str) -> str:
    """Replace ``$$...$$`` and ``$...$`` by MathML, where the converter is installed (extra ``docs``)."""
    try:
        from latex2mathml.converter import convert
    except ImportError:
        return text
    text = re.sub(
        r"\$\$(.+?)\$\$", lambda found: f"\n{convert(found[1].strip(), display='block')}\n", text, flags=re.DOTALL
    )
    # In a span, since Markdown takes <math> at the start of a line for a paragraph of its own.
    inline = r"(?<![\w$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])"
    return re.sub(inline, lambda found: f"<span>{convert(found[1])}</span>", text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
