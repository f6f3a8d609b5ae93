"""docs/hostile.md: its tables are those of the cases, and the tests that it names exist."""

from __future__ import annotations

import ast

from schemas import Reason
from tests.hostile.table import DOCUMENT, ROOT, document, named_tests


def test_the_tables_are_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "generate them: python -m tests.hostile.table"


def test_the_tests_on_the_page_exist() -> None:
    named = named_tests()
    assert len(named) > 70
    functions = {
        file: {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        for file in {file for file, _ in named}
    }
    assert [(file, name) for file, name in named if name not in functions[file]] == []


def test_every_reason_is_on_the_page() -> None:
    page = document()
    assert [reason.value for reason in Reason if f"`{reason.value}`" not in page] == []
