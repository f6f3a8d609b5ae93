"""Generate the tables of cases in docs/hostile.md: ``python -m tests.hostile.table``. A test compares.

The other tables of the page are written by hand. Each of their rows names a test, which must exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.hostile.bombs import BOMBS
from tests.hostile.forged import FORGED
from tests.hostile.images import IMAGES
from tests.hostile.tars import TARS
from tests.hostile.texts import TEXTS
from tests.hostile.words import slug

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "hostile.md"
DATASETS = "tests/hostile/test_datasets.py"


def document() -> str:
    """The text of docs/hostile.md with its generated tables."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for title, rows in (
        ("Images", ((case.defect, case.outcome, f"[{slug(case.defect)}]") for case in IMAGES)),
        ("Captions and metadata", ((case.defect, case.outcome, f"[{slug(case.defect)}]") for case in TEXTS)),
        ("Shards", ((case.defect, case.outcome, f"[{slug(case.defect)}]") for case in TARS)),
        ("Files that need gigabytes and forged values", _forged()),
    ):
        lines = [f"| {_cell(defect)} | {_cell(outcome)} | `{test}` |" for defect, outcome, test in rows]
        table = "\n".join(["| defect | outcome | test |", "| --- | --- | --- |", *lines])
        text = re.sub(
            rf"(?<=## {title}\n\n)\|.*?(?=\n\n|\n\Z)", lambda _, table=table: table, text, count=1, flags=re.DOTALL
        )
    return text


def _forged() -> Iterator[tuple[str, str, str]]:
    for bomb in BOMBS:
        yield bomb.defect, "refused before it is decoded", f"{DATASETS}, test_bombs"
    for defect in FORGED:
        yield f"a dataset.json with {defect}", "an error that names the place", f"{DATASETS}, test_forged_manifests"


def named_tests() -> list[tuple[str, str]]:
    """The file and the name of each test in the last column of the page."""
    return re.findall(r"\| `(tests/\S+), (\w+)` \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
