"""``python -m reinforce_docs.check``: what it finds in pages and modules."""

from __future__ import annotations

from pathlib import Path

from reinforce_docs.check import module_problems, page_problems


def test_dead_links_unnamed_blocks_and_long_lines_of_a_page_are_named(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# The other page\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#the-other-page) [b](https://x.org/y)\n\n```yaml\n[c](none.md): 1\n```\n| " + "x" * 130
    )
    assert [*page_problems(page, tmp_path)] == []
    page.write_text(f"[a](other.md#the-end) [b](none.md)\n\n```\nx\n```\n{'x' * 121}\n")
    assert [*page_problems(page, tmp_path)] == [
        "page.md: the link other.md#the-end leads nowhere",
        "page.md: the link none.md leads nowhere",
        "page.md:3: a block needs one of console, mermaid, python, text, yaml",
        "page.md:6: 121 characters, and 120 are allowed",
    ]


def test_long_modules_and_packages_without_a_subject_are_named(tmp_path: Path) -> None:
    module, package = tmp_path / "a/long.py", tmp_path / "a/__init__.py"
    module.parent.mkdir()
    module.write_text("x = 1\n" * 900)
    assert [*module_problems(module, tmp_path)] == ["a: __init__.py is missing"]
    package.write_text("x = 1\n")
    module.write_text("x = 1\n" * 901)
    assert [*module_problems(module, tmp_path)] == ["a/long.py: 901 lines, and 900 are allowed"]
    assert [*module_problems(package, tmp_path)] == [
        "a/__init__.py: a docstring with the subject of the package is missing"
    ]
