from __future__ import annotations

import ast

from schemas import Reason
from tests.hostile.table import DOCUMENT, OTHERS, PROCESSES, ROOT, STORAGE, document


def test_the_page_says_what_the_tests_show() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "write it anew: python -m tests.hostile.table"


def test_the_tests_that_the_page_names_exist() -> None:
    for _, _, test in [*OTHERS, *PROCESSES, *STORAGE]:
        file, _, name = test.partition("::")
        names = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in names, test


def test_every_reason_is_on_the_page() -> None:
    page = document()
    assert [reason.value for reason in Reason if f"`{reason.value}`" not in page] == []
