"""docs/hostile.md: it is that of the cases, and the tests that faults.txt names exist."""

from __future__ import annotations

import ast

from schemas import Reason
from tests.hostile.table import DOCUMENT, FAULTS, ROOT, document, named_tests


def test_the_page_is_up_to_date_and_with_the_faults_names_every_reason() -> None:
    page = document()
    assert DOCUMENT.read_text(encoding="utf-8") == page, "write it: python -m tests.hostile.table"
    text = page + FAULTS.read_text(encoding="utf-8")
    assert [reason.value for reason in Reason if f"`{reason.value}`" not in text] == []


def test_the_tests_of_the_faults_exist() -> None:
    named = named_tests()
    assert len(named) > 70
    functions = {
        file: {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        for file in {file for file, _ in named}
    }
    assert [(file, name) for file, name in named if name not in functions[file]] == []
