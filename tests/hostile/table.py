"""Generate docs/hostile.md from the cases: ``python -m tests.hostile.table``. A test compares."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.hostile.bombs import BOMBS
from tests.hostile.elsewhere import DATASET, DATASETS, OTHERS, PROCESSES, STORAGE
from tests.hostile.forged import FORGED
from tests.hostile.images import IMAGES
from tests.hostile.tars import TARS
from tests.hostile.texts import TEXTS
from tests.hostile.words import slug

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "hostile.md"
RUN = "tests/hostile/test_run.py"

_HEAD = """\
# Bad data and faults

Web data is broken in many ways. After a run, each sample must be either in the dataset or in quarantine with a reason.
This page lists each defect that the tests create, its outcome, and the test.

- A *reason* in `code` is defined in [schemas/reasons.py](../schemas/reasons.py). It is recorded in
  `quarantine/samples/<shard>.parquet` with the key (null for the shard as a whole) and a detail for people.
- *kept* means that the sample is a row. A reason next to it names what was left out of the sample.
- Limits are set in the config under `input.limits` and `failures`; the detail of a refusal names the limit.
- `reinforce status` counts the reasons, and `reinforce run --retry-quarantined` retries quarantined shards.

Tests with a name in brackets belong to one real run over shards with all these defects,
[tests/hostile/test_run.py](../tests/hostile/test_run.py); `make fuzz` searches for more. Faults of processes and
storages are real: processes are killed and requests fail. The files of a run with faults are compared byte for byte
with those of a run without; `make soak` does so with many random faults for ten minutes.

This page is generated from the cases by `python -m tests.hostile.table`.
"""


def document() -> str:
    """The text of docs/hostile.md."""
    sections = [
        ("Images", ((c.defect, c.outcome, f"{RUN}::test_images[{slug(c.defect)}]") for c in IMAGES)),
        ("Captions and metadata", ((c.defect, c.outcome, f"{RUN}::test_texts[{slug(c.defect)}]") for c in TEXTS)),
        ("Shards", ((c.defect, c.outcome, f"{RUN}::test_tars[{slug(c.defect)}]") for c in TARS)),
        ("Beyond single files", iter(OTHERS)),
        ("Datasets from somebody else", iter(_datasets())),
        ("Processes, nodes and disks", iter(PROCESSES)),
        ("Object stores", iter(STORAGE)),
    ]
    return _HEAD + "".join(f"\n## {title}\n\n{_table(rows)}" for title, rows in sections)


def _datasets() -> list[tuple[str, str, str]]:
    bombs = [(bomb.defect, "refused before it is decoded", f"{DATASET}::test_bombs") for bomb in BOMBS]
    test = f"{DATASET}::test_forged_manifests"
    forged = [(f"a dataset.json with {defect}", "an error that names the place", test) for defect in FORGED]
    return [*DATASETS, *bombs, *forged]


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = ["| defect | outcome | test |", "| --- | --- | --- |"]
    for defect, outcome, test in rows:
        shown = test.partition("::")[2]
        shown = shown[shown.index("[") :] if "[" in shown else f"{test.partition('::')[0]}, {shown}"
        lines.append(f"| {_cell(defect)} | {_cell(outcome)} | `{shown}` |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(), encoding="utf-8")
