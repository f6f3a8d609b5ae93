from __future__ import annotations

import ast

from schemas import Reason
from tests.hostile.elsewhere import DATASETS, OTHERS, PROCESSES, STORAGE
from tests.hostile.table import DOCUMENT, ROOT, document


def test_the_page_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "generate it: python -m tests.hostile.table"


def test_the_tests_on_the_page_exist() -> None:
    for _, _, test in [*OTHERS, *DATASETS, *PROCESSES, *STORAGE]:
        file, _, name = test.partition("::")
        names = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in names, test


def test_every_reason_is_on_the_page() -> None:
    page = document()
    assert [reason.value for reason in Reason if f"`{reason.value}`" not in page] == []
