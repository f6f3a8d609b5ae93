"""Write docs/hostile.md from the cases of this folder and faults.txt: ``python -m tests.hostile.table``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.hostile.bombs import BOMBS, FORGED
from tests.hostile.images import IMAGES
from tests.hostile.tars import TARS
from tests.hostile.texts import TEXTS

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "hostile.md"
#: Tables of faults that are no cases of this folder. The last column of each row is the test that shows it.
FAULTS = Path(__file__).with_name("faults.txt")
_HEAD = """\
# Broken data and faults that are tested

Web data is broken in many ways. After a run, each sample is either in the dataset or in quarantine with a reason.
`python -m tests.hostile.table` writes this page from the cases of one real run over them
([tests/hostile/test_run.py](../tests/hostile/test_run.py)) and from
[tests/hostile/faults.txt](../tests/hostile/faults.txt), which names the test of each fault and has those of models,
sources, processes, nodes, disks and object stores: there, processes are killed and requests fail, and the files of a
run are compared byte for byte with those of a run without. What to do: [bad data](bad-data.md), [object
stores](clusters.md#object-stores).

A reason in `code` is that of the [quarantine](bad-data.md#reasons). *kept* and *read* mean that the sample is a row; a
reason next to it names what is left out. Remarks are in brackets, after the defects that they are about.
"""
_ROW = re.compile(r"^\| (.+) \| (.+) \| (tests/\S+)::(\w+) \|$", re.MULTILINE)


def document() -> str:
    """The text of docs/hostile.md."""
    parts = [_HEAD]
    for title, cases in (("Images", IMAGES), ("Captions and metadata", TEXTS), ("Shards", TARS)):
        parts.append(f"## {title}\n\n{_by_outcome((case.defect, case.outcome) for case in cases)}")
    faults = re.split(r"^(?=## )", FAULTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (shown,) = (one for one in faults if one.startswith("## Datasets from somebody else"))
    parts.append(_ROW.sub(r"| \1 | \2 |", shown.rstrip() + "\n").replace(" | test |\n| --- ", " |\n"))
    forged = [(bomb.defect, "refused before it is decoded") for bomb in BOMBS]
    forged += [(defect, "an error that names the place in dataset.json") for defect in FORGED]
    parts.append(f"## Files that need gigabytes and forged values\n\n{_by_outcome(forged)}")
    return "\n".join(parts)


def _by_outcome(cases: Iterable[tuple[str, str]]) -> str:
    """A table of (defect, outcome), a row for each outcome. What follows a colon in an outcome is a remark."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for defect, outcome in cases:
        head, _, remark = outcome.partition(": ")
        rows.setdefault(head, []).append((defect, remark))
    lines = [f"| {_cell(head)} | {_cell('; '.join(_grouped(items)))} |" for head, items in rows.items()]
    return "\n".join(["| outcome | defects |", "| --- | --- |", *lines]) + "\n"


def _grouped(items: list[tuple[str, str]]) -> Iterator[str]:
    """Defects with equal remarks, which follow them."""
    for remark in dict.fromkeys(remark for _, remark in items):
        yield ", ".join(defect for defect, own in items if own == remark) + (f" ({remark})" if remark else "")


def slug(text: str) -> str:
    """The name of a defect in keys, file names and test ids."""
    return re.sub(r"\W+", "-", text).strip("-")


def named_tests() -> list[tuple[str, str]]:
    """The file and the name of each test in the last column of faults.txt."""
    return [(file, name) for _, _, file, name in _ROW.findall(FAULTS.read_text(encoding="utf-8"))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
